"""A teacher for distillation from timm's collection."""

import timm
from torch import nn

from registry import did_you_mean
from utils import RunError


def check_timm_teacher(name: str, weights: str = "") -> None:
    """weights: as in `timm_teacher`. Raises: RunError for a name, or the tag of released weights,
    that timm does not know.
    """
    if not timm.is_model(name.split(".")[0]):
        guess = did_you_mean(name, timm.list_models())
        raise RunError(
            f"TRAIN.DISTILL.TEACHER {name}: neither a YAML file nor a model of timm{guess}"
        )
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and not weights and tag not in tags:
        raise RunError(
            f"TRAIN.DISTILL.TEACHER {name}: timm has no weights {tag!r} of {architecture}; it has"
            f" {', '.join(tags) or 'none'}{did_you_mean(tag, tags)}"
        )


def timm_teacher(name: str, weights: str, num_classes: int) -> nn.Module:
    """The timm model `name` with `num_classes` outputs. weights: a file; '': the released ones,
    fetched by timm.

    Raises: RunError for an unknown name or weights that cannot be loaded.
    """
    check_timm_teacher(name, weights)
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
