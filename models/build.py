"""MODEL of a config -> model."""

from torch import nn

from registry import UserError

from .base.backbone import BACKBONES
from .base.options import refuse_unread


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
        refuse_unread(config, {name: BACKBONES[name].optional_settings for name in BACKBONES})
        network = family.from_config(config, num_classes)
    except ValueError as error:
        raise ModelError(f"cannot build MODEL.NAME {model.NAME}: {error}") from error
    if model.BN_MOMENTUM is not None:
        set_batch_norm_momentum(network, model.BN_MOMENTUM)
    return network


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
