"""What a run reports: log lines in Swin's form, a progress bar on a terminal, and scalars for the
metric log.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from tqdm import tqdm

from engine.curves import plot_curves
from engine.evaluate import EvalResult
from engine.finite import NoScoreError
from engine.logs import MetricLog
from engine.progress import Progress, clock, peak_memory, time_of_day
from engine.state import CheckpointFolder, Layout, TrainState
from utils import World, on_terminal, one_line

LOGGER = logging.getLogger(__name__)
NETWORKS = {"val": "network", "val_ema": "averaged network"}


class Report:
    """Lines every `print_freq` updates and at the end of each epoch.

    Losses and norms are those of this process, images/s of all; the mean loss of an epoch in the
    metric log is over all processes.

    Args:
        metrics: writes nothing on other processes than the main one.
        layout, batches, epochs, max_steps, timer: of `Progress`.
        training_loss: what sets the training loss apart from the validation's, for the picture.
    """

    def __init__(
        self,
        world: World,
        metrics: MetricLog,
        *,
        layout: Layout,
        batches: int,
        epochs: int,
        print_freq: int,
        max_steps: int = 0,
        training_loss: str = "",
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.world = world
        self.metrics = metrics
        self.batches = batches
        self.print_freq = print_freq
        self.training_loss = training_loss
        self.bar: tqdm | None = None
        self.progress = Progress(
            layout,
            batches=batches,
            epochs=epochs,
            max_steps=max_steps,
            timer=timer,
        )

    def start_epoch(self, state: TrainState) -> None:
        """An epoch starts, or goes on at state.batch."""
        self.progress.start_epoch()
        if self.world.is_main and on_terminal():
            self.bar = tqdm(
                total=self.batches,
                initial=state.batch,
                desc=f"epoch {state.epoch}/{self.progress.epochs}",
                unit="batch",
                leave=False,
            )

    def update(self, trainer: Any) -> dict[str, float] | None:
        """An update is done. Every print_freq updates of an epoch its statistics are read, which
        waits for the device, and returned.
        """
        state = trainer.state
        accumulation = trainer.layout.accumulation
        self.progress.update()
        if self.bar is not None:
            self.bar.update(accumulation)
        if (state.batch // accumulation - 1) % self.print_freq:
            return None
        with self.world.waiting("the device"):
            read = trainer.statistics.read()
        lr = trainer.optimizer.param_groups[0]["lr"]
        LOGGER.info(self._line(trainer, read), extra={"progress": True})
        if self.bar is not None:
            self.bar.set_postfix(
                loss=f"{read['loss_mean']:.4f}",
                lr=f"{lr:.2e}",
                best=f"{state.best:.2f}%",
                run=clock(self.progress.run_remaining(state)),
            )
        self._write(
            state,
            "train",
            loss=read["loss"],
            grad_norm=read["norm"],
            lr=lr,
            skipped=read["skipped"],
        )
        return read

    def _line(self, trainer: Any, read: dict[str, float]) -> str:
        """Swin's line of an update, with the end of the run and images/s; values are the latest,
        with the epoch's mean in brackets.
        """
        progress = self.progress
        state = trainer.state
        group = trainer.optimizer.param_groups[0]
        batch = progress.last / trainer.layout.accumulation
        mean_batch = progress.mean / trainer.layout.accumulation
        epoch_left = clock(progress.epoch_remaining(state))
        run_left = progress.run_remaining(state)
        recent = progress.recent_images_per_second()
        fields = [
            f"Train: [{state.epoch}/{progress.epochs}][{state.batch - 1}/{self.batches}]",
            f"eta {epoch_left} (run {clock(run_left)}, ends {time_of_day(run_left)})",
            f"lr {group['lr']:.4g} wd {group['weight_decay']:.4g}",
            f"time {batch:.4f} ({mean_batch:.4f})",
            f"images/s {recent:.1f} ({progress.images_per_second():.1f})",
            f"loss {read['loss']:.4f} ({read['loss_mean']:.4f})",
            f"grad_norm {read['norm']:.4f} ({read['norm_mean']:.4f})",
        ]
        if trainer.scaler.is_enabled():
            fields.append(f"loss_scale {trainer.scaler.get_scale():.0f}")
        fields.append(f"skipped {read['skipped']:.0f}")
        if trainer.device.type == "cuda":
            fields.append(f"mem {peak_memory(trainer.device):.0f}MB")
        return "\t".join(fields)

    def end_epoch(self, trainer: Any, complete: bool = True) -> None:
        """The epoch's updates are done, or (complete False) a signal has stopped them. Every
        process must call it.
        """
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if not complete:
            return
        state = trainer.state
        with self.world.waiting("the device"):
            read = trainer.statistics.read()
        loss = self.world.mean(read["loss_mean"])
        LOGGER.info(
            "EPOCH %d training takes %s (%.1f images/s)",
            state.epoch,
            clock(self.progress.training),
            self.progress.images_per_second(),
            extra={"progress": True},
        )
        self._write(
            state,
            "epoch",
            train_loss=loss,
            grad_norm=read["norm_mean"],
            skipped=read["skipped"],
        )

    def validation(self, state: TrainState, kind: str, result: EvalResult) -> None:
        """An evaluation is done: of the weights (kind val) or of their average (val_ema)."""
        LOGGER.info(
            "Accuracy of the %s on the %d test images: %.1f%%",
            NETWORKS[kind],
            result.count,
            result.acc1,
        )
        self._write(state, kind, acc1=result.acc1, acc5=result.acc5, loss=result.loss)

    def no_score(self, state: TrainState, kind: str, error: NoScoreError) -> float:
        """An evaluation has found outputs that are not finite: training goes on, and what it
        returns, NaN, is the accuracy.
        """
        LOGGER.warning("epoch %d, %s: %s", state.epoch, NETWORKS[kind], error)
        self._write(state, kind, acc1=math.nan, acc5=math.nan, loss=math.nan)
        return math.nan

    def best(self, state: TrainState) -> None:
        """The best accuracy so far."""
        LOGGER.info("Max accuracy: %.2f%%", state.best, extra={"progress": True})

    def finish(
        self,
        state: TrainState,
        folder: CheckpointFolder,
        signal: int = 0,
        plot: bool = True,
    ) -> None:
        """The run is over, or stopped by a signal (above 0): its result and where its files are.
        plot: draw the curves.
        """
        if signal:
            saved = "the state is in {0}, the same command continues from it"
            if not folder.last.exists():
                saved = "nothing is saved yet, the same command begins anew"
            LOGGER.warning("stopped by signal %d; %s", signal, saved.format(folder.last))
            return
        LOGGER.info("Training time %s", clock(self.progress.since_start()))
        self._tell_best(state, folder)
        if plot and self.metrics.path is not None:
            self._plot(folder)

    def _tell_best(self, state: TrainState, folder: CheckpointFolder) -> None:
        if state.best_epoch < 0:
            LOGGER.warning("no epoch has a score, so there is no best checkpoint")
            return
        accuracy = f"best accuracy {state.best:.2f}% (epoch {state.best_epoch})"
        if not self.world.is_main or folder.holds_best(state.best_epoch, state.best):
            LOGGER.info("%s, checkpoint %s", accuracy, folder.best)
        else:
            LOGGER.warning(
                "%s, of which no checkpoint is left: %s is missing or of another epoch",
                accuracy,
                folder.best,
            )

    def _plot(self, folder: CheckpointFolder) -> None:
        try:
            picture = plot_curves(
                self.metrics.path,
                folder.folder / "curves.png",
                updates_per_epoch=self.progress.updates_per_epoch,
                training_loss=self.training_loss,
            )
        except Exception as error:  # the training itself has succeeded
            LOGGER.warning("no curves: %s", one_line(error))
        else:
            LOGGER.info("curves %s", picture)

    def _write(self, state: TrainState, kind: str, **scalars: float) -> None:
        self.metrics.write(state.update, state.epoch, kind, **scalars)


def describe_model(model: nn.Module, name: str) -> str:
    """Name, trainable parameters, and multiply-accumulates of one image by the model's own
    formula.
    """
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{name}: number of params: {count}, number of GMACs: {model.flops() / 1e9:.4f}"
