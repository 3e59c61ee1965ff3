"""Lists of image files in compact buffers, and the scan of class folders."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
Identity = tuple[int, int]  # of a folder, by whatever path: device and number on it


class FileList:
    """Names and labels of N images as two buffers, one offset array and no Python object per image.

    Workers are forked: a list of str would be copied page by page as reference counts change; these
    buffers never are.

    Args:
        pairs: (name, label) of each image; names are relative to whatever root the reader adds.
    """

    def __init__(self, pairs: Iterable[tuple[str, int]]):
        names, ends, labels = bytearray(), array("q", [0]), array("q")
        for name, label in pairs:
            names += name.encode("utf-8", "surrogatepass")
            ends.append(len(names))
            labels.append(label)
        self._names = bytes(names)
        self._ends = np.array(ends, dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def add_to(self, digest: Any) -> None:
        """Feeds the names, in order, to a hashlib object."""
        digest.update(self._ends.astype("<i8").tobytes())
        digest.update(self._names)

    def __getitem__(self, index: int) -> str:
        name = self._names[self._ends[index] : self._ends[index + 1]]
        return name.decode("utf-8", "surrogatepass")


class LeftOut(Counter):
    """How many files were taken for no image, by extension; hidden files are not counted."""

    def note(self, name: str, place: str = "") -> None:
        """Counts a file that is left out; `place` says where it lies, if that is the reason."""
        base = os.path.basename(name)
        if not base.startswith("."):
            extension = os.path.splitext(base)[1].lower() or "no extension"
            self[f"{printable(extension)}{place}"] += 1

    def __str__(self) -> str:
        """'12 files (.jfif 10, .gif 2)'."""
        kinds = [f"{kind} {count}" for kind, count in self.most_common(6)]
        more = ["..."] * (len(self) > 6)
        return f"{self.total()} file(s) ({', '.join(kinds + more)})"


def class_folders(folder: str | os.PathLike) -> list[str]:
    """Sorted names of the sub-folders; hidden ones (.ipynb_checkpoints) are no classes. [] where
    `folder` is none.
    """
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def is_image(name: str) -> bool:
    """Whether the extension is one of EXTENSIONS and the file is not hidden (macOS leaves ._x.jpg
    beside x.jpg).
    """
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def scan_classes(root: str | os.PathLike, classes: list[str]) -> tuple[FileList, LeftOut]:
    """All images of root/<class>/, in torchvision's ImageFolder order, and what was left out. The
    label is the position in `classes`.

    Links are followed, but no folder is read twice: a link to a folder around it leads nowhere.
    Raises: DataError where one folder belongs to two classes, or cannot be read.
    """
    left_out = LeftOut()
    try:
        owners = _owners(Path(root), classes)
        _note_loose_files(root, left_out)
        files = FileList(
            (path, label)
            for label, name in enumerate(classes)
            for path in _images_below(os.fspath(root), name, owners, left_out)
        )
    except OSError as error:
        raise DataError(
            f"folder cannot be read: {printable(error.filename or root)}: {error.strerror}"
        ) from None
    except _TwoClasses as error:
        first, second = (printable(name) for name in error.args)
        raise DataError(
            f"in '{printable(root)}' '{first}' and '{second}' are the same folder: its images would"
            " have two labels; remove one of the links"
        ) from None
    return files, left_out


class _TwoClasses(Exception):
    """Two names of one folder."""


def _owners(root: Path, classes: list[str]) -> dict[Identity, str]:
    """Whose each folder is: "" for those around the classes, the name for the classes' own."""
    outer = root.resolve()
    owners = {_identity(folder): "" for folder in (outer, *outer.parents)}
    for name in classes:
        if not os.path.isdir(root / name):
            continue
        identity = _identity(root / name)
        if identity in owners:
            raise _TwoClasses(owners[identity] or ".", name)
        owners[identity] = name
    return owners


def _identity(folder: str | os.PathLike) -> Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _note_loose_files(root: str | os.PathLike, left_out: LeftOut) -> None:
    with os.scandir(root) as entries:
        for entry in entries:
            if not entry.is_dir():
                left_out.note(entry.name, " beside the class folders")


def _images_below(
    root: str, name: str, owners: dict[Identity, str], left_out: LeftOut
) -> Iterator[str]:
    """Paths, relative to `root`, of the images below root/name at any depth."""
    found, pending = [], [name] if os.path.isdir(os.path.join(root, name)) else []
    while pending:
        folder = pending.pop()
        inner, images = _content(os.path.join(root, folder), left_out)
        found.append((folder, sorted(images)))
        for path in sorted((os.path.join(folder, name) for name in inner), reverse=True):
            owner = owners.setdefault(_identity(os.path.join(root, path)), path)
            if owner == path:
                pending.append(path)
            elif owner and owner.split(os.sep)[0] != name:
                raise _TwoClasses(owner, path)
    for folder, images in sorted(found):
        for image in images:
            yield os.path.join(folder, image)


def _content(folder: str, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """Names of the folders and of the images in a folder."""
    inner, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = _kind(entry)
            if kind == "folder":
                inner.append(entry.name)
            elif kind == "special":
                left_out.note(entry.name, " pipe, socket or device")
            elif is_image(entry.name):
                images.append(entry.name)
            else:
                left_out.note(entry.name)
    return inner, images


def _kind(entry: os.DirEntry) -> str:
    """folder, file or special. A link to nothing counts as the file that is missing, so that its
    reading fails.
    """
    try:
        if entry.is_dir():
            return "folder"
        lost = entry.is_symlink() and not os.path.exists(entry.path)
        return "file" if entry.is_file() or lost else "special"
    except OSError:  # a link to itself
        return "file"
