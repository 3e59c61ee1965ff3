"""Weights files -> `Weights`, a dict of tensors that remembers where it came from. Nothing in a
file is ever executed.
"""

import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

ENTRIES = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_ema",
    "state_dict_ema",
    "ema",
    "net",
    "weights",
)
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, Lightning
HASHED_NAME = re.compile(
    r"-([0-9a-f]{8,64})\.[a-z]+$"
)  # torch.hub's convention: name-<start of the sha256>.pth
LOAD_FAILURES = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


class Weights(dict):
    """{key: tensor} plus what the file said about itself.

    source: path or URL, for messages. entry: the part of the file that was taken, None for a bare
        dict; others: what else it offers.
    metadata: plain data beside the weights (safetensors' header; `config`, `metadata` and `epoch`
        of a training checkpoint).
    modules: names of the modules that wrote the dict if torch recorded them
        (`state_dict()._metadata`), else None.
    """

    def __init__(
        self, tensors=(), source="a state dict", entry=None, metadata=None, modules=None, others=()
    ):
        super().__init__(tensors)
        self.source, self.entry, self.metadata, self.modules, self.others = (
            source,
            entry,
            dict(metadata or {}),
            modules,
            others,
        )


class Values(dict):
    """Stands in for a pickled argparse.Namespace: holds its values, has none of its behaviour."""

    def __setstate__(self, state):
        """A namespace keeps its values in the instance's state."""
        self.update(state)


# torch's restricted unpickler fills plain and ordered dicts only, so a yacs node becomes an ordered
# one (its flags become attributes).
STAND_INS = [(OrderedDict, "yacs.config.CfgNode"), (Values, "argparse.Namespace")]


def read_weights(path_or_url, entry: str | None = None) -> Weights:
    """Reads .pth (pickle, restricted to tensors and plain data) or .safetensors, from disk or an
    https URL, onto the CPU.

    entry: which part of a wrapped file to take ('model', 'model_ema', ...); by default the first
    found of `ENTRIES`. The format is told by the file's content, not by its name. Prefixes that
    wrappers add to every key are removed.
    Raises: CheckpointError, one line, for a missing, empty, truncated, corrupt or unsafe file, or
        one without weights.
    """
    source = str(path_or_url)
    path = download(source) if "://" in source else Path(source).expanduser()
    check_readable(path)
    with open(path, "rb") as file:
        head = file.read(512)
    refuse_non_weights(path, head)
    if is_safetensors(head):
        return read_safetensors(path, source)
    return unwrap(read_pickle(path, head), source, entry)


def check_readable(path: Path) -> None:
    if path.is_dir():
        inside = sorted(
            p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".safetensors")
        )
        hint = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise CheckpointError(
            f"{path} is a folder, expected a weights file (.pth or .safetensors){hint}"
        )
    if not path.exists():
        parent = next(p for p in [*path.absolute().parents] if p.exists())
        near = sorted(
            p.name for p in parent.iterdir() if p.suffix in (".pth", ".pt", ".safetensors")
        )[:5]
        found = (
            f"; {parent} holds {', '.join(near)}"
            if near
            else f"; the nearest existing folder is {parent}"
        )
        raise CheckpointError(f"{path} does not exist{found}")
    if path.stat().st_size == 0:
        raise CheckpointError(
            f"{path} is empty (0 bytes); the write or download did not finish, fetch it again"
        )


def refuse_non_weights(path: Path, head: bytes) -> None:
    start = head.lstrip()[:60].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{path} is a web page, not weights: the download saved an error or login page; fetch"
            " the file itself"
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the weights; run 'git lfs pull' where it was cloned"
        )


def is_safetensors(head: bytes) -> bool:
    """An eight-byte header length, then JSON."""
    return len(head) > 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32


def read_safetensors(path: Path, source: str) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is a damaged safetensors file ({first_line(error)}); fetch or write it again"
        ) from error
    return Weights(strip_wrappers(tensors, source), source, metadata=metadata)


def read_pickle(path: Path, head: bytes):
    """What torch.save wrote, under weights_only: classes other than tensors, plain data and the
    stand-ins are refused.
    """
    if head.startswith(b"PK"):
        check_archive(path)
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_FAILURES as error:
        raise CheckpointError(explain(path, error)) from error


def explain(path: Path, error: BaseException) -> str:
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


