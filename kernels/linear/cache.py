"""Values computed from parameters and cached while the parameters stay the same."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")


class EvalCache:
    """Caches one value per name, computed from some tensors, as long as no gradient is recorded and
    the tensors are unchanged.

    Unchanged: the same tensors, not written in place, in the same memory, and no optimizer has made
    a step since. Steps are counted because PyTorch's version counter does not see all writes:
    AdamW(fused=True) leaves it as it is. So does writing through `parameter.data`; `clear` after
    doing so. Copies and pickles of the cache are empty. A forward that records gradients empties
    it.
    """

    steps = 0  # of all optimizers of this process

    def __init__(self):
        self._entries: dict[str, tuple[list, object]] = {}

    def get(self, name: str, sources: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """compute(), or what it returned before for the same `sources`."""
        if torch.compiler.is_compiling():
            return compute()
        if torch.is_grad_enabled():
            self._entries.clear()
            return compute()
        key = [EvalCache.steps, *map(_state, sources)]
        entry = self._entries.get(name)
        if entry is None or not _same(entry[0], key):
            entry = self._entries[name] = (key, compute())
        return entry[1]

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    def __deepcopy__(self, memo: dict) -> "EvalCache":
        return EvalCache()

    def __reduce__(self):
        return EvalCache, ()


def _state(source: Tensor) -> tuple[Tensor, int, int]:
    """What tells an unchanged tensor: itself, its version, its memory."""
    version = 0 if source.is_inference() else source._version
    return source, version, source.data_ptr()


def _same(old: list, new: list) -> bool:
    if old[0] != new[0] or len(old) != len(new):
        return False
    pairs = zip(old[1:], new[1:], strict=True)
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in pairs)


def _count_step(*_) -> None:
    EvalCache.steps += 1


register_optimizer_step_post_hook(_count_step)
