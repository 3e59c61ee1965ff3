"""What a run would refuse, told before it begins: settings first, then the files that they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint import check_file, check_initial
from data.build import check_transforms
from engine.teacher import check_timm_teacher
from lr_scheduler import build_schedule, scaled_rates
from models import build_model
from models.attention.report import check_backends, check_kernel
from optimizer import build_optimizer
from registry import UserError
from settings.kinds import ConfigError
from settings.rules import is_yaml


def check_settings(config: Any) -> None:
    """Refuses every name, value and combination that a run with these settings would refuse.

    Builds the parts of the run with the model on the meta device, so that it takes neither memory
    nor time; it looks at no file, no data set and no device.
    Raises: UserError, one line.
    """
    model = draft_model(config)
    _as_setting(check_backends, model)
    if config.THROUGHPUT_MODE:
        return
    check_transforms(config, train=not config.EVAL_MODE)
    if config.EVAL_MODE:
        check_weights_are_given(config)
        return
    if config.MODEL.PRETRAINED and not config.MODEL.RESUME:
        check_initial(model, config.MODEL.INIT_OVER_PRETRAINED, "MODEL.PRETRAINED")
    rates = scaled_rates(config, world_size=1)
    build_optimizer(config, model, rates.base)
    build_schedule(config, updates_per_epoch=1, rates=rates)
    distill = config.TRAIN.DISTILL
    if distill.KIND != "none" and not is_yaml(distill.TEACHER):
        check_timm_teacher(distill.TEACHER, distill.TEACHER_WEIGHTS)


def check_on_device(model: nn.Module) -> None:
    """Refuses a forced backend that this machine does not have; `model` is on its device, and this
    within its autocast. Raises: ConfigError.
    """
    _as_setting(check_kernel, model)


def _as_setting(check: Callable[[nn.Module], None], model: nn.Module) -> None:
    try:
        check(model)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def draft_model(config: Any) -> nn.Module:
    """The configured model on the meta device, in the mode of the run: shapes and names, without
    numbers. Where the classes are counted in the data it has two.

    Raises: UserError, also where sizes go beyond what torch can count.
    """
    try:
        with torch.device("meta"):
            model = build_model(config, config.MODEL.NUM_CLASSES or 2)
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(
            f"MODEL.TYPE {config.MODEL.TYPE}: a model with these settings cannot be built"
            f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    return model.train(not (config.EVAL_MODE or config.THROUGHPUT_MODE))


def check_weights_are_given(config: Any) -> None:
    """An evaluation needs weights."""
    if not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        best = Path(config.OUTPUT) / "best.pth"
        raise ConfigError(
            f"--eval needs weights: give --resume CHECKPOINT (such as {best}) or --pretrained"
            " WEIGHTS"
        )


def check_files(config: Any, read: Callable[[str], Any]) -> None:
    """Refuses files of weights that are not there, damaged as far as a short look tells, or without
    the entry, and a teacher's YAML that cannot be used. URLs are left to the run. `read` makes a
    configuration of a YAML.

    Raises: UserError, one line.
    """
    if config.THROUGHPUT_MODE:
        return
    model, evaluate = config.MODEL, config.EVAL_MODE
    entry = model.ENTRY or None
    sources = [
        (model.RESUME, entry if evaluate else None),
        (model.PRETRAINED, None if evaluate and model.RESUME else entry),
    ]
    if not evaluate:
        sources.append((config.TRAIN.DISTILL.TEACHER_WEIGHTS, None))
        check_teacher_file(config.TRAIN.DISTILL.TEACHER, read)
    for source, chosen in sources:
        if source and "://" not in source:
            check_file(source, chosen, run=source == model.RESUME and not evaluate)


def check_teacher_file(teacher: str, read: Callable[[str], Any]) -> None:
    """The YAML of a teacher describes a model that can be built."""
    if not is_yaml(teacher):
        return
    if not Path(teacher).is_file():
        raise ConfigError(
            f"TRAIN.DISTILL.TEACHER: {teacher!r} is not a file; allowed: a timm model's name or a"
            " YAML of this repository"
        )
    draft_model(read(teacher))