def first_line(error: BaseException) -> str:
    text = (
        str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
    )  # torch puts two lines of advice before it
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


def check_archive(path: Path) -> None:
    """The archive is whole and its checksums hold. torch.load itself does not notice a flipped
    bit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            broken = [record.filename for record in records if not checksum_holds(archive, record)]
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is truncated or corrupt ({error}); fetch or write it again"
        ) from error
    if broken and len(broken) < len(
        records
    ):  # all of them: written with torch.serialization.set_crc32_options(False)
        raise CheckpointError(
            f"{path} is corrupt: the checksum of {broken[0]} does not hold; fetch or write it again"
        )


def checksum_holds(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as stream:
            while stream.read(1 << 22):
                pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError):
        return False
    return True


def unwrap(loaded, source: str = "a state dict", entry: str | None = None) -> Weights:
    """Bare or wrapped dict -> Weights: finds the state dict, keeps the plain data beside it, strips
    wrappers' prefixes.
    """
    if isinstance(loaded, Weights):
        return loaded
    outer, taken = loaded, None
    while isinstance(loaded, Mapping) and not is_state_dict(loaded):
        key = pick_entry(loaded, source, entry if taken is None else None)
        loaded, taken = loaded[key], key if taken is None else f"{taken}.{key}"
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(loaded).__name__}, expected a dict of tensors or {{'model':"
            " dict of tensors}"
        )
    modules = getattr(loaded, "_metadata", None)
    metadata = {
        key: plain(outer[key])
        for key in ("metadata", "config", "epoch", "args")
        if taken and key in outer
    }
    others = [key for key in offered(outer) if taken and key != taken.split(".")[0]]
    return Weights(
        strip_wrappers(loaded, source),
        source,
        taken,
        metadata,
        list(modules) if modules else None,
        others,
    )


def is_state_dict(loaded: Mapping) -> bool:
    return (
        len(loaded) > 0
        and sum(torch.is_tensor(value) for value in loaded.values()) > len(loaded) / 2
    )


def plain(value):
    """Ordered dicts and stand-ins as plain dicts."""
    return (
        {key: plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
    )


def offered(loaded: Mapping) -> list[str]:
    return [key for key in ENTRIES if isinstance(loaded.get(key), Mapping) and loaded[key]]


def pick_entry(loaded: Mapping, source: str, entry: str | None) -> str:
    if entry is None and (candidates := offered(loaded)):
        return candidates[0]
    if entry in loaded and isinstance(loaded[entry], Mapping):
        return entry
    holds = ", ".join(map(str, list(loaded)[:8])) or "nothing"
    wanted = f"no entry '{entry}'" if entry else f"no weights under {', '.join(ENTRIES)}"
    raise CheckpointError(f"{source} has {wanted}; it holds {holds}")


def strip_wrappers(state: Mapping, source: str) -> dict:
    """Removes the prefixes that every key carries, `_orig_mod.` wherever it stands, and values that
    are not tensors.
    """
    state = {
        key.replace("_orig_mod.", ""): value
        for key, value in state.items()
        if torch.is_tensor(value) and key != "n_averaged"
    }
    for prefix in WRAPPERS * 2:  # twice: compiled inside a wrapper, or the other way round
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if not state:
        raise CheckpointError(f"{source} holds no tensors")
    return state


def download(url: str) -> Path:
    """https URL -> file in torch.hub's cache, its SHA-256 checked where the name holds one
    (name-<hash>.pth).
    """
    if not url.startswith("https://"):
        raise CheckpointError(f"{url}: only https:// URLs and paths are read")
    name = Path(urlparse(url).path).name
    if not name:
        raise CheckpointError(f"{url} names no file")
    found = HASHED_NAME.search(name)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not found:  # two sites may use one name for different files
        folder /= hashlib.sha256(url.encode()).hexdigest()[:12]
    return fetch(url, folder / name, found.group(1) if found else None)


def fetch(url: str, target: Path, digest: str | None) -> Path:
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(target), digest, progress=False)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise CheckpointError(
            f"cannot download {url} ({first_line(error)}); fetch it by hand and give its path"
        ) from error
    if digest and not sha256(target).startswith(digest):
        raise CheckpointError(
            f"{target} (from {url}) does not have the SHA-256 its name states; delete it and try"
            " again"
        )
    return target


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def decode(value):
    """A metadata value as plain data: safetensors stores strings only, so lists arrive as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
