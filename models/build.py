"""MODEL of a config -> model."""

from torch import nn

from registry import UserError

from .base.backbone import BACKBONES
from .base.options import NEUTRAL, WHY_NOT


class ModelError(UserError, ValueError):
    """A model that cannot be built as configured."""


def build_model(config, num_classes: int | None = None) -> nn.Module:
    """The model that MODEL describes, with `num_classes` outputs (default: MODEL.NUM_CLASSES), on
    the CPU, in training mode.

    Raises: ModelError with the reason.
    """
    model = config.MODEL
    if num_classes is None:
        num_classes = model.NUM_CLASSES
    try:
        family = BACKBONES[model.TYPE]
        refuse_unread(config)
        network = family.from_config(config, num_classes)
    except ValueError as error:
        raise ModelError(f"cannot build MODEL.NAME {model.NAME}: {error}") from error
    if model.BN_MOMENTUM is not None:
        set_batch_norm_momentum(network, model.BN_MOMENTUM)
    return network


def refuse_unread(config) -> None:
    """Raises ValueError for a setting that MODEL.TYPE does not read and that asks for something."""
    family = config.MODEL.TYPE
    for key, neutral in NEUTRAL.items():
        value = config
        for name in key.split("."):
            value = value[name]
        if key in BACKBONES[family].optional_settings or value == neutral:
            continue
        *first, last = [name for name in BACKBONES if key in BACKBONES[name].optional_settings]
        readers = f"{', '.join(first)} and {last}" if first else last
        reason = WHY_NOT.get(key, "has no such part")
        raise ValueError(f"{key} {value} is for {readers}; {family} {reason}: set it to {neutral}")


def set_batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """running <- (1 - momentum) running + momentum batch, in every BatchNorm of `model`.

    Raises: ModelError if it has none.
    """
    norms = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    if not norms:
        raise ModelError(
            f"MODEL.BN_MOMENTUM {momentum}: {type(model).__name__} has no BatchNorm; set it to None"
        )
    for norm in norms:
        norm.momentum = momentum
