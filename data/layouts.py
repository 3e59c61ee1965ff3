"""The layouts that several data sets share: class folders, and archives of them. Each function
checks its layout and returns Sources, or raises DataError.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from data.archives import ZipIndex, ZipSource, index_archive, read_map
from data.catalogue import Request
from data.errors import DataError, layout_error, printable
from data.files import EXTENSIONS, FileList, LeftOut, class_folders, scan_classes
from data.sources import FileSource, Sources

logger = logging.getLogger(__name__)
CLASS_FOLDERS = "train/<class>/<image> and val/<class>/<image>"
ARCHIVES = "train.zip and val.zip with DATA.ZIP_MODE"


def folder_or_zip(request: Request) -> Sources:
    """Class folders, or with DATA.ZIP_MODE archives of them."""
    if not request.zipped:
        return folder(request.root, request.train, request.dataset)
    return zip_folder(
        request.root,
        request.train,
        request.dataset,
        request.cache,
        request.rank,
        request.world_size,
    )


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
    val = FileSource(root / "val", scan(root, "val", classes, dataset))
    return Sources(images, val, [printable(name) for name in classes])


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
    indices = [_zip_index(root, split) for split in splits]
    if any(index.mapped for index in indices):
        classes = _mapped_classes(root, indices, dataset)
    else:
        classes = indices[0].classes
        if train:
            same_classes(indices[1].classes, classes, dataset, f"{printable(root)} (zip)")
    for split, index in zip(splits, indices):
        place = f"{printable(root)}/{split}.zip"
        _tell_left_out(place, index.left_out)
        strict = split == "train" and not index.mapped
        _check_empty(place, index.files, classes, dataset, strict)
    sources = [
        ZipSource(root / f"{split}.zip", index.files, cache, rank, world_size)
        for split, index in zip(splits, indices)
    ]
    return Sources(sources[1] if train else None, sources[0], list(map(printable, classes)))


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


def scan(
    root: Path, split: str, classes: list[str], dataset: str, known: tuple[str, ...] = ()
) -> FileList:
    """The images of root/split/<class>/; says what it leaves out and which classes have none.

    known: extensions of other files that belong there.
    Raises: DataError where a training class, or all, have none.
    """
    files, left_out = scan_classes(root / split, classes)
    for extension in known:
        left_out.pop(extension, None)
    place = printable(root / split)
    _tell_left_out(place, left_out)
    _check_empty(place, files, classes, dataset, split == "train")
    return files


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


def _tell_left_out(place: str, left_out: LeftOut) -> None:
    if left_out:
        logger.warning(
            "'%s': %s left out; images are read from files in class folders whose names end in %s:"
            " convert the others, or rename them (.jfif is .jpg)",
            place,
            left_out,
            " ".join(EXTENSIONS),
        )


def _check_empty(
    place: str, files: FileList, classes: list[str], dataset: str, strict: bool
) -> None:
    """Says, or if strict refuses, that classes have no image."""
    present = np.bincount(files.labels, minlength=len(classes)) > 0
    empty = [printable(name) for name, there in zip(classes, present) if not there]
    if not empty:
        return
    if strict or not len(files):
        raise DataError(
            f"DATA.DATASET {dataset}: no image in {len(empty)} class folder(s) of '{place}',"
            f" first '{empty[0]}' (extensions: {' '.join(EXTENSIONS)})"
        )
    logger.warning(
        "'%s': %d of %d classes have no image, first '%s'; its score says nothing of them",
        place,
        len(empty),
        len(classes),
        empty[0],
    )


def _zip_index(root: Path, split: str) -> ZipIndex:
    listing = root / f"{split}_map.txt"
    index = (read_map if listing.is_file() else index_archive)(root / f"{split}.zip")
    if not len(index.files):
        raise DataError(f"'{printable(listing)}' lists no image")
    return index


def _mapped_classes(root: Path, indices: list[ZipIndex], dataset: str) -> list[str]:
    """Names in label order: the folders of the images where each label has one of its own, else the
    labels. Raises: DataError where the two maps contradict each other.
    """
    place = printable(root)
    if not all(index.mapped for index in indices):
        raise DataError(
            f"'{place}' has a map file for one of train.zip and val.zip only; add the other or"
            " remove it, or labels of the two could differ"
        )
    count = 1 + max(int(index.files.labels.max()) for index in indices)
    present = len(np.unique(np.concatenate([index.files.labels for index in indices])))
    if dataset == "folder" and count > 1000 + 2 * present:
        raise DataError(
            f"the map files of '{place}' give {present} different labels up to {count - 1};"
            " number the classes from 0 without gaps"
        )
    pairs = sorted({pair for index in indices for pair in index.folders.items()})
    labels: dict[str, int] = {}
    for label, name in pairs:
        if labels.setdefault(name, label) != label:
            raise DataError(
                f"the map files of '{place}' contradict each other: the images of"
                f" '{printable(name)}' have label {labels[name]} in one and {label} in the other"
            )
    names = dict(pairs) if len(dict(pairs)) == len(pairs) else {}
    return [names.get(label, str(label)) for label in range(count)]


def _some(title: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = [printable(name) for name in names[:3]] + ["..."] * (len(names) > 3)
    return f"; {title}: {', '.join(shown)}"
