"""The layouts that several data sets share: class folders, and archives of them. Each function
checks its layout and returns Sources, or raises DataError.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.archives import ZipSource, index_archive, read_map
from data.errors import DataError, layout_error
from data.files import EXTENSIONS, FileList, class_folders, scan_classes
from data.sources import FileSource, Sources

CLASS_FOLDERS = "train/<class>/<image> and val/<class>/<image>"


def folder(root: Path, train: bool = True, dataset: str = "folder") -> Sources:
    """Class folders: root/train/<class>/... and root/val/<class>/...; labels follow the sorted
    folder names.

    Without `train` the folder train/ may be absent; where it exists its classes must still be those
    of val/.
    """
    classes = _classes(root, "val", dataset)
    if train or (root / "train").is_dir():
        same_classes(_classes(root, "train", dataset), classes, dataset, str(root))
    images = FileSource(root / "train", scan(root, "train", classes, dataset)) if train else None
    return Sources(images, FileSource(root / "val", scan(root, "val", classes, dataset)), classes)


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
    if train and all(names):
        same_classes(names[1], names[0], dataset, f"{root} (zip)")
    elif train:
        _same_kind(root, names)
    sources = [
        ZipSource(root / f"{split}.zip", files, cache, rank, world_size)
        for split, files in zip(splits, lists)
    ]
    count = 1 + max(int(files.labels.max()) for files in lists)
    classes = names[0] or [str(label) for label in range(count)]
    return Sources(sources[1] if train else None, sources[0], classes)


def same_classes(train: list[str], val: list[str], dataset: str, place: str) -> None:
    """Raises DataError unless both splits have the same class folders."""
    if train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    raise DataError(
        f"DATA.DATASET {dataset}: train and val in '{place}' must have the same class folders;"
        f" train has {len(train)}, val {len(val)}"
        f"{_some('only in train', only_train)}{_some('only in val', only_val)}"
    )


def _classes(root: Path, split: str, dataset: str) -> list[str]:
    classes = class_folders(root / split)
    if classes:
        return classes
    hint, looked = "", root
    if (root / split).is_dir():
        looked = root / split
        hint = f"sort the images of {split}/ into one folder per class"
    elif class_folders(root) and root.name in ("train", "val"):
        hint = f"DATA.DATA_PATH should be the folder above: '{root.parent}'"
    raise layout_error(dataset, root, CLASS_FOLDERS, looked, hint)


def scan(root: Path, split: str, classes: list[str], dataset: str) -> FileList:
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
    if listing.is_file():
        files, classes = read_map(listing), []
    else:
        files, classes = index_archive(root / f"{split}.zip")
    if not len(files):
        raise DataError(f"'{listing}' lists no image")
    return files, classes


def _same_kind(root: Path, names: tuple[list[str], ...]) -> None:
    if any(names):
        raise DataError(
            f"'{root}' has a map file for one of train.zip and val.zip only; add the other or"
            " remove it, or labels of the two could differ"
        )


def _some(title: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = names[:3] + ["..."] * (len(names) > 3)
    return f"; {title}: {', '.join(shown)}"
