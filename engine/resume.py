"""Which checkpoint a run goes on from, and going on from it."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpoint import (
    SWIN,
    TRAINING,
    Checkpoint,
    CheckpointError,
    locate,
    peek_checkpoint,
    read_checkpoint,
)
from engine.state import TrainState, epoch_files
from engine.trainer import Trainer
from utils import World

LOGGER = logging.getLogger(__name__)
# Settings that decide which parameters have a gradient.
TRAINED_BY = ("MODEL.", "TRAIN.DISTILL.")


def choose(
    folder: Path, explicit: str | Path | None, auto: bool, world: World
) -> Checkpoint | None:
    """The checkpoint to go on from, read; None: a new run. Decided on the main process for all.

    A run that is started again with the same command goes on where it was: the output folder's
    furthest checkpoint comes before an explicit one from elsewhere. An explicit one of the output
    folder itself is taken at its word.

    Args:
        explicit: path or URL given by the user, "" or None for none.
        auto: look into the folder.
    Raises: CheckpointError where the explicit file is missing or cannot be read, or the folder
        holds damaged checkpoints only.
    """
    path = locate(explicit) if explicit else None
    inside = path is not None and path.resolve().parent == folder.resolve()
    found = None
    if world.is_main and auto and not inside:
        found = newest(folder)
    if world.is_main and not auto and (folder / "last.pth").exists():
        LOGGER.warning(
            "TRAIN.AUTO_RESUME is False: the checkpoints in %s will be written over", folder
        )
    if found and path:
        LOGGER.warning(
            "going on with this output folder's own %s, not with --resume %s", found.path, path
        )
    world.meet("the choice of a checkpoint")
    path = world.broadcast(found.path if found else path)
    if found or path is None:
        return found
    return read_checkpoint(path)


def newest(folder: Path) -> Checkpoint | None:
    """The furthest whole training state of a folder, judged by its content; None where the folder
    has no checkpoint at all.

    last.pth is read as a whole, the others only where they are further or it cannot be used. Those
    that cannot be used, or were left by another run than last.pth's (TRAIN.AUTO_RESUME False began
    anew in its folder), are named in a warning and left alone.
    Raises: CheckpointError where there are checkpoints but none is whole: starting anew would write
        over them.
    """
    last = _usable(folder / "last.pth", read_checkpoint)
    done = _updates(last) if last else -1
    paths = [folder / "best.pth", *(path for _, path in epoch_files(folder))]
    others = [_usable(path, peek_checkpoint) for path in paths]
    further = [other for other in others if other and _updates(other) > done]
    for other in sorted(further, key=_updates, reverse=True):
        if last and _run(other) != _run(last):
            LOGGER.warning("SKIPPED in auto-resume: %s is of an earlier run", other.path)
        elif found := _usable(other.path, read_checkpoint):
            return found
    present = sum(path.exists() for path in [folder / "last.pth", *paths])
    if present and last is None:
        raise CheckpointError(
            f"{folder} holds {present} checkpoint(s) and none can be used (the newest problem: see"
            " the lines above): move them away, or choose another --output or --tag"
        )
    return last


def _usable(path: Path, reader: Callable[[Path], Checkpoint]) -> Checkpoint | None:
    """A whole training state of this program; None, with a warning, for any other file, and None
    where there is no file.
    """
    if not path.exists():
        return None
    try:
        checkpoint = reader(path)
        checkpoint.training_state()
    except CheckpointError as error:
        LOGGER.warning("SKIPPED in auto-resume: %s", error)
        return None
    return checkpoint


def earlier_runs(folder: Path) -> int:
    """How many runs have begun in this folder, by its checkpoints: the number of a new one."""
    paths = [folder / "last.pth", folder / "best.pth", *(path for _, path in epoch_files(folder))]
    found = [_usable(path, peek_checkpoint) for path in paths]
    return max((_run(checkpoint) + 1 for checkpoint in found if checkpoint), default=0)


def _run(checkpoint: Checkpoint) -> int:
    """The number, in its folder, of the run that a training state is of."""
    number = checkpoint.training_state().get("logs", {}).get("run", 0)
    return number if isinstance(number, int) else 0


def _updates(checkpoint: Checkpoint) -> int:
    return checkpoint.training_state()["progress"]["update"]


def resume(
    trainer: Trainer, checkpoint: Checkpoint, changes: Sequence[str], batches_per_epoch: int
) -> None:
    """Goes on from a training state of this program, or from one of Swin's or weights alone, whose
    weights are loaded already, and reports where the run stands.

    changes: lines "KEY: old -> new" of what the run of a training state had otherwise.
    Raises: CheckpointError.
    """
    if checkpoint.kind == TRAINING:
        resume_training(trainer, checkpoint, changes, batches_per_epoch)
    elif checkpoint.kind == SWIN:
        resume_swin(trainer, checkpoint, batches_per_epoch)
    else:
        LOGGER.warning(
            "%s is no training state of this program or of Swin: its weights alone are taken, and"
            " training starts at epoch %d with them",
            checkpoint.source,
            trainer.state.epoch,
        )


def resume_training(
    trainer: Trainer, checkpoint: Checkpoint, changes: Sequence[str], batches_per_epoch: int
) -> None:
    """Goes on, bit by bit, from a training state of this program."""
    for line in changes:
        LOGGER.warning("resuming with a changed setting, the new one holds: %s", line)
    trainer.restore(checkpoint.training_state())
    if trainer.state.batch > batches_per_epoch:
        raise CheckpointError(
            f"{checkpoint.source} was saved after {trainer.state.batch} batches of epoch"
            f" {trainer.state.epoch}, and an epoch of these images has {batches_per_epoch}; resume"
            " from a ckpt_epoch_*.pth (end of an epoch)"
        )
    if any(line.startswith(TRAINED_BY) for line in changes):
        trainer.without_moments = []
    state = trainer.state
    LOGGER.info(
        "resumed from %s: epoch %d, batch %d, %d updates done, best accuracy %.2f%%",
        checkpoint.source,
        state.epoch,
        state.batch,
        state.update,
        state.best,
    )


def resume_swin(trainer: Trainer, checkpoint: Checkpoint, batches_per_epoch: int) -> None:
    """Goes on from what Swin saved beside the weights: optimizer, epoch, max_accuracy, scaler.

    Its random states were never saved, so the continued run is not exact.
    """
    saved = checkpoint.swin_state()
    epoch = saved["epoch"] + 1
    accumulation = trainer.layout.accumulation
    trainer.restore_optimizer(saved["optimizer"], saved.get("scaler"))
    trainer.state = TrainState(
        epoch=epoch,
        update=epoch * (batches_per_epoch // accumulation),
        best=float(saved.get("max_accuracy", 0.0)),
        best_epoch=epoch - 1,
    )
    trainer.scheduler.step_update((epoch * batches_per_epoch - 1) // accumulation)
    LOGGER.info(
        "resumed Swin's checkpoint %s: epoch %d, best accuracy %.2f%%",
        checkpoint.source,
        epoch,
        trainer.state.best,
    )
