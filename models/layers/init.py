"""Initial values of parameters, and random numbers that leave everybody else's untouched."""

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from kernels.modes import is_fake


def trunc_normal(tensor: Tensor, std: float) -> Tensor:
    """Normal(0, std) cut at +-2 (not at 2 std: Swin's rule); exactly 0 where std is 0. Fake
    tensors have no values to draw.
    """
    if not std:
        return nn.init.zeros_(tensor)
    return tensor if is_fake(tensor) else nn.init.trunc_normal_(tensor, std=std)


def set_values(parts: Iterable[Tensor], values: Callable[[], Iterable[Tensor]]) -> None:
    """Copies `values()` into `parts`, one each, with no gradient to be recorded. They are not even
    computed for parts without values of their own (meta, fake), which are written all the same, so
    that the change shows.
    """
    parts = list(parts)
    if any(part.is_meta or is_fake(part) for part in parts):
        for part in parts:
            part.zero_()
        return
    for part, value in zip(parts, values(), strict=True):
        part.copy_(value)


def init_linear_and_norm(module: nn.Module) -> None:
    """Swin's rule: Linear and Conv1d weights trunc_normal 0.02 and biases 0, LayerNorm 1
    and 0; convolutions keep PyTorch's.
    """
    if isinstance(module, (nn.Linear, nn.Conv1d)):
        trunc_normal(module.weight, 0.02)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.LayerNorm)) and module.bias is not None:
        nn.init.zeros_(module.bias)


@contextlib.contextmanager
def own_random_numbers(name: str) -> Iterator[None]:
    """Inside, numbers follow from the global seed and `name`; outside, the stream goes on as if
    nothing had happened.

    An addition that is built inside leaves all other initial weights of the model as they were
    without it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
        yield
