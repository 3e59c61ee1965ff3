"""Weights that come from elsewhere, and parts of a model that set initial values over them."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .errors import CheckpointError


def overwriting_parts(model: nn.Module) -> Iterator[Any]:
    """The modules that hold such parts: `overwriting` names them, `overwrite` sets them again (see
    models.attention.modified).
    """
    return (module for module in model.modules() if getattr(module, "overwriting", ()))


def check_initial(model: nn.Module, consent: bool, weights: str) -> None:
    """Refuses pretrained `weights` (in words) for a model of which a modifier only sets initial
    values: either would undo the other.

    Raises: CheckpointError unless there is `consent`.
    """
    names = {name for module in overwriting_parts(model) for name in module.overwriting}
    if names and not consent:
        listed = ", ".join(sorted(names))
        raise CheckpointError(
            f"{listed} sets initial values of the attention's own weights, {weights} would start"
            f" from others; leave {listed} out of MODEL.ATTENTION.MODIFIERS, or set"
            " MODEL.INIT_OVER_PRETRAINED True to put its values over the pretrained ones"
        )


def overwrite(model: nn.Module) -> list[str]:
    """Sets these initial values again, once weights are loaded. Returns a note for the report, if
    there is something to say.
    """
    parts = list(overwriting_parts(model))
    for module in parts:
        module.overwrite()
    names = sorted({name for module in parts for name in module.overwriting})
    return [f"{', '.join(names)} then set its initial values over them, as asked"] if names else []
