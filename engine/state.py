"""The files of a training run: what is in a checkpoint, and how it is written whole.

    last.pth            after every epoch, and every TRAIN.SAVE_STEPS updates inside one
    ckpt_epoch_{e}.pth  after epoch e, every SAVE_FREQ epochs; the newest TRAIN.KEEP of them stay
    best.pth            after the epoch with the highest accuracy
    model.safetensors   the weights of best.pth alone

A checkpoint is a dictionary of tensors and plain data that loads under
`torch.load(..., weights_only=True)`:
model, ema, optimizer, lr_scheduler, scaler, progress (`TrainState`), layout (`Layout`), ranks
(random states of every process), config. `checkpoint.schema` has its types and ranges. Each record
of the file carries a checksum, so a damaged file is told from a whole one.
"""

import logging
import re
import shutil
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from checkpoint import FORMAT, TRAINING, CheckpointError, peek_checkpoint
from checkpoint.sealed import sealed
from utils import atomic_write, prepare_folder

LOGGER = logging.getLogger(__name__)
EPOCH_FILE = re.compile(r"ckpt_epoch_(\d+)\.pth")


@dataclass
class TrainState:
    """Where a run stands. epoch: the one under way, from 0. batch: micro-batches of it that every
    process has used up.

    update: optimizer updates since the beginning.
    best: highest accuracy of an epoch so far, in percent, reached in best_epoch (-1: none yet).
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


class CheckpointFolder:
    """Writes the checkpoints of one run. save_freq: epochs between two ckpt_epoch files; keep: how
    many of them stay, 0 all; check: called before each save, raises where the folder is another
    run's.
    """

    def __init__(
        self,
        folder: Path,
        save_freq: int = 1,
        keep: int = 3,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.check = check
        self.folder = Path(folder)
        self.save_freq = save_freq
        self.keep = keep
        self.last = self.folder / "last.pth"
        self.best = self.folder / "best.pth"
        self.weights = self.folder / "model.safetensors"
        self._newest = self.last  # what the other files are copies of

    def save(self, payload: dict[str, Any], copies: Callable[[], None] = lambda: None) -> None:
        """Writes last.pth. copies: keeps it under more names, by the methods below.

        They come before last.pth takes its name: where a kill or a full disk ends them, the state
        before stays the last one, and what it goes on with writes them again. A folder that someone
        has deleted is made again, so that nothing is lost but what was in it.
        """
        if not self.folder.is_dir():
            LOGGER.warning("%s was deleted during the run; it is made again", self.folder)
            prepare_folder(self.folder)
        self.check()
        with atomic_write(self.last) as file:
            try:
                torch.save({"format": FORMAT, **payload}, file)
            except RuntimeError as error:  # torch hides what the system said
                raise OSError(0, f"writing failed ({str(error).splitlines()[0]})") from error
            file.flush()
            self._newest = Path(file.name)
            try:
                copies()
            finally:
                self._newest = self.last

    def keep_epoch(self, epoch: int, last: bool = False) -> None:
        """Keeps what is saved as the checkpoint of a finished epoch, if one is due (`last`: the
        final one always is).
        """
        if last or epoch % self.save_freq == 0:
            copy_whole(self._newest, self.of_epoch(epoch))
            self._drop_old(epoch)

    def of_epoch(self, epoch: int) -> Path:
        """Where the checkpoint of a finished epoch lies, if it was due."""
        return self.folder / f"ckpt_epoch_{epoch}.pth"

    def keep_best(self, weights: dict[str, torch.Tensor], **about: Any) -> None:
        """Keeps what is saved as the best one, and its weights as model.safetensors with `about` in
        the header.
        """
        copy_whole(self._newest, self.best)
        self.write_weights(weights, about)

    def write_weights(self, weights: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        """Writes model.safetensors, with `about` in its header."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        header = {"format": "pt", **{key: str(value) for key, value in about.items()}}
        with atomic_write(self.weights) as file:
            file.write(sealed(tensors, header))

    def holds_best(self, epoch: int, accuracy: float) -> bool:
        """Whether best.pth is that of this epoch with this accuracy."""
        try:
            progress = peek_checkpoint(self.best).training_state()["progress"]
        except CheckpointError:
            return False
        return (progress["best_epoch"], progress["best"]) == (epoch, accuracy)

    def holds_weights(self, epoch: int, accuracy: float) -> bool:
        """Whether model.safetensors says that it is of this epoch with this accuracy."""
        try:
            with safe_open(self.weights, "pt") as file:
                about = file.metadata() or {}
        except (OSError, SafetensorError):
            return False
        return (about.get("epoch"), about.get("accuracy")) == (str(epoch), str(accuracy))

    def _drop_old(self, epoch: int) -> None:
        if not self.keep:
            return
        older = {number: path for number, path in epoch_files(self.folder) if number < epoch}
        for number in sorted(older)[: max(0, len(older) + 1 - self.keep)]:
            # other programs use these names too: theirs are never deleted
            if _is_training_state(older[number]):
                older[number].unlink()


def epoch_files(folder: Path) -> list[tuple[int, Path]]:
    """The numbers and paths of all ckpt_epoch_{e}.pth of a folder, by name."""
    named = [(EPOCH_FILE.fullmatch(path.name), path) for path in folder.glob("ckpt_epoch_*.pth")]
    found = [(int(match[1]), path) for match, path in named if match]
    return sorted(found, key=lambda entry: entry[1])


def _is_training_state(path: Path) -> bool:
    try:
        return peek_checkpoint(path).kind == TRAINING
    except CheckpointError:
        return False


def copy_whole(source: Path, target: Path) -> None:
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
