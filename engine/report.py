"""What a run tells about itself: the reference's log lines, a progress bar on a terminal, and
scalars for the metric log.
"""

import logging
import time
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from engine.curves import CurveError, plot_curves
from engine.evaluate import EvalResult
from engine.logs import MetricLog
from engine.state import CheckpointFolder, TrainState
from utils import Stopwatch, World, clock, on_terminal

LOGGER = logging.getLogger(__name__)


class Report:
    """Lines every `print_freq` updates and at the end of each epoch.

    metrics: writes nothing on other processes than the main one. batches: micro-batches of an
    epoch. Values are those of this process; the mean loss of an epoch in the metric log is over all
    processes.
    """

    def __init__(
        self, world: World, metrics: MetricLog, *, epochs: int, batches: int, print_freq: int
    ) -> None:
        self.world, self.metrics = world, metrics
        self.epochs, self.batches, self.print_freq = epochs, batches, print_freq
        self.bar: tqdm | None = None
        self.watch = Stopwatch()
        self.began = time.perf_counter()

    def begin(self, state: TrainState) -> None:
        """An epoch begins, or goes on at state.batch."""
        self.watch = Stopwatch()
        if self.world.is_main and on_terminal():
            self.bar = tqdm(
                total=self.batches,
                initial=state.batch,
                desc=f"epoch {state.epoch}/{self.epochs}",
                unit="batch",
                leave=False,
            )

    def updated(self, trainer: Any) -> dict[str, float] | None:
        """An update is done. Returns its statistics where they were read: every
        print_freq updates of the epoch.
        """
        state, step = trainer.state, trainer.layout.accumulation
        self.watch.lap(step)
        if self.bar is not None:
            self.bar.update(step)
        if (state.batch // step - 1) % self.print_freq:
            return None
        read = trainer.statistics.read()
        group = trainer.optimizer.param_groups[0]
        LOGGER.info(self._line(state, read, group, trainer), extra={"progress": True})
        if self.bar is not None:
            self.bar.set_postfix(
                loss=f"{read['loss_mean']:.4f}", lr=f"{group['lr']:.2e}", best=f"{state.best:.2f}%"
            )
        self._write(
            state,
            "train",
            loss=read["loss"],
            grad_norm=read["norm"],
            lr=group["lr"],
            skipped=read["skipped"],
        )
        return read

    def _line(
        self, state: TrainState, read: dict[str, float], group: dict[str, Any], trainer: Any
    ) -> str:
        left = self.watch.mean * (self.batches - state.batch)
        scale = trainer.scaler.get_scale()
        fields = (
            f"Train: [{state.epoch}/{self.epochs}][{state.batch - 1}/{self.batches}]",
            f"eta {clock(left)} lr {group['lr']:.6f}",
            f" wd {group['weight_decay']:.4f}",
            f"time {self.watch.last:.4f} ({self.watch.mean:.4f})",
            f"loss {read['loss']:.4f} ({read['loss_mean']:.4f})",
            f"grad_norm {read['norm']:.4f} ({read['norm_mean']:.4f})",
            f"loss_scale {scale:.4f} ({scale:.4f})",
            f"skipped {read['skipped']:.0f}",
            f"mem {memory(trainer.device):.0f}MB",
        )
        return "\t".join(fields)

    def end(self, trainer: Any, complete: bool = True) -> None:
        """The epoch's updates are done, or (complete False) broken off by a signal. Every process
        must call it.
        """
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if not complete:
            return
        state, seconds = trainer.state, self.watch.mean * self.watch.items
        read = trainer.statistics.read()
        loss = self.world.mean(read["loss_mean"])
        LOGGER.info(
            "EPOCH %d training takes %s", state.epoch, clock(seconds), extra={"progress": True}
        )
        self._write(
            state, "epoch", train_loss=loss, grad_norm=read["norm_mean"], skipped=read["skipped"]
        )

    def validated(self, state: TrainState, kind: str, result: EvalResult) -> None:
        """An evaluation is done: of the weights (kind val) or of their average (val_ema)."""
        name = {"val": "network", "val_ema": "averaged network"}[kind]
        LOGGER.info(
            "Accuracy of the %s on the %d test images: %.1f%%", name, result.count, result.acc1
        )
        self._write(state, kind, acc1=result.acc1, acc5=result.acc5, loss=result.loss)

    def best(self, state: TrainState) -> None:
        """The best accuracy so far."""
        LOGGER.info("Max accuracy: %.2f%%", state.best, extra={"progress": True})

    def finished(
        self, state: TrainState, folder: CheckpointFolder, signal: int = 0, plot: bool = True
    ) -> None:
        """The run is over, or (signal above 0) stopped by a signal: what came out, and where it
        lies. plot: draw the curves.
        """
        if signal:
            LOGGER.warning(
                "stopped by signal %d; the state is in %s, the same command goes on from it",
                signal,
                folder.last,
            )
            return
        LOGGER.info("Training time %s", clock(time.perf_counter() - self.began))
        LOGGER.info(
            "best accuracy %.2f%% (epoch %d), checkpoint %s",
            state.best,
            state.best_epoch,
            folder.best,
        )
        if plot and self.metrics.path is not None:
            try:
                LOGGER.info(
                    "curves %s", plot_curves(self.metrics.path, folder.folder / "curves.png")
                )
            except CurveError as error:  # the training itself has succeeded
                LOGGER.warning("no curves: %s", error)

    def _write(self, state: TrainState, kind: str, **scalars: float) -> None:
        self.metrics.write(state.update, state.epoch, kind, **scalars)


def memory(device: torch.device) -> float:
    """Peak memory of the device taken by tensors, in MiB; 0 where torch does not count it."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def describe_model(model: nn.Module, name: str) -> str:
    """Name, trainable parameters, and multiply-accumulates of one image by the model's own
    formula.
    """
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{name}: number of params: {count}, number of GMACs: {model.flops() / 1e9:.4f}"
