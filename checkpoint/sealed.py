"""Safetensors files that carry a checksum, which the format itself does not have.

The header's metadata hold `sha256`: of the bytes behind the header, followed by the header as JSON
with sorted keys and without that entry. A flipped bit anywhere is thus told from a whole file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import CheckpointError, first_line

DIGEST = "sha256"
METADATA = "__metadata__"
BLOCK = 1 << 22


def is_safetensors(head: bytes) -> bool:
    """Whether a file's first bytes are an eight-byte header length below 4 GiB, then JSON."""
    return len(head) > 9 and head[8:9] == b"{" and head[4:8] == bytes(4)


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file with its checksum. tensors: contiguous, on the CPU, none
    sharing memory with another.
    """
    plain = memoryview(save(dict(tensors), {**metadata, DIGEST: ""}))
    start = 8 + int.from_bytes(plain[:8], "little")
    header, data = json.loads(bytes(plain[8:start])), plain[start:]
    seal = hashlib.sha256(data)
    seal.update(canonical(header))
    header[METADATA][DIGEST] = seal.hexdigest()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the format asks, for aligned tensors
    return b"".join((len(text).to_bytes(8, "little"), text, data))


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """The tensors of a safetensors file, its metadata without the checksum, and whether there was
    one. Raises: CheckpointError for a damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path, first_line(error)) from error
    stated = metadata.pop(DIGEST, None)
    if stated is not None and stated != digest(path):
        raise damaged(path, "its checksum does not hold")
    return tensors, metadata, stated is not None


def check_header(path: Path, file: BinaryIO) -> None:
    """Raises CheckpointError where the header cannot be read or states another size than the
    file has; the tensors are not read.
    """
    try:
        header, start = read_header(file)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != METADATA]
        missing = start + max(ends, default=0) - path.stat().st_size
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, first_line(error)) from error
    if missing > 0:
        raise damaged(path, f"{missing} bytes are missing at its end")


def digest(path: Path) -> str:
    """What a file's checksum should be."""
    with open(path, "rb") as file:
        header, _ = read_header(file)
        seal = hashlib.sha256()
        while block := file.read(BLOCK):
            seal.update(block)
    seal.update(canonical(header))
    return seal.hexdigest()


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors' bytes begin. Raises: ValueError."""
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length)
    if len(text) < length:
        raise ValueError(f"its header of {length} bytes is cut off")
    return json.loads(text), 8 + length


def canonical(header: Mapping[str, Any]) -> bytes:
    """The header without its checksum, in one form whatever the order and the blanks."""
    metadata = {name: text for name, text in header[METADATA].items() if name != DIGEST}
    return json.dumps({**header, METADATA: metadata}, sort_keys=True).encode()


def damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a damaged safetensors file ({reason}); fetch or write it again"
    )
