"""The layouts of image data sets on disk. Each function checks its layout and returns Sources, or
raises DataError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.archives import ZipSource, index_archive, read_map
from data.errors import DataError, layout_error
from data.files import EXTENSIONS, FileList, class_folders, scan_classes
from data.sources import FileSource, Sources

_CLASS_FOLDERS = "train/<class>/<image> and val/<class>/<image>"
_TINY = (
    "wnids.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt (the"
    " archive as shipped)"
)
_22K = (
    "ILSVRC2011fall_whole_map_train.txt and ILSVRC2011fall_whole_map_val.txt, JSON lists of"
    " [relative path, label]"
)
_PAIR = re.compile(
    r'[\[,]\s*\[\s*("(?:[^"\\]|\\.)*")\s*,\s*(\d+)\s*\]\s*'
)  # one entry and what precedes it


def folder(root: Path, train: bool = True, dataset: str = "folder") -> Sources:
    """Class folders: root/train/<class>/... and root/val/<class>/...; labels follow the sorted
    folder names.

    Without `train` the folder train/ may be absent; where it exists its classes must still be those
    of val/.
    """
    classes = _classes_of(root, "val", dataset)
    if train or (root / "train").is_dir():
        same_classes(_classes_of(root, "train", dataset), classes, dataset, str(root))
    images = FileSource(root / "train", _scan(root, "train", classes, dataset)) if train else None
    return Sources(images, FileSource(root / "val", _scan(root, "val", classes, dataset)), classes)


def zip_folder(
    root: Path,
    train: bool = True,
    dataset: str = "folder",
    cache: str = "no",
    rank: int = 0,
    world_size: int = 1,
) -> Sources:
    """root/train.zip and root/val.zip, with train_map.txt and val_map.txt ('path<TAB>label') or,
    without both, class folders inside.
    """
    splits = ["val", "train"] if train else ["val"]
    for split in splits:
        if not (root / f"{split}.zip").is_file():
            raise layout_error(
                dataset,
                root,
                "train.zip and val.zip (and, if wanted, train_map.txt and val_map.txt)",
                hint="DATA.ZIP_MODE is on (--zip)",
            )
    lists, names = zip(*(_zip_index(root, split) for split in splits))
    if train:
        (
            same_classes(names[1], names[0], dataset, f"{root} (zip)")
            if all(names)
            else _same_kind(root, names)
        )
    sources = [
        ZipSource(root / f"{split}.zip", files, cache, rank, world_size)
        for split, files in zip(splits, lists)
    ]
    count = 1 + max(int(files.labels.max()) for files in lists)
    return Sources(
        sources[1] if train else None,
        sources[0],
        names[0] or [str(label) for label in range(count)],
    )


def imagenet22k(root: Path, train: bool = True, num_classes: int = 21841) -> Sources:
    """ImageNet-22K by the reference's two lists of [relative path, label]; images lie at
    root/<relative path>.
    """
    return Sources(
        _listed(root, "train", num_classes) if train else None,
        _listed(root, "val", num_classes),
        [str(label) for label in range(num_classes)],
    )


def tiny_imagenet(root: Path, train: bool = True) -> Sources:
    """Tiny-ImageNet as shipped, at root or root/tiny-imagenet-200; labels follow the sorted
    wnids.
    """
    if not (root / "wnids.txt").is_file() and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    annotations = root / "val" / "val_annotations.txt"
    for needed in (root / "wnids.txt", annotations, root / "val" / "images"):
        if not needed.exists():
            hint = (
                "for validation images sorted into class folders use DATA.DATASET folder"
                if class_folders(root / "val")
                else ""
            )
            raise layout_error("tiny_imagenet", root, _TINY, needed.parent, hint)
    classes = sorted((root / "wnids.txt").read_text().split())
    labels = {wnid: label for label, wnid in enumerate(classes)}
    val = FileSource(root / "val" / "images", FileList(_annotated(annotations, labels)))
    return Sources(
        (
            FileSource(root / "train", _scan(root, "train", classes, "tiny_imagenet"))
            if train
            else None
        ),
        val,
        classes,
    )


def same_classes(train: list[str], val: list[str], dataset: str, place: str) -> None:
    """Raises DataError unless both splits have the same class folders."""
    if train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    raise DataError(
        f"DATA.DATASET {dataset}: train and val in '{place}' must have the same class folders;"
        f" train has {len(train)}, val"
        f" {len(val)}{_some('only in train', only_train)}{_some('only in val', only_val)}"
    )


def _classes_of(root: Path, split: str, dataset: str) -> list[str]:
    classes = class_folders(root / split)
    if classes:
        return classes
    hint = ""
    if (root / split).is_dir():
        hint = f"sort the images of {split}/ into one folder per class"
    elif class_folders(root) and root.name in ("train", "val"):
        hint = f"DATA.DATA_PATH should be the folder above: '{root.parent}'"
    raise layout_error(
        dataset, root, _CLASS_FOLDERS, root / split if (root / split).is_dir() else root, hint
    )


def _scan(root: Path, split: str, classes: list[str], dataset: str) -> FileList:
    files = scan_classes(root / split, classes)
    present = np.bincount(files.labels, minlength=len(classes)) > 0
    empty = [name for name, there in zip(classes, present) if not there]
    if empty and (split == "train" or not len(files)):
        raise DataError(
            f"DATA.DATASET {dataset}: no image in {len(empty)} class folder(s) of '{root / split}',"
            f" first '{empty[0]}' (extensions: {' '.join(EXTENSIONS)})"
        )
    return files


def _zip_index(root: Path, split: str) -> tuple[FileList, list[str]]:
    listing = root / f"{split}_map.txt"
    files, classes = (
        (read_map(listing), []) if listing.is_file() else index_archive(root / f"{split}.zip")
    )
    if not len(files):
        raise DataError(f"'{listing}' lists no image")
    return files, classes


def _same_kind(root: Path, names: tuple[list[str], ...]) -> None:
    if any(names):
        raise DataError(
            f"'{root}' has a map file for one of train.zip and val.zip only; add the other or"
            " remove it, or labels of the two could differ"
        )


def _listed(root: Path, split: str, num_classes: int) -> FileSource:
    listing = root / f"ILSVRC2011fall_whole_map_{split}.txt"
    if not listing.is_file():
        raise layout_error("imagenet22K", root, _22K)
    files = FileList(_json_pairs(listing))
    if not len(files) or files.labels.max() >= num_classes or files.labels.min() < 0:
        raise DataError(
            f"'{listing}' must list images with labels 0..{num_classes - 1}; found {len(files)}"
            f" images, labels {files.labels.min(initial=0)}..{files.labels.max(initial=0)}"
        )
    source = FileSource(root, files)
    if not Path(source.name(0)).exists():
        raise DataError(
            f"'{listing}' lists '{files[0]}', but there is no file '{source.name(0)}'; "
            "its paths are relative to DATA.DATA_PATH"
        )
    return source


def _json_pairs(listing: Path) -> Iterator[tuple[str, int]]:
    """Entries one at a time: json.load would hold 14 million lists at once, several GB in every
    process.
    """
    text, at = listing.read_text().strip(), 0
    while entry := _PAIR.match(text, at):
        yield json.loads(entry[1]), int(entry[2])
        at = entry.end()
    if text[at:] != "]":
        raise DataError(
            f"'{listing}' must be a JSON list of [relative path, label]; at character {at} found"
            f" {text[at : at + 40]!r}"
        )


def _annotated(annotations: Path, labels: dict[str, int]) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(annotations.read_text().splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in labels:
            raise DataError(
                f"'{annotations}' line {number} must be 'image<TAB>wnid<TAB>...' with a wnid of"
                f" wnids.txt, got {line[:60]!r}"
            )
        yield name, labels[wnid]


def _some(title: str, names: list[str]) -> str:
    return f"; {title}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
