"""Rules between several settings: what cannot go together is refused by name."""

from __future__ import annotations

import os
from typing import Any

from data.sets import DATASETS
from engine.losses import check_distillation
from lr_scheduler import check_schedule
from optimizer import check_optimizer
from registry import UserError
from settings.data_rules import check_augmentation, check_data, check_image_channels
from settings.kinds import ConfigError


def derive(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`values` of all keys, with what follows from others: the data set's classes, "no transfer"
    for any number of stages, the output path. `given` are the values that someone has written.
    """
    values = dict(values)
    if "MODEL.NUM_CLASSES" not in given:
        values["MODEL.NUM_CLASSES"] = DATASETS[values["DATA.DATASET"]].num_classes or 0
    if not any(values["MODEL.SWINV2.PRETRAINED_WINDOW_SIZES"]):
        values["MODEL.SWINV2.PRETRAINED_WINDOW_SIZES"] = [0] * len(values["MODEL.SWINV2.DEPTHS"])
    root = os.path.expanduser(values["OUTPUT"])  # as of the checkpoints inside
    values["OUTPUT"] = os.path.join(root, values["MODEL.NAME"], values["TAG"])
    return values


def family(cfg: Any) -> tuple[str, Any]:
    """(dotted name, node) of the section that describes the configured MODEL.TYPE."""
    name = cfg.MODEL.TYPE.upper()
    return f"MODEL.{name}", cfg.MODEL[name]


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


def check_training(cfg: Any) -> None:
    """The rules of the schedule, the optimizer and the training images."""
    check_schedule(cfg.TRAIN)
    check_optimizer(cfg.TRAIN)
    check_augmentation(cfg)


def is_yaml(name: str) -> bool:
    """Whether a teacher is named by a YAML file, not by timm's name of a model."""
    return name.endswith((".yaml", ".yml"))


def check_teacher(cfg: Any) -> None:
    """A teacher and a kind of distillation come together; a YAML of this repository has no released
    weights.
    """
    distill = cfg.TRAIN.DISTILL
    check_distillation(distill.KIND, distill.TEACHER)
    if distill.KIND == "none":
        check_distillation(distill.KIND, distill.TEACHER_WEIGHTS)
    elif is_yaml(distill.TEACHER) and not distill.TEACHER_WEIGHTS:
        raise ConfigError(
            "TRAIN.DISTILL.TEACHER_WEIGHTS is empty; a teacher from a YAML needs the checkpoint of"
            " its training"
        )


def check_entry(cfg: Any) -> None:
    """An entry is of a file whose weights are taken; a run that goes on takes all of its own."""
    model = cfg.MODEL
    if model.ENTRY and not (model.PRETRAINED or (model.RESUME and cfg.EVAL_MODE)):
        raise ConfigError(
            f"MODEL.ENTRY {model.ENTRY!r} chooses among the weights of a file; give --pretrained"
            " FILE, or --eval --resume FILE"
        )


ALWAYS = (check_data, check_entry, check_stages)
TRAINING = (check_training, check_teacher)


def check_combinations(cfg: Any) -> None:
    """Refuse settings that cannot go together; rules of training do not bind --eval and
    --throughput (a batch of 1, say, is fine there).

    Raises: ConfigError.
    """
    rules = ALWAYS
    if not (cfg.EVAL_MODE or cfg.THROUGHPUT_MODE):
        rules += TRAINING
    try:
        for rule in rules:
            rule(cfg)
        if not cfg.THROUGHPUT_MODE:
            check_image_channels(cfg)
    except UserError as error:
        raise ConfigError(str(error)) from None
