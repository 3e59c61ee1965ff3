"""The projection of tokens to queries, keys and values, with what modifiers do to it."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from kernels.linear import (
    EvalCache,
    PreparedLinear,
    computed_in,
    is_cpu_inference,
    is_plain,
    kept_for,
    linear,
    result_dtype,
)

from .geometry import Geometry
from .modified import Modified
from .modifiers import ProjectionModifier

T = TypeVar("T")
# per channel: below, adding the input to q and k touches fewer numbers than adding the identity to
# a (3C, C) weight
FEW_TOKENS = 1.5


class Projection(Modified):
    """Base of softmax attention: holds `qkv`, a linear layer (..., C) -> (..., 3C) or what stands
    in its place.
    """

    geometry: Geometry
    qkv: nn.Module

    def extra_bias(self) -> Tensor | None:
        """(3C,) bias of q, k and v beside that of `qkv`, or None."""
        return None

    def extra_bias_parameters(self) -> list[Tensor | None]:
        """The parameters that `extra_bias` reads."""
        return []

    def packed_bias(self) -> Tensor | None:
        """(3C,) bias of q, k and v, or None."""
        own, extra = self._own_bias(), self.extra_bias()
        if own is None or extra is None:
            return own if extra is None else extra
        return own + extra

    def _projection(self, fold: bool) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of q, k and v, with what the modifiers do to the bias and, where they
        `fold`, to the weight.
        """
        weight = self.qkv.weight
        bias = self.packed_bias()
        for modifier in self._stage(ProjectionModifier):
            bias = modifier.fold_bias(bias)
            if fold:
                weight = modifier.fold(weight)
        return weight, bias

    def _folds(self, x: Tensor, cache: EvalCache | None) -> bool:
        """Whether projection modifiers change the weight, not the projected tokens.

        They do so inside `evaluation`, where that is done once, and on a GPU, where passes over the
        tokens cost most; else on the CPU where the weight keeps its full precision, unless there
        are so few tokens that adding to the tokens is the smaller work.
        """
        own = self.qkv.weight.dtype
        wide = torch.float64 if own == torch.float64 else torch.float32
        if own != wide:
            return False
        if cache is not None or x.device.type != "cpu":
            return True
        exact = computed_in(result_dtype(x), x.device.type) == wide
        return exact and x.numel() > FEW_TOKENS * self.dim * self.dim

    def project(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3C): q, then k, then v."""
        if not is_plain(self.qkv):
            return self._project_by_calling(x)
        cache = kept_for(self)
        fold = self._folds(x, cache)
        place = (result_dtype(x), x.device.type)
        if cache is not None:
            qkv = self._prepared(cache, fold, *place)(x)
        elif is_cpu_inference(x):
            qkv = PreparedLinear(*self._projection(fold), *place, calls="one")(x)
        else:
            qkv = linear(x, *self._projection(fold))
        return qkv if fold else self._add(x, qkv)

    def _add(self, x: Tensor, qkv: Tensor) -> Tensor:
        """What the projection modifiers add to the projected tokens; may work in place on them."""
        for modifier in self._stage(ProjectionModifier):
            qkv = modifier.add(x, qkv)
        return qkv

    def _project_by_calling(self, x: Tensor) -> Tensor:
        """The same where `qkv` is hooked, parametrised or replaced: it is called, and what it
        returns may be seen by others, so nothing is done in place.
        """
        qkv = self.qkv(x)
        own, bias = self._own_bias(), self.packed_bias()
        for modifier in self._stage(ProjectionModifier):
            bias = modifier.fold_bias(bias)
        if bias is own:
            return self._add(x, qkv.clone()) if len(self.modifiers) > 0 else qkv
        change = bias if own is None else bias - own
        return self._add(x, qkv + change.to(qkv.dtype))

    def _own_bias(self) -> Tensor | None:
        """The bias of what stands in place of `qkv`. Raises: ValueError where a modifier would
        change it and it cannot be found.
        """
        if hasattr(self.qkv, "bias"):
            bias = self.qkv.bias
            return bias() if callable(bias) else bias  # quantized layers have a method
        ones = torch.ones(3 * self.geometry.inner)
        for modifier in self._stage(ProjectionModifier):
            if modifier.fold_bias(ones) is not ones:
                raise ValueError(
                    f"{type(modifier).__name__} changes the bias of attn.qkv, and"
                    f" {type(self.qkv).__name__} in its place has no attribute `bias`; give it one,"
                    " a tensor (3C,) or None"
                )
        return None

    def _prepared(
        self, cache: EvalCache, fold: bool, dtype: torch.dtype, device: str
    ) -> PreparedLinear:
        """The projection for evaluation, kept while the parameters stay the same."""
        sources = [self.qkv.weight, *present([self.qkv.bias, *self.extra_bias_parameters()])]
        modifiers = self._stage(ProjectionModifier)
        for modifier in modifiers:
            sources += [*modifier.parameters(), *modifier.buffers()]
        return cache.get(
            ("projection", *modifiers, fold, dtype, device),
            sources,
            lambda: PreparedLinear(*self._projection(fold), dtype, device),
        )


def present(values: Iterable[T | None]) -> list[T]:
    """Those that are not None."""
    return [value for value in values if value is not None]
