"""Tensors of a file that cannot be weights: without numbers, in another form, or not finite."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import CheckpointError, list_keys

REPEATS = 1 << 20  # elements up to which a tensor may be wider than its memory


def check_form(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError where a tensor is not a plain array with memory of its own."""
    for name, tensor in tensors.items():
        if problem := odd_form(tensor):
            raise CheckpointError(
                f"{source}: {name} is {problem}; save plain tensors where it was made"
            )


def odd_form(tensor: Tensor) -> str:
    """What keeps a tensor from being a plain array, in words; "" where nothing does."""
    if tensor.is_meta:
        return "a tensor without numbers (on the meta device)"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"not dense ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_quantized:
        return f"quantised ({str(tensor.dtype).removeprefix('torch.')})"
    needed = tensor.numel() * tensor.element_size()
    if tensor.numel() > REPEATS and tensor.untyped_storage().nbytes() < needed:
        return f"one of {tensor.numel():,} elements made of fewer numbers"
    return ""


def same_kind(given: Tensor, wanted: Tensor) -> bool:
    """Whether numbers of one may become those of the other: real for real, whole for whole."""

    def kind(tensor: Tensor) -> tuple[bool, bool, bool]:
        return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool

    return kind(given) == kind(wanted)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError that names the tensors that hold NaN or infinity."""
    broken = [name for name, tensor in tensors.items() if not is_finite(unmasked(name, tensor))]
    if broken:
        raise CheckpointError(
            f"{source}: {list_keys(broken, limit=3)} holds NaN or infinity: the training that wrote"
            " it had diverged; take an earlier checkpoint"
        )


def unmasked(name: str, tensor: Tensor) -> Tensor:
    """The tensor without the -inf by which an attention mask hides padding."""
    if name.rpartition(".")[2] != "attn_mask" or not tensor.is_floating_point():
        return tensor
    return tensor.masked_fill(tensor == -torch.inf, 0)


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is a number."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
