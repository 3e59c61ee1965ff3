"""Images inside zip archives: Swin's zip mode, and an index that needs no map file."""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import DataError, printable
from data.files import FileList, LeftOut, is_image
from data.images import MAX_BYTES, UnreadableImage, decode

logger = logging.getLogger(__name__)
# Bytes before the name in a zip's local file header; the last four are two lengths.
_LOCAL_HEADER, _SIGNATURE = 30, b"PK\3\4"
# More classes than any data set has; a label is an index into arrays of that length.
_MOST_CLASSES = 2**20
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class Archive:
    """Random access to the members of a zip file.

    The standard library's ZipFile keeps one object per member, about 1 GB for ImageNet in each
    worker, and one file position for all processes forked after opening. This keeps four arrays and
    opens the file once per process.

    Args:
        names: the members to index. Raises: DataError if the file is no zip, or lacks or encrypts a
            member.
    """

    def __init__(self, path: str | os.PathLike, names: FileList):
        self.path = os.fspath(path)
        self._pid, self._file = -1, None
        end = os.path.getsize(path)
        with open_zip(path) as archive:
            members = [_member(archive, names[i], self.path) for i in range(len(names))]
        # what a damaged directory says of a place outside the file is not read
        inside = [0 <= m.header_offset <= end - m.compress_size for m in members]
        self._start = np.array(
            [m.header_offset if ok else -1 for m, ok in zip(members, inside)], dtype=np.int64
        )
        self.size = np.array(
            [m.compress_size if ok else 0 for m, ok in zip(members, inside)], dtype=np.int64
        )
        self._unpacked = np.array([min(m.file_size, 2**62) for m in members], dtype=np.int64)
        self._crc = np.array([m.CRC for m in members], dtype=np.uint32)
        self._method = np.array([m.compress_type for m in members], dtype=np.uint8)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pid": -1, "_file": None}

    @property
    def checksums(self) -> np.ndarray:
        """CRC-32 of each member's content, as the archive's directory has it."""
        return self._crc

    def raw(self, index: int) -> bytes:
        """The member as stored, perhaps compressed. Raises: UnreadableImage."""
        if self._start[index] < 0:
            raise UnreadableImage("damaged archive (the member's place lies outside it)")
        if max(self.size[index], self._unpacked[index]) > MAX_BYTES:
            raise UnreadableImage(f"{self._unpacked[index]} bytes, more than {MAX_BYTES}")
        try:
            file = self._open()
            file.seek(self._start[index])
            header = file.read(_LOCAL_HEADER)
            if len(header) < _LOCAL_HEADER or not header.startswith(_SIGNATURE):
                raise UnreadableImage("damaged archive (no member where its directory says)")
            name_length = int.from_bytes(header[26:28], "little")
            extra_length = int.from_bytes(header[28:30], "little")
            file.seek(name_length + extra_length, os.SEEK_CUR)
            content = file.read(int(self.size[index]))
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from None
        if len(content) < self.size[index]:
            raise UnreadableImage("damaged archive (it ends inside the member)")
        return content

    def unpack(self, index: int, raw: bytes) -> bytes:
        """The content of a member, checked against its length and checksum. Raises:
        UnreadableImage.
        """
        content = raw
        length = int(self._unpacked[index])
        try:
            if self._method[index] == _DEFLATED:
                # one byte more than announced is enough to know; there could be terabytes
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, length + 1)
        except zlib.error as error:
            raise UnreadableImage(f"damaged archive member ({error})") from None
        if len(content) != length:
            raise UnreadableImage("damaged archive member (length differs)")
        if zlib.crc32(content) != self._crc[index]:
            raise UnreadableImage("damaged archive member (checksum differs)")
        return content

    def _open(self):
        if self._pid != os.getpid():
            self._pid, self._file = os.getpid(), open(self.path, "rb")
        return self._file


