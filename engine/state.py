"""The files of a training run: what is in a checkpoint, how it is written whole, and which one a
run goes on from.

    last.pth            after every epoch, and every TRAIN.SAVE_STEPS updates inside one
    ckpt_epoch_{e}.pth  after epoch e, every SAVE_FREQ epochs; the newest TRAIN.KEEP of them stay
    best.pth            after the epoch with the highest accuracy
    model.safetensors   the weights of best.pth alone

A checkpoint is a dictionary of tensors and plain data that loads under
`torch.load(..., weights_only=True)`:
model, ema, optimizer, lr_scheduler, scaler, progress (`TrainState`), layout (`Layout`), ranks
(random states of every process), config. Each record of the file carries a checksum, so a damaged
file is told from a whole one.
"""

import logging
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from utils import RunError, atomic_write

LOGGER = logging.getLogger(__name__)
FORMAT = 1
EPOCH_FILE = re.compile(r"ckpt_epoch_(\d+)\.pth")
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    NotImplementedError,
    OverflowError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged, or not one of this run's kind."""


@dataclass
class TrainState:
    """Where a run stands. epoch: the one under way, from 0. batch: micro-batches of it that every
    process has used up.

    update: optimizer updates since the beginning. best: highest accuracy of an epoch so far, in
    percent, reached in best_epoch (-1: none yet).
    """

    epoch: int = 0
    batch: int = 0
    update: int = 0
    best: float = 0.0
    best_epoch: int = -1


@dataclass(frozen=True)
class Layout:
    """How a global batch is spread: images of a micro-batch on one process, processes,
    micro-batches of an update.
    """

    batch_size: int
    world_size: int
    accumulation: int

    @property
    def images(self) -> int:
        """Images of one update over all processes."""
        return self.batch_size * self.world_size * self.accumulation

    def updates(self, loader: Sized) -> int:
        """Updates of an epoch of this loader."""
        return len(loader) // self.accumulation

    def __str__(self) -> str:
        return (
            f"{self.images} images ({self.world_size} processes x {self.batch_size} x"
            f" {self.accumulation} accumulated)"
        )


def place(state: TrainState, saved: Layout, now: Layout) -> TrainState:
    """The saved position counted in micro-batches of another layout.

    Raises: CheckpointError inside an epoch where an update holds another number of images, since
        then it cannot be met.
    """
    if state.batch == 0 or saved == now:
        return state
    if saved.images != now.images:
        raise CheckpointError(
            f"the checkpoint was saved inside epoch {state.epoch} with updates of {saved}; this run"
            f" has {now}: keep {saved.images} images an update, or resume from a ckpt_epoch_*.pth"
            " (end of an epoch)"
        )
    return replace(
        state,
        batch=state.batch
        * saved.batch_size
        * saved.world_size
        // (now.batch_size * now.world_size),
    )


