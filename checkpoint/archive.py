"""A file -> its content: tensors and plain data. Nothing in a file is ever executed, and damage is
noticed while the file is read.
"""

import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from .errors import CheckpointError, first_line

# What torch.load and zipfile raise on damaged files.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
)


class Values(dict):
    """Stands in for a pickled argparse.Namespace: it has the values and none of the behaviour."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A namespace keeps its values in the instance's state."""
        self.update(state)


class DType:
    """Stands in for a pickled numpy.dtype: its short name and byte order."""

    def __init__(self, name: str = "", *_: Any) -> None:
        self.name = name
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        """The byte order is the second entry."""
        self.order = state[1] if state[1] in ("<", ">") else "<"


def scalar(dtype: DType, raw: Any) -> bool | int | float:
    """Stands in for NumPy's unpickling of one number, such as the best accuracy of a run: the plain
    Python number.
    """
    form = NUMBERS[dtype.name]
    data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    return struct.unpack(dtype.order + form, data)[0]


# NumPy's short names of numbers -> those of `struct`.
NUMBERS = {
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}
# Calls in a pickle that take memory by its word alone.
ALLOCATORS = re.compile(rb"c(builtins|__builtin__)\nbytearray\n|ctorch(\.\w+)*\n[A-Z]\w*Tensor\n")
PICKLED = 1 << 26  # bytes at a file's start that are searched for them
INFLATION = 100  # most times that an archive's content may be larger than the archive
SMALL = 1 << 24  # bytes that any archive may hold

# Classes that Swin's and other training scripts pickle beside the weights, and what is built
# instead. torch's restricted unpickler fills plain and ordered dicts only, so a yacs node becomes
# an ordered one (its flags become attributes).
STAND_INS = [
    (OrderedDict, "yacs.config.CfgNode"),
    (Values, "argparse.Namespace"),
    (DType, "numpy.dtype"),
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
]


def read_pickle(path: Path, file: BinaryIO) -> tuple[Any, bool]:
    """What torch.save wrote, onto the CPU, in one pass over the file, and whether checksums have
    vouched for it. Classes other than tensors, plain data and the stand-ins are refused.

    Raises: CheckpointError.
    """
    if not zipfile_starts(file):  # written before torch 1.6: no checksums
        refuse_allocators(path, file.read(PICKLED))
        file.seek(0)
        return unpickle(path, file), False
    archive = CheckedArchive(path, file)
    content = unpickle(path, archive)
    archive.check_rest()
    return content, any(archive.whole.values())


def map_pickle(path: Path) -> Any:
    """The same without reading the tensors: they stay on disk until they are used, unchecked."""
    with open(path, "rb") as file:
        if zipfile_starts(file):
            CheckedArchive(path, file)
    return unpickle(path, path, mmap=True)


def can_be_mapped(path: Path, file: BinaryIO) -> bool:
    """Whether `map_pickle` can read a file: an archive whose tensors are not packed. Raises:
    CheckpointError for one whose directory or small records are damaged.
    """
    if not zipfile_starts(file) or path.suffix == ".safetensors":  # torch goes by the name
        return False
    records = CheckedArchive(path, file).records
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def refuse_allocators(path: Path, pickled: bytes) -> None:
    """Raises CheckpointError for a pickle that would take memory without bringing its content."""
    if found := ALLOCATORS.search(pickled):
        name = found[0].decode().split("\n")[1]
        raise CheckpointError(
            f"{path} builds a {name} while it is read, which is refused: a small file could take"
            " any amount of memory; save tensors and plain data where it was made"
        )


def zipfile_starts(file: BinaryIO) -> bool:
    """Whether a file begins as the archives of torch 1.6 and later do; leaves it at its start."""
    start = file.read(2)
    file.seek(0)
    return start == b"PK"


def unpickle(path: Path, file: Any, **options: Any) -> Any:
    """torch.load, restricted to tensors, plain data and the stand-ins."""
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(file, map_location="cpu", weights_only=True, **options)
    except FAILURES as error:
        raise CheckpointError(explain(path, error)) from error


