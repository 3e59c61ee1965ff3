"""Values that follow from parameters and are kept while the parameters stay the same."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class EvalCache:
    """Keeps one value per name, computed from some tensors, as long as no gradient is recorded and the tensors are unchanged.

    Unchanged: the same tensors, not written in place, in the same memory. Copies and pickles of the cache are empty.
    Writing through `parameter.data` is invisible to PyTorch's version counter; `clear` after doing so.
    """

    def __init__(self):
        self._kept: dict[str, tuple] = {}

    def get(self, name: str, sources: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """compute(), or what it returned before for the same `sources`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        key = [(source, source._version if not source.is_inference() else 0, source.data_ptr()) for source in sources]
        kept = self._kept.get(name)
        if kept is None or not _same(kept[0], key):
            kept = self._kept[name] = (key, compute())
        return kept[1]

    def clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()

    def __deepcopy__(self, memo: dict) -> "EvalCache":
        return EvalCache()

    def __reduce__(self):
        return EvalCache, ()


def _same(old: list[tuple], new: list[tuple]) -> bool:
    return len(old) == len(new) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new, strict=True))
