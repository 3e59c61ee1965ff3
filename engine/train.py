"""Training: the one update that every kind of training here shares, and the loop around it."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.clip import clip_gradients
from engine.ema import ParameterEma
from engine.evaluate import EvalResult
from engine.guard import DivergedError, Tally, guarded_step
from engine.report import Report
from engine.signals import StopSignal, signals_blocked
from engine.state import CheckpointError, CheckpointFolder, Layout, TrainState, place
from utils import World, autocast_factory, capture_rng, memory_format, restore_rng

LOGGER = logging.getLogger(__name__)
Batch = tuple[Tensor, Tensor]


class Trainer:
    """Everything that an update changes, and the update.

    Args:
        model: on its device, bare. optimizer, scheduler: over its parameters; scheduler has
            step_update(n), state_dict, load_state_dict.
        loss: (images, logits, targets) -> scalar, the mean over the batch, formed in float32 or
            wider.
        layout: batch_size, world_size and accumulation (micro-batches of one update).
        dtype: of autocast; float16 turns on the gradient scaler, float32 turns autocast off.
        clip, clip_mode: for `engine.clip.clip_gradients`. mixup: (images, targets) -> (images, soft
            targets), or None.
        two_heads: the loss takes the pair of logits of `model.forward_heads`, class head first,
            instead of the model's result.
        ema: `engine.ema.ParameterEma` or None. ema_leads: it is evaluated too, and the best
            checkpoint is chosen by it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        loss: Callable[..., Tensor],
        *,
        world: World,
        layout: Layout,
        dtype: torch.dtype = torch.float32,
        clip: float | None = None,
        clip_mode: str = "norm",
        mixup: Callable[..., Batch] | None = None,
        ema: ParameterEma | None = None,
        ema_leads: bool = True,
        compile: bool = False,
        channels_last: bool = False,
        two_heads: bool = False,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.loss = model, optimizer, scheduler, loss
        self.world, self.device, self.layout = world, world.device, layout
        self.clip, self.clip_mode, self.mixup, self.ema = clip, clip_mode, mixup, ema
        self.leader = (
            ema.module if ema is not None and ema_leads else model
        )  # whose accuracy counts
        self.autocast = autocast_factory(self.device, dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.memory_format = memory_format(channels_last)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        heads = (getattr(model, name, None) for name in ("head", "head_dist"))
        self.classifier = [p for head in heads if head is not None for p in head.parameters()]
        called = BothHeads(model) if two_heads else model
        self.network = (
            torch.compile(called) if compile else called
        )  # the same weights; what is called
        self.parallel = parallel(self.network, world)
        self.tally = Tally(self.device)
        self.state = TrainState()

    def update(self, batches: list[Batch]) -> None:
        """One optimizer update from the micro-batches of a window. Nothing is read back from the
        device.
        """
        loss = torch.zeros((), device=self.device)
        for index, (images, targets) in enumerate(batches):
            with self._reduction(last=index + 1 == len(batches)):
                part = self._forward(images, targets) / len(batches)
                self.scaler.scale(part).backward()
            loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(
            self.parameters, self.clip, self.clip_mode, self.classifier
        )  # the same on all processes, as gradients are
        finite = torch.isfinite(norm)
        guarded_step(self.optimizer, finite)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        self.tally.add(loss, norm, finite)

    def _forward(self, images: Tensor, targets: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        targets = targets.to(self.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with self.autocast():
            return self.loss(images, self.parallel(images), targets)

    def _reduction(self, last: bool) -> AbstractContextManager:
        """Gradients are averaged over the processes with the last micro-batch of a window only."""
        return nullcontext() if last or self.parallel is self.network else self.parallel.no_sync()

    def advance(self, batches_per_epoch: int) -> None:
        """Moves the position, and the learning rate, past an update.

        The schedule's argument is the reference's: the index of the update's last micro-batch,
        counted over all epochs, divided by the accumulation.
        """
        state = self.state
        state.update += 1
        state.batch += self.layout.accumulation
        self.scheduler.step_update(
            (state.epoch * batches_per_epoch + state.batch - 1) // self.layout.accumulation
        )

    def capture(self) -> dict[str, Any] | None:
        """All of it as tensors and plain data, on the main process; None elsewhere. Every process
        must call it.
        """
        ranks = self.world.gather(
            {"rng": capture_rng(self.device), "tally": self.tally.values.cpu()}
        )
        if not self.world.is_main:
            return None
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.state),
            "layout": asdict(self.layout),
            "ranks": ranks,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Puts back what `capture` took, on every process.

        Settings (rates, decay, ...) are this run's, not the saved ones. With another number of
        processes the random states cannot be met, and a warning says so.
        Raises: CheckpointError where the model or the position does not fit.
        """
        layout = Layout(**saved["layout"])
        self.state = place(TrainState(**saved["progress"]), layout, self.layout)
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint holds another model: {' '.join(str(error).split())[:300]}"
            ) from error
        self._restore_ema(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["lr_scheduler"])
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if layout.world_size == self.layout.world_size:
            mine = saved["ranks"][self.world.rank]
            self.tally.values = mine["tally"].to(self.tally.values)
            restore_rng(mine["rng"], self.device)
        else:
            LOGGER.warning(
                "resuming with %d processes a run of %d: drop path and mixup draw other numbers"
                " than before",
                self.layout.world_size,
                layout.world_size,
            )

    def _restore_ema(self, saved: dict[str, Tensor] | None) -> None:
        if self.ema is None:
            if saved is not None:
                LOGGER.warning(
                    "resuming: the checkpoint's average of the parameters is dropped,"
                    " MODEL.EMA.ENABLE is False"
                )
            return
        if saved is None:
            LOGGER.warning(
                "resuming: the checkpoint has no average of the parameters; it starts from its"
                " weights"
            )
        self.ema.load_state_dict(self.model.state_dict() if saved is None else saved)


class BothHeads(nn.Module):
    """A model as the trainer calls it where its two heads have different teachers: images -> (class
    logits, distillation logits).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, K) twice."""
        return self.model.forward_heads(images)


def has_two_heads(model: nn.Module) -> bool:
    """Whether the model has a distillation head beside the class head."""
    return getattr(model, "head_dist", None) is not None


def parallel(network: nn.Module, world: World) -> nn.Module:
    """The network, wrapped so that backward averages gradients over the processes; as it is where
    there is only one.
    """
    if world.size == 1:
        return network
    devices = [world.device.index] if world.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # renamed in torch 2.15
    return DistributedDataParallel(
        network, device_ids=devices, gradient_as_bucket_view=True, **{buffers: False}
    )


def with_distillation(
    criterion: Callable[[Tensor, Tensor], Tensor], distillation: Callable[..., Tensor] | None
) -> Callable[..., Tensor]:
    """The loss of a `Trainer` from a criterion (logits, targets) and, where there is one, an
    `engine.losses.Distillation`.
    """
    if distillation is None:
        return with_penalty(lambda images, logits, targets: criterion(logits, targets))
    return with_penalty(
        lambda images, logits, targets: distillation(images, logits, targets, criterion)
    )


def with_penalty(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss, for a model that may return {"logits": ..., "penalty": a scalar to be added} in
    training in place of its logits.
    """

    def total(images: Tensor, output: Any, targets: Tensor) -> Tensor:
        if isinstance(output, dict):
            return loss(images, output["logits"], targets) + output["penalty"]
        return loss(images, output, targets)

    return total


@dataclass(frozen=True)
class Plan:
    """When to do what. epochs: in all. save_steps: updates between two checkpoints inside an epoch,
    0 none. max_steps: updates in all,
    0 no limit. max_nonfinite: updates skipped in a row before the run is given up.
    """

    epochs: int
    save_steps: int = 0
    max_steps: int = 0
    max_nonfinite: int = 20


def fit(
    trainer: Trainer,
    loader: Any,
    evaluate: Callable[[nn.Module], EvalResult],
    *,
    plan: Plan,
    folder: CheckpointFolder,
    report: Report,
    stop: StopSignal,
    extra: dict[str, Any] | None = None,
) -> int:
    """Trains from `trainer.state` to the plan's end; after each epoch validates, then saves.

    Args:
        loader: len() batches an epoch, .epoch(epoch, start_batch) yields them. evaluate: model ->
            result on the validation images.
        extra: plain data for every checkpoint (the config).
    Returns: 0, or the number of the signal that ended the run early (its state is saved).
    Raises: DivergedError.
    """
    state, extra = trainer.state, extra or {}
    while state.epoch < plan.epochs:
        signal = train_epoch(trainer, loader, plan, folder, report, stop, extra)
        if signal:
            save(trainer, folder, extra)
            return signal
        score = validate(trainer, evaluate, report)
        improved = state.best_epoch < 0 or score > state.best
        if improved:
            state.best, state.best_epoch = score, state.epoch
        report.best(state)
        finished = end_of_epoch(trainer, loader)
        save(
            trainer,
            folder,
            extra,
            finished=finished,
            improved=improved,
            final=state.epoch == plan.epochs,
        )
        if finished is None:
            return 0
        signal = stop.settle()
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
    """The rest of the epoch under way. Returns the signal that all processes agreed to stop for, or
    0.
    """
    state = trainer.state
    if state.batch == 0:
        trainer.tally.new_epoch()
    report.begin(state)
    trainer.parallel.train()
    for window in windows(loader, state, trainer.layout.accumulation):
        if reached(plan, state):
            break
        trainer.update(window)
        trainer.advance(len(loader))
        if read := report.updated(trainer):
            refuse_divergence(trainer, read, plan.max_nonfinite)
        if stop.agreed():
            break
        if plan.save_steps and state.update % plan.save_steps == 0 and unfinished(trainer, loader):
            save(trainer, folder, extra)
    refuse_divergence(trainer, trainer.tally.read(), plan.max_nonfinite)
    signal = stop.settle()
    report.end(trainer, complete=not signal)
    return signal


def validate(
    trainer: Trainer, evaluate: Callable[[nn.Module], EvalResult], report: Report
) -> float:
    """Evaluates the weights, and their average if that leads; returns the accuracy, in percent,
    that decides which epoch is the best.
    """
    with (
        signals_blocked()
    ):  # a signal waits until the evaluation is done, and does not end its data workers
        result = evaluate(trainer.model)
        report.validated(trainer.state, "val", result)
        if trainer.leader is not trainer.model:
            result = evaluate(trainer.leader)
            report.validated(trainer.state, "val_ema", result)
    return result.acc1


def reached(plan: Plan, state: TrainState) -> bool:
    """Whether the limit of updates is used up."""
    return 0 < plan.max_steps <= state.update


def windows(loader: Any, state: TrainState, accumulation: int) -> Iterator[list[Batch]]:
    """Lists of `accumulation` micro-batches from the position on; a rest that does not fill a
    window is not trained on.
    """
    # workers start with the first batch, and must not die before the last update of a stopped run
    with signals_blocked():
        batches = iter(loader.epoch(state.epoch, state.batch))
        first = list(islice(batches, 1))
    return full_windows(chain(first, batches), accumulation)


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
    state.epoch, state.batch = state.epoch + 1, 0
    return state.epoch - 1


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
    payload = trainer.capture()
    if payload is None:
        return
    folder.save(payload | extra)
    if improved:
        averaged = trainer.leader is not trainer.model
        folder.keep_best(
            payload["ema"] if averaged else payload["model"],
            epoch=trainer.state.best_epoch,
            accuracy=trainer.state.best,
            averaged=averaged,
            **extra.get("metadata", {}),
        )
    if finished is not None:
        folder.keep_epoch(finished, last=final)


def refuse_divergence(trainer: Trainer, read: dict[str, float], limit: int) -> None:
    """Raises DivergedError once `limit` updates in a row were skipped; on all processes alike, for
    the gradients are the same.
    """
    streak, update = int(read["streak"]), trainer.state.update
    if streak < limit:
        return
    losses = trainer.world.gather(int(read["bad_losses"])) or []
    where = ", ".join(str(rank) for rank, bad in enumerate(losses) if bad) or "none"
    raise DivergedError(
        f"the gradient was not finite in the last {streak} updates ({update - streak} to"
        f" {update - 1}, epoch {trainer.state.epoch}; processes with a non-finite loss: {where}):"
        " lower TRAIN.BASE_LR or TRAIN.CLIP_GRAD, use AMP_DTYPE bfloat16 or float32, or resume"
        " from an earlier ckpt_epoch_*.pth"
    )
