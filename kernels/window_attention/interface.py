"""One operation, several implementations with the same result: which one runs is decided here, and can be asked for and forced."""

import os

import torch
from torch import Tensor

from .eager import window_attention_eager
from .layout import WindowLayout
from .reference import window_attention_reference
from .sdpa import window_attention_sdpa
from .terms import OffsetTerms

# A fused kernel joins here under its own name, and in `explain` with the conditions under which it applies.
BACKENDS = {"reference": window_attention_reference, "eager": window_attention_eager, "sdpa": window_attention_sdpa}
ENVIRONMENT = "WINDOW_ATTENTION_BACKEND"


def explain(qkv: Tensor, terms: OffsetTerms, dropout: float = 0.0) -> tuple[str, str]:
    """The backend that `window_attention` picks for these arguments when none is forced, and the reason."""
    if torch.compiler.is_compiling():
        return "reference", "under torch.compile the plain formula is what the compiler fuses best"
    if terms.post is not None:
        return "reference", "a weight after the softmax needs the softmaxed map"
    uniform = terms.weight.dim() == 2 and terms.weight.shape[0] == 1
    if qkv.device.type == "cuda" and uniform:
        return "sdpa", "on CUDA, and the weight is one number per head"
    if dropout:
        return "reference", "dropout of the map"
    return "eager", "the weight differs between offsets" if not uniform else "not on CUDA, where eager attention is faster than SDPA"


def window_attention(qkv: Tensor, terms: OffsetTerms, layout: WindowLayout, num_heads: int, cosine: bool = False,
                     dropout: float = 0.0, backend: str = "auto") -> Tensor:
    """Attention within windows: (B, H, W, 3C) -> (B, H, W, C). `window_attention_reference` is the specification.

    Args:
        backend: a name of BACKENDS, or "auto"; the environment variable WINDOW_ATTENTION_BACKEND overrides "auto".
    Raises: ValueError for a name that does not exist, and where the forced backend cannot do what is asked.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT) or explain(qkv, terms, dropout)[0]
    if backend not in BACKENDS:
        raise ValueError(f"window_attention: no backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](qkv, terms, layout, num_heads, cosine, dropout)
