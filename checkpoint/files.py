"""Paths and URLs -> files on this machine."""

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlparse

import torch

from .errors import CheckpointError, first_line

SUFFIXES = (".pth", ".pt", ".safetensors")
# torch.hub's convention: name-<start of the sha256>.pth
HASHED_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")


def locate(source: str | Path) -> Path:
    """The file behind a path (`~` is the home folder) or an https URL, which is downloaded once.

    Raises: CheckpointError, one line, where there is no such file or it is empty.
    """
    path = download(source) if "://" in str(source) else Path(os.path.expanduser(source))
    try:
        check_exists(path)
    except OSError as error:  # too long a name, no permission
        raise CheckpointError(
            f"{str(path)[:200]} cannot be read: {error.strerror or error}"
        ) from error
    return path


def check_exists(path: Path) -> None:
    """Raises CheckpointError for a folder, a missing or an empty file, with what is there."""
    if path.is_dir():
        inside = weight_files(path)
        hint = f"; it holds {', '.join(inside)}" if inside else ""
        raise CheckpointError(
            f"{path} is a folder, expected a checkpoint or weights file"
            f" (.pth or .safetensors){hint}"
        )
    if not path.exists():
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        near = weight_files(parent)
        found = f"{parent} holds {', '.join(near)}"
        raise CheckpointError(
            f"{path} does not exist; "
            + (found if near else f"the nearest existing folder is {parent}")
        )
    if path.stat().st_size == 0:
        raise CheckpointError(
            f"{path} is empty (0 bytes); the write or download did not finish, fetch it again"
        )


def weight_files(folder: Path, limit: int = 5) -> list[str]:
    """Names of the first files in a folder that look like weights."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)[:limit]


def refuse_other_files(path: Path, head: bytes) -> None:
    """Raises CheckpointError where the first bytes are those of a page saved instead of a file."""
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


def download(url: str) -> Path:
    """https URL -> file in torch.hub's cache, its SHA-256 checked where the name holds one
    (name-<hash>.pth).
    """
    if not url.startswith("https://"):
        raise CheckpointError(f"{url}: only https:// URLs and paths are read")
    try:
        name = Path(urlparse(url).path).name
    except ValueError as error:  # https://[::1
        raise CheckpointError(f"{url[:200]} is no URL: {error}") from None
    if not name:
        raise CheckpointError(f"{url} names no file")
    found = HASHED_NAME.search(name)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not found:  # two sites may use one name for different files
        folder /= hashlib.sha256(url.encode()).hexdigest()[:12]
    return fetch(url, folder / name, found.group(1) if found else None)


def fetch(url: str, target: Path, digest: str | None) -> Path:
    """Downloads `url` to `target` unless it is there; `digest` is the start of its SHA-256."""
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(target), digest, progress=False)
    except (OSError, RuntimeError, ValueError) as error:
        # URLError is an OSError; a wrong hash is a RuntimeError
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
    """Of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