def read(path: str | Path) -> dict[str, Any]:
    """A whole checkpoint, on the CPU. Raises: CheckpointError, one line, where it is missing,
    damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except DAMAGE as error:
        raise CheckpointError(
            f"checkpoint {path}: damaged or incomplete ({path.stat().st_size} bytes; {error})"
        ) from error
    if broken:
        raise CheckpointError(
            f"checkpoint {path}: damaged (checksum of its record {broken} is wrong)"
        )
    return _unpickle(path, mmap=False)


def peek(path: Path) -> TrainState:
    """The position stored in a checkpoint, without reading its tensors. Raises: CheckpointError."""
    return TrainState(**_unpickle(path, mmap=True)["progress"])


def _unpickle(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path}: cannot be read ({reason})") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: holds no training state of this program, only weights at most; "
            "start from its weights with --pretrained"
        )
    return payload


def foreign(path: Path) -> dict[str, Any]:
    """All of a checkpoint of the reference (model, optimizer, epoch, ...); {} for a file that holds
    no such dictionary.

    Its pickled yacs node becomes an ordered dictionary, one of the few types that torch's
    restricted reader fills.
    """
    try:
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE:
        return {}
    return content if isinstance(content, dict) else {}


def holds_state(path: str | Path) -> bool:
    """Whether a file is a training checkpoint of this program, as far as its first record tells."""
    try:
        return bool(peek(Path(path)))
    except CheckpointError:
        return False


def has_average(path: str | Path) -> bool:
    """Whether a file is a training checkpoint of this program with averaged weights in it."""
    return holds_state(path) and _unpickle(Path(path), mmap=True)["ema"] is not None


def newest(folder: Path) -> Path | None:
    """The furthest checkpoint of a folder that is whole, judged by its content; None where the
    folder has none at all.

    Damaged ones on the way are named in a warning and left alone.
    Raises: CheckpointError where there are checkpoints but none is whole: starting anew would write
        over them.
    """
    paths = _checkpoints(folder)
    for path in _furthest_first(paths):
        try:
            read(path)
        except CheckpointError as error:
            LOGGER.warning("SKIPPED in auto-resume: %s", error)
            continue
        return path
    if paths:
        raise CheckpointError(
            f"{folder} holds {len(paths)} checkpoint(s) and none can be used (the newest problem:"
            " see the lines above): move them away, or choose another --output or --tag"
        )
    return None


def _checkpoints(folder: Path) -> list[Path]:
    named = [folder / "last.pth", folder / "best.pth"]
    return [path for path in named if path.exists()] + sorted(
        p for p in folder.glob("ckpt_epoch_*.pth") if EPOCH_FILE.fullmatch(p.name)
    )


def _furthest_first(paths: list[Path]) -> list[Path]:
    """Readable ones by updates done, most first, at equality in the given order; unreadable ones
    are named in a warning.
    """
    updates = {}
    for path in paths:
        try:
            updates[path] = peek(path).update
        except CheckpointError as error:
            LOGGER.warning("SKIPPED in auto-resume: %s", error)
    return sorted(updates, key=updates.get, reverse=True)


class CheckpointFolder:
    """Writes the checkpoints of one run. save_freq: epochs between two ckpt_epoch files; keep: how
    many of them stay, 0 all.
    """

    def __init__(self, folder: Path, save_freq: int = 1, keep: int = 3) -> None:
        self.folder, self.save_freq, self.keep = Path(folder), save_freq, keep
        self.last, self.best = self.folder / "last.pth", self.folder / "best.pth"

    def save(self, payload: dict[str, Any]) -> None:
        """Writes last.pth."""
        with atomic_write(self.last) as file:
            try:
                torch.save({"format": FORMAT, **payload}, file)
            except RuntimeError as error:  # torch hides what the system said
                raise OSError(0, f"writing failed ({str(error).splitlines()[0]})") from error

    def keep_epoch(self, epoch: int, last: bool = False) -> None:
        """Keeps last.pth as the checkpoint of a finished epoch, if one is due (`last`: the final
        one always is).
        """
        if last or epoch % self.save_freq == 0:
            _copy(self.last, self.folder / f"ckpt_epoch_{epoch}.pth")
            self._drop_old(epoch)

    def keep_best(self, weights: dict[str, torch.Tensor], **about: Any) -> None:
        """Keeps last.pth as the best one, and its weights as model.safetensors with `about` in the
        header.
        """
        _copy(self.last, self.best)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        with atomic_write(self.folder / "model.safetensors") as file:
            file.write(
                safetensors_bytes(
                    tensors, {"format": "pt", **{key: str(value) for key, value in about.items()}}
                )
            )

    def _drop_old(self, epoch: int) -> None:
        ours = {
            int(EPOCH_FILE.fullmatch(p.name)[1]): p
            for p in _checkpoints(self.folder)
            if EPOCH_FILE.fullmatch(p.name)
        }
        old = sorted(number for number in ours if number < epoch)
        for number in old[: max(0, len(old) + 1 - self.keep)] if self.keep else []:
            if holds_state(
                ours[number]
            ):  # other programs use these names too: theirs are never deleted
                ours[number].unlink()


def _copy(source: Path, target: Path) -> None:
    """A second copy on disk (not a link: damage to one file must not reach the other)."""
    with open(source, "rb") as reader, atomic_write(target) as writer:
        shutil.copyfileobj(reader, writer, 2**20)


def config_changes(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `KEY: saved -> now` for every entry of two nested dictionaries that differs."""
    lines = []
    for key in sorted({*saved, *now}, key=str):
        old, new, name = saved.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            lines += config_changes(old, new, f"{name}.")
        elif old != new:
            lines.append(f"{name}: {old} -> {new}")
    return lines
