"""Files of a run that a kill, a full disk or a hand has left out: written again where the run goes
on, so that what is named is there.
"""

import logging
from pathlib import Path

from checkpoint import TRAINING, Checkpoint, CheckpointError, peek_checkpoint, read_checkpoint
from engine.state import CheckpointFolder, TrainState, copy_whole, epoch_files
from engine.train import best_weights

LOGGER = logging.getLogger(__name__)


def repair(
    folder: CheckpointFolder, checkpoint: Checkpoint, state: TrainState, epochs: int, averaged: bool
) -> None:
    """Writes ckpt_epoch_{e}.pth, best.pth and model.safetensors again where they are due and
    missing, or of another epoch than the checkpoint says.

    Args:
        checkpoint: the run goes on from it.
        state: the position in it.
        epochs: of the run.
        averaged: the average of the weights decides which epoch is the best.
    """
    if checkpoint.kind != TRAINING:
        return
    at_end = state.batch == 0 and state.epoch > 0
    if at_end and checkpoint.path.resolve().parent == folder.folder.resolve():
        restore_epoch(folder, checkpoint.path, state.epoch - 1, last=state.epoch >= epochs)
    if state.best_epoch < 0:
        return
    newest = at_end and state.best_epoch == state.epoch - 1
    if not folder.holds_best(state.best_epoch, state.best):
        source = checkpoint.path if newest else epoch_of_best(folder.folder, state)
        if source is None:
            return
        LOGGER.warning("%s was missing or of another epoch: it is again %s", folder.best, source)
        copy_whole(source, folder.best)
    if not folder.holds_weights(state.best_epoch, state.best):
        best = checkpoint if newest else read_checkpoint(folder.best)
        weights, about = best_weights(best.training_state(), averaged and best.has_average)
        LOGGER.warning("%s was missing or of another epoch: written again", folder.weights)
        folder.write_weights(weights, about)


def restore_epoch(folder: CheckpointFolder, source: Path, epoch: int, last: bool) -> None:
    """Keeps `source` as the checkpoint of a finished epoch, if one is due and not there."""
    due = last or epoch % folder.save_freq == 0
    target = folder.of_epoch(epoch)
    if due and not target.exists():
        LOGGER.warning("%s was missing: it is again %s", target, source)
        copy_whole(source, target)


def epoch_of_best(folder: Path, state: TrainState) -> Path | None:
    """The checkpoint of the best epoch's end, if it is among those that are kept."""
    for epoch, path in epoch_files(folder):
        if epoch != state.best_epoch:
            continue
        try:
            progress = peek_checkpoint(path).training_state()["progress"]
        except CheckpointError:
            return None
        found = (progress["best_epoch"], progress["best"], progress["epoch"], progress["batch"])
        return path if found == (epoch, state.best, epoch + 1, 0) else None
    return None
