"""Rules between several settings: what cannot go together is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data.sets import DATASETS
from settings.kinds import ConfigError, show


def derive(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`values` of all keys, with what follows from others: the data set's classes, "no transfer"
    for any number of stages, the output path. `given` are the values that someone has written.
    """
    values = dict(values)
    if "MODEL.NUM_CLASSES" not in given:
        values["MODEL.NUM_CLASSES"] = DATASETS[values["DATA.DATASET"]].num_classes or 0
    if not any(values["MODEL.SWINV2.PRETRAINED_WINDOW_SIZES"]):
        values["MODEL.SWINV2.PRETRAINED_WINDOW_SIZES"] = [0] * len(values["MODEL.SWINV2.DEPTHS"])
    values["OUTPUT"] = os.path.join(values["OUTPUT"], values["MODEL.NAME"], values["TAG"])
    return values


def family(cfg: Any) -> tuple[str, Any]:
    """(dotted name, node) of the section that describes the configured MODEL.TYPE."""
    name = cfg.MODEL.TYPE.upper()
    return f"MODEL.{name}", cfg.MODEL[name]


def check_classes(cfg: Any) -> None:
    """A data set with a fixed number of classes has that number; 0 (inferred) is for others."""
    known = DATASETS[cfg.DATA.DATASET].num_classes
    if known and cfg.MODEL.NUM_CLASSES != known:
        raise ConfigError(
            f"MODEL.NUM_CLASSES: {cfg.MODEL.NUM_CLASSES} contradicts DATA.DATASET"
            f" {cfg.DATA.DATASET!r}, which has {known} classes; leave MODEL.NUM_CLASSES out, or use"
            " DATA.DATASET 'folder' for classes of your own"
        )


def check_stages(cfg: Any) -> None:
    """As many heads as stages, heads that divide the stage's width, one pre-training window per
    stage; for Swin and its relatives.
    """
    name, node = family(cfg)
    if cfg.MODEL.TYPE not in ("swin", "swinv2", "swin_mlp"):
        return
    stages = len(node.DEPTHS)
    if stages == 0:
        raise ConfigError(
            f"{name}.DEPTHS: [] has no stage; allowed: one number of blocks per stage, such as [2,"
            " 2, 6, 2]"
        )
    for key in ("NUM_HEADS", "PRETRAINED_WINDOW_SIZES"):
        if key in node and len(node[key]) != stages:
            raise ConfigError(
                f"{name}.{key}: {node[key]} has {len(node[key])} entries, {name}.DEPTHS"
                f" {node.DEPTHS} has {stages} stages; give one entry per stage"
            )
    for stage, heads in enumerate(node.NUM_HEADS):
        width = node.EMBED_DIM * 2**stage
        if width % heads:
            raise ConfigError(
                f"{name}.NUM_HEADS: {heads} heads do not divide the {width} channels of stage"
                f" {stage} (EMBED_DIM {node.EMBED_DIM} * 2^{stage}); choose a divisor of {width}"
            )


def check_family_options(cfg: Any) -> None:
    """Options of SwinV2's cosine attention are refused, not ignored, elsewhere."""
    attention = cfg.MODEL.ATTENTION
    for key, neutral in (("LOGIT_SCALE_INIT", 10.0), ("BIAS_SIGMOID", True)):
        if cfg.MODEL.TYPE != "swinv2" and attention[key] != neutral:
            raise ConfigError(
                f"MODEL.ATTENTION.{key}: {attention[key]} acts on MODEL.TYPE 'swinv2' only; "
                f"with {cfg.MODEL.TYPE!r} leave it at {neutral}"
            )


def check_data(cfg: Any) -> None:
    """Some data sets alone are read from archives; mean and standard deviation come together, one
    number per channel.
    """
    dataset = DATASETS[cfg.DATA.DATASET]
    if cfg.DATA.ZIP_MODE and not dataset.zip:
        zipped = " or ".join(repr(name) for name in DATASETS if DATASETS[name].zip)
        raise ConfigError(
            f"DATA.ZIP_MODE: True needs DATA.DATASET {zipped}, not {dataset.name!r}; unpack"
            " the archive"
        )
    name, node = family(cfg)
    for key in ("MEAN", "STD"):
        given = cfg.DATA[key]
        if len(given) not in (0, node.IN_CHANS) or len(cfg.DATA.MEAN) != len(cfg.DATA.STD):
            raise ConfigError(
                f"DATA.{key}: {given} has {len(given)} numbers; give DATA.MEAN and DATA.STD"
                f" together, {node.IN_CHANS} numbers each ({name}.IN_CHANS), or () for the data"
                " set's own"
            )


