"""Which checkpoint a run goes on from, and going on from it."""

import logging
from pathlib import Path
from typing import Any

from engine.state import (
    CheckpointError,
    TrainState,
    config_changes,
    foreign,
    holds_state,
    newest,
    read,
)
from engine.trainer import Trainer
from utils import World

LOGGER = logging.getLogger(__name__)


def choose(folder: Path, explicit: Path | None, auto: bool, world: World) -> Path | None:
    """The checkpoint to go on from; None: a new run. Decided on the main process for all.

    A run that is started again with the same command goes on where it was: the output folder's
    furthest checkpoint comes before an explicit one from elsewhere. An explicit one of the output
    folder itself is taken at its word.
    Raises: CheckpointError where the explicit file is missing, or the folder holds damaged
        checkpoints only.
    """
    if explicit is not None and not explicit.is_file():
        raise CheckpointError(f"--resume {explicit}: no such file")
    path = explicit
    if world.is_main and not auto and (folder / "last.pth").exists():
        LOGGER.warning(
            "TRAIN.AUTO_RESUME is False: the checkpoints in %s will be written over", folder
        )
    if world.is_main and auto and not (explicit and explicit.resolve().parent == folder.resolve()):
        found = newest(folder)
        if found and explicit:
            LOGGER.warning(
                "going on with this output folder's own %s, not with --resume %s", found, explicit
            )
        path = found or explicit
    return world.broadcast(path)


def resume(trainer: Trainer, path: Path, config: dict[str, Any], batches_per_epoch: int) -> None:
    """Goes on from a file: a checkpoint of this program, one of the reference, or weights alone;
    the latter two are loaded already.

    Reports where the run stands, and which settings have changed since.
    Raises: CheckpointError.
    """
    if not holds_state(path):
        return adopt(trainer, path, batches_per_epoch)
    saved = read(path)
    for line in config_changes(saved.get("config", {}), config):
        LOGGER.warning("resuming with a changed setting, the new one holds: %s", line)
    trainer.restore(saved)
    state = trainer.state
    LOGGER.info(
        "resumed from %s: epoch %d, batch %d, %d updates done, best accuracy %.2f%%",
        path,
        state.epoch,
        state.batch,
        state.update,
        state.best,
    )
    return None


def adopt(trainer: Trainer, path: Path, batches_per_epoch: int) -> None:
    """Goes on from what the reference saved beside the weights (optimizer, epoch, max_accuracy,
    scaler), which are loaded already.

    Its random states were never saved, so the continued run is not exact. A file of weights alone
    starts at the first epoch.
    """
    raw = foreign(path)
    if not {"optimizer", "epoch"} <= raw.keys():
        LOGGER.warning(
            "%s holds weights alone: training starts at epoch %d with them",
            path,
            trainer.state.epoch,
        )
        return
    accumulation, epoch = trainer.layout.accumulation, int(raw["epoch"]) + 1
    trainer.optimizer.load_state_dict(raw["optimizer"])
    if trainer.scaler.is_enabled() and raw.get("scaler"):
        trainer.scaler.load_state_dict(raw["scaler"])
    trainer.state = TrainState(
        epoch=epoch,
        update=epoch * (batches_per_epoch // accumulation),
        best=float(raw.get("max_accuracy", 0.0)),
        best_epoch=epoch - 1,
    )
    trainer.scheduler.step_update((epoch * batches_per_epoch - 1) // accumulation)
    LOGGER.info(
        "resumed the reference's checkpoint %s: epoch %d, best accuracy %.2f%%",
        path,
        epoch,
        trainer.state.best,
    )