def explain(path: Path, error: BaseException) -> str:
    """One line for an error of torch.load."""
    text = str(error)
    refused = re.search(r"GLOBAL ([\w.]+)", text) or re.search(
        r"reduce for unrecognized function <?(?:[a-z-]+ )*'?([\w.]+)", text
    )
    if "TorchScript" in text:
        return f"{path} is a TorchScript archive; save its state_dict() and load that"
    if refused:
        return (
            f"{path} holds a pickled {refused.group(1)}, which is refused: loading it could run"
            " code; save {'model': model.state_dict()} or a .safetensors file where it was made"
        )
    return (
        f"{path} is not a weights file or is damaged ({first_line(error)}); fetch or write it again"
    )


class CheckedArchive:
    """A zip archive as torch.load reads it: each record's checksum is formed from the bytes that
    pass, for torch itself does not notice a flipped bit.

    The records that hold no tensor are small and are checked first, so that nothing damaged is
    unpickled. Those that torch leaves out, or reads in pieces, are checked by `check_rest`.
    Raises: CheckpointError.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.whole: dict[str, bool] = {}  # by name of the record, once it is checked
        try:
            self.archive = zipfile.ZipFile(file)
            self.records = self.archive.infolist()
            self.at = {self.data_start(record): record for record in self.records}
        except FAILURES as error:
            raise CheckpointError(
                f"{path} is truncated or corrupt ({error}); fetch or write it again"
            ) from error
        self.check_size()
        self.check(record for record in self.records if "/data/" not in record.filename)
        for record in self.records:
            if record.filename.endswith("/data.pkl"):
                refuse_allocators(path, self.raw(record))
        file.seek(0)

    def check_size(self) -> None:
        """Refuses an archive whose content is out of all proportion to it."""
        holds = sum(record.file_size for record in self.records)
        size = self.path.stat().st_size
        if holds > SMALL + INFLATION * size:
            raise CheckpointError(
                f"{self.path} is an archive of {size:,} bytes that unpacks to {holds:,}, which no"
                " checkpoint does; fetch or write it again"
            )

    def raw(self, record: zipfile.ZipInfo) -> bytes:
        """The bytes of a record, whatever its checksum; none of a packed one that is broken."""
        if record.compress_type == zipfile.ZIP_STORED:
            self.file.seek(self.data_start(record))
            return self.file.read(record.file_size)
        try:
            return self.archive.read(record)
        except FAILURES:
            return b""

    def data_start(self, record: zipfile.ZipInfo) -> int:
        """Where the bytes of a record begin: behind its header of 30 bytes, name and padding."""
        self.file.seek(record.header_offset + 26)
        name, padding = struct.unpack("<HH", self.file.read(4))
        return record.header_offset + 30 + name + padding

    def readinto(self, buffer: memoryview) -> int:
        """Fills the buffer from the present position; a record read as a whole is checked."""
        record = self.at.get(self.file.tell())
        count = self.file.readinto(buffer)
        if record and count == record.file_size and record.compress_type == zipfile.ZIP_STORED:
            self.whole[record.filename] = zlib.crc32(buffer) == record.CRC
        return count

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        return self.file.read(size)

    def readline(self) -> bytes:
        """As a file's."""
        return self.file.readline()

    def seek(self, *place: int) -> int:
        """As a file's."""
        return self.file.seek(*place)

    def tell(self) -> int:
        """As a file's."""
        return self.file.tell()

    def check_rest(self) -> None:
        """Reads and checks every record that has not been, and refuses the file if one is wrong."""
        self.check(record for record in self.records if record.filename not in self.whole)

    def check(self, records) -> None:
        for record in records:
            self.whole[record.filename] = checksum_holds(self.archive, record)
        broken = [name for name, whole in self.whole.items() if not whole]
        # all of them: written with torch.serialization.set_crc32_options(False)
        if broken and len(broken) < len(self.whole):
            raise CheckpointError(
                f"{self.path} is corrupt: the checksum of {broken[0]} does not hold; fetch or"
                " write it again"
            )


def checksum_holds(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    """Reads one record to the end."""
    try:
        with archive.open(record) as stream:
            while stream.read(1 << 22):
                pass
    except FAILURES:
        return False
    return True