def check_schedule(cfg: Any) -> None:
    """The warm-up fits into the training and into a multistep schedule's first step."""
    train, steps = cfg.TRAIN, cfg.TRAIN.LR_SCHEDULER.MULTISTEPS
    if train.WARMUP_EPOCHS > train.EPOCHS:
        raise ConfigError(
            f"TRAIN.WARMUP_EPOCHS: {train.WARMUP_EPOCHS} is longer than the training, TRAIN.EPOCHS"
            f" {train.EPOCHS}; allowed: 0 to {train.EPOCHS} (--opts TRAIN.WARMUP_EPOCHS 0)"
        )
    if train.COOLDOWN_EPOCHS and train.LR_SCHEDULER.NAME not in ("cosine", "linear"):
        raise ConfigError(
            f"TRAIN.COOLDOWN_EPOCHS: {train.COOLDOWN_EPOCHS} acts on TRAIN.LR_SCHEDULER.NAME cosine"
            f" and linear, which end; with {train.LR_SCHEDULER.NAME!r} leave it at 0"
        )
    if train.WARMUP_EPOCHS + train.COOLDOWN_EPOCHS > train.EPOCHS:
        raise ConfigError(
            f"TRAIN.COOLDOWN_EPOCHS: {train.COOLDOWN_EPOCHS} and TRAIN.WARMUP_EPOCHS"
            f" {train.WARMUP_EPOCHS} are longer than the training, TRAIN.EPOCHS {train.EPOCHS};"
            f" allowed: 0 to {train.EPOCHS - train.WARMUP_EPOCHS}"
        )
    if train.LR_SCHEDULER.NAME != "multistep":
        return
    if not steps:
        raise ConfigError(
            "TRAIN.LR_SCHEDULER.MULTISTEPS: [] is empty, TRAIN.LR_SCHEDULER.NAME 'multistep' needs"
            " the epochs at which the rate falls, such as [100, 200]"
        )
    if steps[0] < train.WARMUP_EPOCHS:
        raise ConfigError(
            f"TRAIN.LR_SCHEDULER.MULTISTEPS: {steps} begins within the warm-up (TRAIN.WARMUP_EPOCHS"
            f" {train.WARMUP_EPOCHS}); the first step must not come before its end"
        )


def check_mixing(cfg: Any) -> None:
    """Mixup and cutmix pair each image with another of the batch."""
    aug, batch = cfg.AUG, cfg.DATA.BATCH_SIZE
    if (aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX) and batch % 2:
        raise ConfigError(
            f"DATA.BATCH_SIZE: {batch} is odd; AUG.MIXUP and AUG.CUTMIX need an even number, or"
            " both at 0 (and AUG.CUTMIX_MINMAX None)"
        )


def check_distillation(cfg: Any) -> None:
    """A teacher and a kind of distillation come together."""
    distill = cfg.TRAIN.DISTILL
    if distill.KIND != "none" and not distill.TEACHER:
        raise ConfigError(
            f"TRAIN.DISTILL.TEACHER: '' is empty, TRAIN.DISTILL.KIND {distill.KIND!r} needs a timm"
            " model's name or a YAML of this repository"
        )
    if distill.TEACHER.endswith((".yaml", ".yml")) and not Path(distill.TEACHER).is_file():
        raise ConfigError(
            f"TRAIN.DISTILL.TEACHER: {show(distill.TEACHER)} is not a file; allowed: a timm model's"
            " name or a YAML of this repository"
        )
    if distill.KIND == "none" and (distill.TEACHER or distill.TEACHER_WEIGHTS):
        raise ConfigError(
            "TRAIN.DISTILL.KIND: 'none' leaves the teacher"
            f" {show(distill.TEACHER or distill.TEACHER_WEIGHTS)} unused; allowed with a teacher:"
            " hard, soft"
        )


ALWAYS = (check_classes, check_stages, check_family_options, check_data)
TRAINING = (check_schedule, check_mixing, check_distillation)


def check_combinations(cfg: Any) -> None:
    """Refuse settings that cannot go together; rules of training do not bind --eval and
    --throughput (a batch of 1, say, is fine there).

    Raises: ConfigError.
    """
    for rule in ALWAYS + (() if cfg.EVAL_MODE or cfg.THROUGHPUT_MODE else TRAINING):
        rule(cfg)
