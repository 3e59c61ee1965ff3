"""Weights prepared once for many forwards, inside `evaluation(model)` and nowhere else."""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .watched import are_all_hooked, is_observed, is_ordinary

T = TypeVar("T")

_thread = threading.local()  # .open: the evaluations that this thread has entered
_lock = threading.Lock()
_everywhere: list["Evaluation"] = []  # those of all threads
_after_steps = None  # the handle of the hook that drops what a step of an optimizer makes stale


class EvalCache:
    """Values by name, each computed from some tensors and kept while these stay as they are: the
    same tensors, in the same memory, not written in place.

    What PyTorch's version counter does not see makes a value stale: writes through
    `parameter.data` or a NumPy view, and fused optimizers. `clear` after these. A copy or a pickle
    is empty.
    """

    def __init__(self):
        self._entries: dict[Hashable, tuple[list, list, object]] = {}

    def get(self, name: Hashable, sources: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """compute(), or what it returned before for the same `sources`."""
        if not all(map(is_ordinary, sources)):
            return compute()
        state = [(source, source._version, source.data_ptr()) for source in sources]
        entry = self._entries.get(name)
        if entry is None or not _same(entry[0], state):
            # The memory is held, so that no other tensor can come to lie at its address.
            memory = [source.untyped_storage() for source in sources]
            entry = self._entries[name] = (state, memory, compute())
        return entry[2]

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    def __deepcopy__(self, memo: dict) -> "EvalCache":
        return EvalCache()

    def __reduce__(self):
        return EvalCache, ()


def _same(old: list, new: list) -> bool:
    if len(old) != len(new):
        return False
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new, strict=True))


class Evaluation:
    """See `evaluation`."""

    def __init__(self, models: Sequence[nn.Module]):
        for model in models:
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"evaluation(...) takes modules, not {type(model).__name__}; pass the model"
                )
        self._models = models
        self._caches: dict[int, EvalCache] = {}  # by the id of a module of the models
        self._modules: list[nn.Module] = []  # which keeps the ids their own

    def __enter__(self) -> "Evaluation":
        global _after_steps
        with _lock:
            if self not in _everywhere:
                self._modules = [module for model in self._models for module in model.modules()]
                self._caches = {id(module): EvalCache() for module in self._modules}
            _everywhere.append(self)
            if _after_steps is None:
                _after_steps = register_optimizer_step_post_hook(_forget_all)
        _thread.open = (*_opened(), self)
        self.clear()
        return self

    def __exit__(self, *_) -> None:
        global _after_steps
        self.clear()
        left = list(_opened())
        left.remove(self)
        _thread.open = tuple(left)
        with _lock:
            _everywhere.remove(self)
            if self not in _everywhere:
                self._modules = []
                self._caches = {}
            if not _everywhere:
                _after_steps.remove()
                _after_steps = None

    def clear(self) -> None:
        """Forgets what is prepared, in contexts around this one too; the next forward prepares it
        anew.
        """
        _forget_all()

    def forget(self) -> None:
        """Forgets what is prepared here."""
        for cache in list(self._caches.values()):
            cache.clear()

    def cache(self, module: nn.Module) -> EvalCache | None:
        """What is kept for a module of the models; None for another module."""
        return self._caches.get(id(module))


def evaluation(*models: nn.Module) -> Evaluation:
    """A context in which forwards of `models` without gradients use weights that are prepared once:
    cast, with the modifiers in them, in the layout of the product.

        with evaluation(model), torch.inference_mode():
            logits = model.eval()(images)

    Outside, and in other threads than the one that entered, every forward reads the weights as they
    are. So does it inside for what is hooked, parametrised, replaced or observed by a compiler or a
    dispatch mode, and for modules that were not part of `models` at the start.

    Seen inside: new tensors, new memory, writes in place, steps of optimizers. Not seen: writes
    through `parameter.data`, a NumPy view or another process, and new values of what is neither
    parameter nor buffer; call `clear()` of what the context returns after these, or leave it.
    Entering and leaving drop what was prepared, in contexts around this one too.

    Raises: TypeError for what is no module.
    """
    return Evaluation(models)


def may_prepare_weights() -> bool:
    """Whether forwards in an evaluation may use prepared weights: this thread has entered one, no
    gradients are recorded, and nothing looks at single operations or at all modules.
    """
    watched = torch.is_grad_enabled() or is_observed() or are_all_hooked()
    return bool(_opened()) and not watched


def kept_for(module: nn.Module) -> EvalCache | None:
    """Where a forward of `module` may keep what it prepares: in an evaluation that this thread has
    entered and that it is part of. None where weights must not be prepared; while gradients are
    recorded it is emptied too.
    """
    opened = _opened()
    if not opened or torch.compiler.is_compiling():
        return None
    cache = next((cache for one in opened if (cache := one.cache(module)) is not None), None)
    if cache is not None and torch.is_grad_enabled():
        cache.clear()
    return cache if may_prepare_weights() else None


def _opened() -> tuple[Evaluation, ...]:
    return getattr(_thread, "open", ())


def _forget_all(*_) -> None:
    """Empties all evaluations; also after a step of any optimizer, for fused ones write without
    counting it.
    """
    with _lock:
        opened = list(_everywhere)
    for one in opened:
        one.forget()
