"""A teacher for distillation from timm's collection."""

import timm
from torch import nn

from registry import did_you_mean
from utils import RunError


def check_timm_teacher(name: str) -> None:
    """Raises: RunError for a name that timm does not know."""
    if not timm.is_model(name.split(".")[0]):
        guess = did_you_mean(name, timm.list_models())
        raise RunError(
            f"TRAIN.DISTILL.TEACHER {name}: neither a YAML file nor a model of timm{guess}"
        )


def timm_teacher(name: str, weights: str, num_classes: int) -> nn.Module:
    """The timm model `name` with `num_classes` outputs. weights: a file; '': the released ones,
    fetched by timm.

    Raises: RunError for an unknown name or weights that cannot be loaded.
    """
    check_timm_teacher(name)
    try:
        return timm.create_model(
            name,
            pretrained=not weights,
            num_classes=num_classes,
            checkpoint_path=weights,
        )
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"TRAIN.DISTILL.TEACHER {name}: its weights ({weights or 'released by timm'}) cannot be"
            f" loaded: {' '.join(str(error).split())[:300]}"
        ) from error
