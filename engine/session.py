"""A training from beginning to end: the trainer, then the loop with its log, checkpoints and
signals.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import weights_metadata
from engine.ema import ParameterEma
from engine.logs import MetricLog
from engine.losses import Distillation, with_distillation
from engine.report import Report
from engine.signals import StopSignal, exit_status
from engine.state import CheckpointFolder
from engine.train import Evaluate, Plan, fit, validate
from engine.trainer import Trainer
from engine.wandb_run import WandbOptions


def make_trainer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    distillation: Distillation | None = None,
    ema_decay: float | None = None,
    start_epoch: int = 0,
    **options: Any,
) -> Trainer:
    """A `Trainer`, with `options` as it takes them.

    Args:
        model: a backbone, bare.
        criterion: (logits, targets) -> scalar.
        distillation: the teacher; a second head of the model learns from it.
        ema_decay: of an average of the parameters; None: no average.
        start_epoch: where a new run begins.
    """
    trainer = Trainer(
        model,
        optimizer,
        scheduler,
        with_distillation(criterion, distillation),
        ema=None if ema_decay is None else ParameterEma(model, ema_decay),
        two_heads=distillation is not None and model.has_two_heads(),
        **options,
    )
    trainer.state.epoch = start_epoch
    return trainer


def train(
    trainer: Trainer,
    loader: Any,
    evaluate: Evaluate,
    folder: Path,
    *,
    plan: Plan,
    fresh: bool,
    validate_first: bool,
    name: str,
    save_freq: int,
    keep: int,
    print_freq: int,
    tensorboard: bool,
    wandb: WandbOptions | None,
    plot: bool,
    training_loss: str,
    config: dict[str, Any],
    classes: list[str],
    images: dict[str, str],
    about: Mapping[str, str] | None = None,
    logged: dict[str, Any] | None = None,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Trains to the end of the plan, or until a signal; returns the exit status.

    Args:
        loader, evaluate: as `fit` takes them.
        folder: of the checkpoints and the metric log.
        fresh: the run begins here, and so does its metric log.
        validate_first: evaluate the weights that were loaded before the first update.
        name: of the run.
        config, images, classes: plain data, for the checkpoints: the settings, what tells the
            images from others, and the names of their classes by label.
        about: what the weights files say besides.
        save_freq, keep, check: for `CheckpointFolder`.
        print_freq, training_loss: for `Report`.
        tensorboard, wandb: for `MetricLog`.
        logged: `MetricLog.mark` of the checkpoint gone on from, and as "run" how many runs have
            begun in this folder before.
        plot: draw the curves at the end.
    """
    world = trainer.world
    number = {"run": logged["run"]} if logged and logged.get("run") else {}
    checkpoints = CheckpointFolder(folder, save_freq, keep, check)
    log = MetricLog(
        folder if world.is_main else None,
        resume_step=-1 if fresh else trainer.state.update,
        name=name,
        tensorboard=tensorboard,
        wandb=wandb,
        config=config,
        known=(logged or {}).get("wandb"),
    )
    world.meet("the logs of process 0")
    with log, StopSignal(world) as stop:
        report = Report(
            world,
            log,
            layout=trainer.layout,
            batches=len(loader),
            epochs=plan.epochs,
            max_steps=plan.max_steps,
            print_freq=print_freq,
            training_loss=training_loss,
        )
        signal = 0
        if validate_first and validate(trainer, evaluate, report, stop) is None:
            signal = stop.agree()
        signal = signal or fit(
            trainer,
            loader,
            evaluate,
            plan=plan,
            folder=checkpoints,
            report=report,
            stop=stop,
            extra={
                "config": config,
                "images": images,
                "metadata": weights_metadata(trainer.model) | dict(about or {}),
                "class_names": classes,
                "logs": log.mark | number,
            },
        )
        report.finish(trainer.state, checkpoints, signal, plot=plot)
    return exit_status(signal)
