"""Images inside zip archives: Swin's zip mode, and an index that needs no map file."""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import DataError
from data.files import FileList, is_image
from data.images import UnreadableImage, decode

logger = logging.getLogger(__name__)
# Bytes before the name in a zip's local file header; the last four are two lengths.
_LOCAL_HEADER = 30
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
        with open_zip(path) as archive:
            members = [_member(archive, names[i], self.path) for i in range(len(names))]
        self._start = np.array([m.header_offset for m in members], dtype=np.int64)
        self.size = np.array([m.compress_size for m in members], dtype=np.int64)
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
        try:
            file = self._open()
            file.seek(self._start[index])
            header = file.read(_LOCAL_HEADER)
            name_length = int.from_bytes(header[26:28], "little")
            extra_length = int.from_bytes(header[28:30], "little")
            file.seek(name_length + extra_length, os.SEEK_CUR)
            return file.read(int(self.size[index]))
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from None

    def unpack(self, index: int, raw: bytes) -> bytes:
        """The content of a member, checked against its checksum. Raises: UnreadableImage."""
        content = raw
        try:
            if self._method[index] == _DEFLATED:
                content = zlib.decompress(raw, -zlib.MAX_WBITS)
        except zlib.error as error:
            raise UnreadableImage(f"damaged archive member ({error})") from None
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
        return f"{self.archive.path}@/{self.files[index]}"

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
                "caching %d images of %s, %.1f GB", len(cached), self.archive.path, total / 1e9
            )
        for index, end in zip(cached.tolist(), ends.tolist()):
            raw = self.archive.raw(index)
            self._bytes[end - len(raw) : end] = np.frombuffer(raw, dtype=np.uint8)
            self._place[index] = end - len(raw)


def open_zip(path: str | os.PathLike) -> zipfile.ZipFile:
    """Opens an archive. Raises: DataError if it is no zip file."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(
            f"'{path}' is not a complete zip archive ({error}); make it again"
        ) from None


def read_map(path: Path) -> FileList:
    """Swin's map file: one 'relative/path<TAB>label' a line. Raises: DataError naming the first bad
    line.
    """
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        return FileList(
            _map_entry(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
        )


def index_archive(path: Path) -> tuple[FileList, list[str]]:
    """Images of an archive labelled by folder, and the sorted folder names.

    Folders that enclose all images (train/ in train.zip) are skipped; the class is the first folder
    below.

    Raises: DataError if there are no images in class folders.
    """
    with open_zip(path) as archive:
        names = sorted(
            name
            for name in archive.namelist()
            if is_image(name) and not name.startswith("__MACOSX/")
        )
    skip = _enclosing(names)
    if not names or any(name.count("/") <= skip for name in names):
        stray = next((name for name in names if name.count("/") <= skip), "no image at all")
        raise DataError(
            f"'{path}' must hold <class>/<image>, found {stray}; without a map file the folders are"
            " the classes"
        )
    owners = [name.split("/")[skip] for name in names]
    classes = sorted(set(owners))
    labels = {name: label for label, name in enumerate(classes)}
    return FileList((name, labels[owner]) for name, owner in zip(names, owners)), classes


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
    if not tab or not label.strip().isdecimal():
        raise DataError(
            f"'{path}' line {number} must be 'relative/path<TAB>label', got {line.strip()[:80]!r}"
        )
    return name.removeprefix("/"), int(label)


def _member(archive: zipfile.ZipFile, name: str, path: str) -> zipfile.ZipInfo:
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise DataError(
            f"'{path}' has no member '{name}', which its map file lists; make both again"
        ) from None
    if member.flag_bits & 1 or member.compress_type not in (_STORED, _DEFLATED):
        raise DataError(
            f"'{path}' member '{name}' is encrypted or compressed in a way other than deflate;"
            " store it plainly (zip -0)"
        )
    return member


def _check_memory(needed: int, path: str) -> None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise DataError(
            f"DATA.CACHE_MODE would hold {needed / 1e9:.0f} GB of '{path}' per process, the machine"
            f" has {present / 1e9:.0f} GB; use part with more processes, or no"
        )