class ZipSource:
    """Images of a zip archive.

    Args:
        cache: 'no' reads from the archive each time; 'full' keeps all bytes in memory, once per
            process of the job; 'part' keeps the images i with i mod world_size == rank and reads
            the others. Whatever the cache, every rank sees every image in the course of training.
    Raises: DataError if the cache would not fit into the machine.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        files: FileList,
        cache: str = "no",
        rank: int = 0,
        world_size: int = 1,
    ):
        self.files, self.labels = files, files.labels
        self.archive = Archive(path, files)
        cached = {
            "no": np.arange(0),
            "full": np.arange(len(files)),
            "part": np.arange(rank, len(files), world_size),
        }
        if cache not in cached:
            raise DataError(f"DATA.CACHE_MODE '{cache}' is unknown; allowed: no, full, part")
        self._load(cached[cache])

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return printable(f"{self.archive.path}@/{self.files[index]}")

    def read(self, index: int) -> Image.Image:
        return decode(self.archive.unpack(index, self._raw(index)))

    def _raw(self, index: int) -> bytes:
        at = self._place[index]
        if at < 0:
            return self.archive.raw(index)
        return self._bytes[at : at + self.archive.size[index]].tobytes()

    def _load(self, cached: np.ndarray) -> None:
        """Reads the images with these indices into memory."""
        # where in _bytes image i begins; -1 if it is not there
        self._place = np.full(len(self), -1, dtype=np.int64)
        ends = np.cumsum(self.archive.size[cached])
        total = int(ends[-1]) if len(cached) else 0
        _check_memory(total, self.archive.path)
        self._bytes = np.empty(total, dtype=np.uint8)
        if total:
            logger.info(
                "caching %d images of %s, %.1f GB",
                len(cached),
                printable(self.archive.path),
                total / 1e9,
            )
        for index, end in zip(cached.tolist(), ends.tolist()):
            try:
                raw = self.archive.raw(index)
            except UnreadableImage:  # told when it is its turn, as without a cache
                continue
            self._bytes[end - len(raw) : end] = np.frombuffer(raw, dtype=np.uint8)
            self._place[index] = end - len(raw)


@dataclass(frozen=True)
class ZipIndex:
    """What an archive holds.

    classes: sorted names of the class folders; [] where a map file gives the labels.
    mapped: whether one does.
    folders: label -> folder, where a map gives each folder one label.
    """

    files: FileList
    left_out: LeftOut
    classes: list[str]
    mapped: bool
    folders: dict[int, str]


def open_zip(path: str | os.PathLike) -> zipfile.ZipFile:
    """Opens an archive. Raises: DataError if it is no zip file."""
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # BadZipFile; of damaged directories also struct.error, ValueError
        raise DataError(
            f"'{printable(path)}' is not a complete zip archive ({error}); make it again"
        ) from None


def read_map(path: Path) -> ZipIndex:
    """The images of the archive `path` that Swin's map file beside it lists, one
    'relative/path<TAB>label' a line. Raises: DataError naming the first bad line.
    """
    listing = path.with_name(f"{path.stem}_map.txt")
    with open(listing, encoding="utf-8-sig", errors="surrogateescape") as lines:
        files = FileList(
            _map_entry(listing, number, line)
            for number, line in enumerate(lines, 1)
            if line.strip()
        )
    left_out = LeftOut()
    with open_zip(path) as archive:
        more = len({name for name in archive.namelist() if _is_member(name)}) - len(files)
    if more > 0:
        left_out[f"not in {listing.name}"] = more
    return ZipIndex(files, left_out, [], True, _folders(files))


def index_archive(path: Path) -> ZipIndex:
    """Images of an archive labelled by folder.

    Folders that enclose all images (train/ in train.zip) are skipped; the class is the first folder
    below.

    Raises: DataError if there are no images in class folders.
    """
    left_out = LeftOut()
    with open_zip(path) as archive:
        members = sorted(set(archive.namelist()))
    names = [name for name in members if _is_member(name)]
    for name in members:
        if not (is_image(name) or name.endswith("/") or name.startswith("__MACOSX/")):
            left_out.note(name)
    skip = _enclosing(names)
    if not names or any(name.count("/") <= skip for name in names):
        stray = next((name for name in names if name.count("/") <= skip), "no image at all")
        found = f"{printable(stray)}, {left_out}" if left_out else printable(stray)
        raise DataError(
            f"'{printable(path)}' must hold <class>/<image>, found {found}; without a map file the"
            " folders are the classes; an archive inside is not opened"
        )
    owners = [name.split("/")[skip] for name in names]
    classes = sorted(set(owners) | set(_empty_folders(members, names[0], skip)))
    labels = {name: label for label, name in enumerate(classes)}
    files = FileList((name, labels[owner]) for name, owner in zip(names, owners))
    return ZipIndex(files, left_out, classes, False, {})


def _is_member(name: str) -> bool:
    return is_image(name) and not name.startswith("__MACOSX/")


def _empty_folders(members: Iterable[str], image: str, skip: int) -> Iterator[str]:
    """Names of the folders beside that of `image`, below `skip` enclosing ones."""
    around = image.split("/")[:skip]
    for name in members:
        parts = name.split("/")
        if len(parts) == skip + 2 and not parts[-1] and parts[:skip] == around:
            if not parts[skip].startswith(".") and parts[skip] != "__MACOSX":
                yield parts[skip]


def _folders(files: FileList) -> dict[int, str]:
    """Label -> class folder, as far as the names of listed images tell; {} unless each label has a
    folder of its own.
    """
    names = [files[i] for i in range(len(files))]
    skip = _enclosing([min(names, default=""), max(names, default="")])
    found: dict[int, str] = {}
    for name, label in zip(names, files.labels.tolist()):
        parts = name.split("/")
        if len(parts) < skip + 2 or found.setdefault(label, parts[skip]) != parts[skip]:
            return {}
    return found if len(set(found.values())) == len(found) else {}


def _enclosing(names: list[str]) -> int:
    """How many leading folders all of `names` share, leaving at least one folder to be the
    class.
    """
    if not names:
        return 0
    # sorted: what these two share, all share
    first, last = names[0].split("/")[:-2], names[-1].split("/")
    shared = 0
    while shared < len(first) and first[shared] == last[shared]:
        shared += 1
    return shared


def _map_entry(path: Path, number: int, line: str) -> tuple[str, int]:
    name, tab, label = line.rstrip("\r\n").rpartition("\t")
    label = label.strip()
    if not tab or not (label.isascii() and label.isdigit()):
        raise DataError(
            f"'{printable(path)}' line {number} must be 'relative/path<TAB>label', got"
            f" {printable(line.strip()[:80])!r}"
        )
    if len(label) > 9 or int(label) >= _MOST_CLASSES:
        raise DataError(
            f"'{printable(path)}' line {number}: label {label[:40]} is too large; labels are"
            f" numbers from 0 to the number of classes - 1, at most {_MOST_CLASSES - 1}"
        )
    return name.removeprefix("/"), int(label)


def _member(archive: zipfile.ZipFile, name: str, path: str) -> zipfile.ZipInfo:
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise DataError(
            f"'{printable(path)}' has no member '{printable(name)}', which its map file lists; make"
            " both again"
        ) from None
    if member.flag_bits & 1 or member.compress_type not in (_STORED, _DEFLATED):
        raise DataError(
            f"'{printable(path)}' member '{printable(name)}' is encrypted or compressed in a way"
            " other than deflate; store it plainly (zip -0)"
        )
    return member


def _check_memory(needed: int, path: str) -> None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise DataError(
            f"DATA.CACHE_MODE would hold {needed / 1e9:.0f} GB of '{printable(path)}' per process,"
            f" the machine has {present / 1e9:.0f} GB; use part with more processes, or no"
        )
