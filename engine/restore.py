"""Whether what a checkpoint holds fits this run, as far as the file alone cannot tell."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from checkpoint import CheckpointError
from checkpoint.soundness import same_kind
from registry import UserError

# What optimizers keep in the shape of the parameter, among what they keep.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")

# What torch, numpy and random raise for a state that they cannot use.
REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def restoring(entry: str) -> Iterator[None]:
    """Turns what goes wrong while an entry is put back into a CheckpointError that names it."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except REFUSALS as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the checkpoint's {entry} cannot be put back ({type(error).__name__}: {reason});"
            " resume from another checkpoint, or start from the weights with --pretrained"
        ) from error


def check_kinds(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError where whole numbers stand for real ones, or the other way round; torch
    would convert them without a word.
    """
    for name, tensor in model.state_dict().items():
        if name in saved and not same_kind(saved[name], tensor):
            given, wanted = (str(t.dtype).removeprefix("torch.") for t in (saved[name], tensor))
            raise CheckpointError(
                f"the checkpoint's {name} is of type {given}, that of the model {wanted}; resume"
                " from another checkpoint"
            )


def check_shapes(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises CheckpointError where a moment does not have the shape of its parameter; torch itself
    would find out in the next update, or not at all.
    """
    for name, parameter in model.named_parameters():
        kept = optimizer.state.get(parameter, {})
        for moment in [moment for moment in MOMENTS if moment in kept]:
            shape = tuple(kept[moment].shape)
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"the checkpoint's optimizer has {moment} of shape {shape} for {name}, which is"
                    f" {tuple(parameter.shape)}; resume from another checkpoint, or start from the"
                    " weights with --pretrained"
                )


def without_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[str, nn.Parameter]]:
    """Trained parameters of which the optimizer keeps nothing although it does of others. Such a
    parameter had no gradient so far, or its moments are lost.
    """
    if not optimizer.state:
        return []
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    return [
        (name, p)
        for name, p in model.named_parameters()
        if p in trained and p not in optimizer.state
    ]


def refuse_lost_moments(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raises CheckpointError where one of `parameters` now has a gradient: its moments are lost."""
    lost = [name for name, parameter in parameters if parameter.grad is not None]
    if lost:
        raise CheckpointError(
            f"the checkpoint's optimizer has no moments of {lost[0]} ({len(lost)} in all), which"
            " has a gradient; resume from another checkpoint, or start from the weights with"
            " --pretrained"
        )
