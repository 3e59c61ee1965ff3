"""Configuration -> plain arguments of the engine, which reads no configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.losses import describe_loss
from engine.train import Plan
from engine.wandb_run import WandbOptions
from settings.reading import look_up
from settings.rules import family

# What may differ between the processes of a run: it describes a machine, not the run. Whether the
# images are the same is asked of the data sets.
OF_THE_MACHINE = (
    "LOCAL_RANK",
    "DATA.DATA_PATH",
    "DATA.DOWNLOAD",
    "DATA.CACHE_MODE",
    "DATA.NUM_WORKERS",
    "DATA.PIN_MEMORY",
    "DATA.TIMEOUT",
    "TRAIN.THREADS",
)


def shared(config: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The settings, of these keys, that all processes of a run must have in common."""
    return {key: look_up(config, key) for key in keys if key not in OF_THE_MACHINE}


def trainer(config: Any) -> dict[str, Any]:
    """Of `engine.session.make_trainer`."""
    average = config.MODEL.EMA
    return dict(
        clip=config.TRAIN.CLIP_GRAD,
        clip_mode=config.TRAIN.CLIP_MODE,
        ema_decay=average.DECAY if average.ENABLE else None,
        ema_leads=average.EVAL,
        start_epoch=config.TRAIN.START_EPOCH,
        compile=config.MODEL.COMPILE,
        channels_last=config.MODEL.CHANNELS_LAST,
        check_ranks=config.TRAIN.CHECK_RANKS,
    )


def training(config: Any) -> dict[str, Any]:
    """Of `engine.session.train`."""
    train = config.TRAIN
    return dict(
        plan=Plan(
            epochs=train.EPOCHS,
            save_steps=train.SAVE_STEPS,
            max_steps=train.MAX_STEPS,
            max_nonfinite=train.MAX_NONFINITE,
        ),
        name=f"{config.MODEL.NAME}/{config.TAG}",
        save_freq=config.SAVE_FREQ,
        keep=train.KEEP,
        print_freq=config.PRINT_FREQ,
        tensorboard=config.LOG.TENSORBOARD,
        wandb=wandb(config),
        plot=config.LOG.PLOT,
    )


def wandb(config: Any) -> WandbOptions | None:
    """Of `engine.logs.MetricLog`."""
    log = config.LOG
    if not log.WANDB:
        return None
    return WandbOptions(log.WANDB_PROJECT, log.WANDB_ENTITY, log.WANDB_GROUP, log.WANDB_TAGS)


def loss_in_words(config: Any, mixing: bool) -> str:
    """What sets the training loss apart from the validation's; `mixing` says whether mixup or
    cutmix run.
    """
    return describe_loss(
        mixing=mixing,
        smoothing=config.MODEL.LABEL_SMOOTHING,
        distillation=config.TRAIN.DISTILL.KIND,
    )


def loading(config: Any) -> dict[str, Any]:
    """Of `checkpoint.load_weights`: a checkpoint to go on with must fit exactly, and weights to
    start from may be fitted.
    """
    model = config.MODEL
    head = "reset" if model.HEAD_RESET else "auto"
    if config.EVAL_MODE:
        head = "evaluate"
    return dict(
        rule="exact" if model.RESUME else "finetune",
        head=head,
        allow_partial=model.PARTIAL_LOAD,
        source_residual=model.SOURCE,
        init_over=model.INIT_OVER_PRETRAINED,
    )


def throughput(config: Any) -> dict[str, Any]:
    """Of `engine.throughput.throughput`: the images of a batch."""
    _, node = family(config)
    return dict(
        batch_size=config.DATA.BATCH_SIZE,
        img_size=config.DATA.IMG_SIZE,
        in_chans=node.IN_CHANS,
    )
