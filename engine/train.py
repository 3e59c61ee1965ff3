"""The loop around the update: epochs, validation, checkpoints, and when to stop."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from checkpoint import names_as_metadata
from engine.evaluate import EvalResult, NoScoreError
from engine.guard import DivergedError
from engine.report import Report
from engine.signals import StopSignal
from engine.state import CheckpointFolder, TrainState
from engine.trainer import Batch, Trainer
from registry import UserError


@dataclass(frozen=True)
class Plan:
    """When to do what.

    epochs: in all.
    save_steps: updates between two checkpoints inside an epoch, 0 none.
    max_steps: updates in all, 0 no limit.
    max_nonfinite: updates skipped in a row before the run ends with an error.
    """

    epochs: int
    save_steps: int = 0
    max_steps: int = 0
    max_nonfinite: int = 20


# (network, averaged: whether it is the average, stop) -> result; None where a signal ended it.
Evaluate = Callable[..., EvalResult | None]


def fit(
    trainer: Trainer,
    loader: Any,
    evaluate: Evaluate,
    *,
    plan: Plan,
    folder: CheckpointFolder,
    report: Report,
    stop: StopSignal,
    extra: dict[str, Any] | None = None,
) -> int:
    """Trains from `trainer.state` to the plan's end; after each epoch saves, validates, and saves
    what that has changed, so that neither a signal nor a failure in a validation loses an epoch.

    Args:
        loader: len() batches an epoch, .epoch(epoch, start_batch) yields them.
        evaluate: network -> result on the validation images, see `Evaluate`.
        extra: plain data for every checkpoint (the config).
    Returns: 0, or the number of the signal that ended the run early (its state is saved).
    Raises: DivergedError.
    """
    state = trainer.state
    extra = extra or {}
    while state.epoch < plan.epochs and not complete(plan, state):
        before = state.update
        signal = train_epoch(trainer, loader, plan, folder, report, stop, extra)
        if signal or state.update > before:
            save(trainer, folder, extra)
        if signal:
            return signal
        score = validate(trainer, evaluate, report, stop)
        if score is None:
            return stop.agree()
        improved = improves(state, score)
        if improved:
            state.best = score
            state.best_epoch = state.epoch
        report.best(state)
        finished = end_of_epoch(trainer, loader)
        final = state.epoch == plan.epochs
        save(trainer, folder, extra, finished=finished, improved=improved, final=final)
        if finished is None:
            return 0
        signal = 0 if final else stop.agree()
        if signal:
            return signal
    return 0


def train_epoch(
    trainer: Trainer,
    loader: Any,
    plan: Plan,
    folder: CheckpointFolder,
    report: Report,
    stop: StopSignal,
    extra: dict[str, Any],
) -> int:
    """The rest of the current epoch. Returns the signal that all processes agreed to stop for, or
    0.
    """
    state = trainer.state
    if state.batch == 0:
        trainer.statistics.start_epoch()
    report.start_epoch(state)
    trainer.parallel.train()
    begun = state.update

    def rescue() -> None:
        """Alone, a run can save what it did; in a group the others are waiting in an update."""
        if trainer.world.size == 1 and state.update > begun:
            save(trainer, folder, extra)

    for window in saved_first(ahead(trainer, loader, plan, stop), rescue):
        trainer.update(window)
        trainer.advance(len(loader))
        if read := report.update(trainer):
            refuse_divergence(trainer, read, plan.max_nonfinite)
        if stop.poll() or reached(plan, state):
            break
        if plan.save_steps and state.update % plan.save_steps == 0 and unfinished(trainer, loader):
            save(trainer, folder, extra)
    refuse_divergence(trainer, trainer.statistics.read(), plan.max_nonfinite)
    signal = stop.agree()
    report.end_epoch(trainer, complete=not signal)
    return signal


def validate(
    trainer: Trainer, evaluate: Evaluate, report: Report, stop: StopSignal
) -> float | None:
    """Evaluates the weights, and their average if that leads; returns the accuracy, in percent,
    that decides which epoch is the best: NaN where outputs are not finite, None where a signal
    ended the evaluation.
    """
    trainer.share_statistics()
    networks = {"val": trainer.model}
    if trainer.leader is not trainer.model:
        networks["val_ema"] = trainer.leader
    for kind, network in networks.items():
        try:
            result = evaluate(network, averaged=kind == "val_ema", stop=stop)
        except NoScoreError as error:
            if error.by_weights:
                raise
            score = report.no_score(trainer.state, kind, error)
            continue
        if result is None:
            return None
        report.validation(trainer.state, kind, result)
        score = result.acc1
    return score


def improves(state: TrainState, score: float) -> bool:
    """Whether a score is the best so far, also where it was found before (a validation repeated
    after a kill, or at another limit of updates): its files may not be there yet.
    """
    if math.isnan(score):
        return False
    again = score == state.best and state.best_epoch == state.epoch
    return again or state.best_epoch < 0 or score > state.best


def complete(plan: Plan, state: TrainState) -> bool:
    """Whether the limit of updates was reached with the last update of an epoch that is validated;
    inside an epoch a checkpoint does not tell.
    """
    return reached(plan, state) and state.batch == 0


def reached(plan: Plan, state: TrainState) -> bool:
    """Whether the limit of updates is reached."""
    return 0 < plan.max_steps <= state.update


def updates_follow(plan: Plan, state: TrainState) -> bool:
    """Whether a run that stands here has anything left to train."""
    return state.epoch < plan.epochs and not reached(plan, state)


def ahead(trainer: Trainer, loader: Any, plan: Plan, stop: StopSignal) -> Iterator[list[Batch]]:
    """The windows of micro-batches that are left of the epoch, until a signal; none where the limit
    of updates is reached.
    """
    if reached(plan, trainer.state) or not unfinished(trainer, loader):
        return iter(())
    window = trainer.layout.accumulation
    return stop.until_stopped(windows(loader, trainer.state, window), together=True)


def saved_first(windows: Iterator, rescue: Callable[[], None]) -> Iterator:
    """The windows; where the next one cannot be had (a data worker was killed, the storage does not
    answer) `rescue` comes before the error: between two updates nothing is half done.
    """
    while True:
        try:
            window = next(windows)
        except StopIteration:
            return
        except UserError:
            rescue()
            raise
        yield window


def windows(loader: Any, state: TrainState, accumulation: int) -> Iterator[list[Batch]]:
    """Lists of `accumulation` micro-batches from the position on; a rest that does not fill a
    window is not trained on.
    """
    yield from full_windows(loader.epoch(state.epoch, state.batch), accumulation)


def full_windows(batches: Iterable[Batch], accumulation: int) -> Iterator[list[Batch]]:
    """Consecutive lists of exactly `accumulation` batches."""
    batches = iter(batches)
    while len(window := list(islice(batches, accumulation))) == accumulation:
        yield window


def unfinished(trainer: Trainer, loader: Any) -> bool:
    """Whether the epoch has another full window of micro-batches."""
    return trainer.state.batch + trainer.layout.accumulation <= len(loader)


def end_of_epoch(trainer: Trainer, loader: Any) -> int | None:
    """Moves the position to the next epoch and returns the number of the finished one; None in the
    middle of one (MAX_STEPS).
    """
    state = trainer.state
    if unfinished(trainer, loader):
        return None
    finished = state.epoch
    state.epoch += 1
    state.batch = 0
    return finished


def save(
    trainer: Trainer,
    folder: CheckpointFolder,
    extra: dict[str, Any],
    *,
    finished: int | None = None,
    improved: bool = False,
    final: bool = False,
) -> None:
    """Writes the checkpoints that are due; every process must call it. finished: the epoch that has
    just ended.
    """
    captured = trainer.capture()
    if captured is None:
        trainer.world.meet("the checkpoint that process 0 writes")
        return
    payload = captured | extra

    def copies() -> None:
        if improved:
            weights, about = best_weights(payload, trainer.leader is not trainer.model)
            folder.keep_best(weights, **about)
        if finished is not None:
            folder.keep_epoch(finished, last=final)

    folder.save(payload, copies)
    trainer.world.meet("the end of the checkpoint")


def best_weights(
    payload: dict[str, Any], averaged: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a training state that its accuracy belongs to, and what is said of them."""
    return payload["ema" if averaged else "model"], {
        "epoch": payload["progress"]["best_epoch"],
        "accuracy": payload["progress"]["best"],
        "averaged": averaged,
        **payload.get("metadata", {}),
        **names_as_metadata(payload.get("class_names", ())),
    }


def refuse_divergence(trainer: Trainer, read: dict[str, float], limit: int) -> None:
    """Raises DivergedError once `limit` updates in a row were skipped; on all processes alike, for
    the gradients are the same.
    """
    streak = int(read["streak"])
    if streak < limit:
        return
    update = trainer.state.update
    losses = trainer.world.gather(int(read["bad_losses"])) or []
    where = ", ".join(str(rank) for rank, bad in enumerate(losses) if bad) or "none"
    raise DivergedError(
        f"the gradient was not finite in the last {streak} updates ({update - streak} to"
        f" {update - 1}, epoch {trainer.state.epoch}; processes with a non-finite loss: {where}):"
        " lower TRAIN.BASE_LR or TRAIN.CLIP_GRAD, use AMP_DTYPE bfloat16 or float32, or resume"
        " from an earlier ckpt_epoch_*.pth"
    )
