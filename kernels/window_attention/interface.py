"""One operation, several implementations with the same result: which one runs is decided here, and
can be asked for and forced.
"""

import os

import torch
from torch import Tensor

from kernels.derivatives import is_transformed

from .eager import eager_cannot, window_attention_eager
from .epilogue import Epilogue
from .fused import cannot, missing, never, window_attention_fused
from .layout import WindowLayout
from .reference import window_attention_reference, with_endings
from .sdpa import sdpa_cannot, window_attention_sdpa
from .terms import OffsetTerms

BACKENDS = {
    "reference": window_attention_reference,
    "eager": window_attention_eager,
    "sdpa": window_attention_sdpa,
    "fused": window_attention_fused,
}
ENVIRONMENT = "WINDOW_ATTENTION_BACKEND"


def explain(qkv: Tensor, terms: OffsetTerms, dropout: float = 0.0) -> tuple[str, str]:
    """The backend that `window_attention` picks for these arguments when none is forced, and the
    reason.

    Where the fused kernel applies, the first call loads it, and compiles it if need be (see
    kernels/library).
    """
    if is_transformed():
        return "reference", "a transform or forward-mode derivative needs the plain formula"
    unfused = why_not_fused(qkv, terms)
    if unfused is None:
        return "fused", "one compiled operation, which forms no N x N matrix in memory"
    prefix = f"not fused ({unfused})"
    if torch.compiler.is_compiling():
        reason = "under torch.compile the plain formula is what the compiler fuses best"
        return "reference", f"{prefix}, and {reason}"
    if terms.post is not None:
        return "reference", f"{prefix}, and a factor after the softmax needs the softmaxed map"
    uniform = terms.scale.dim() == 2 and terms.scale.shape[0] == 1
    if qkv.device.type == "cuda" and uniform:
        return "sdpa", f"{prefix}; on CUDA, and the scale is one number per head"
    if dropout:
        return "reference", f"{prefix}, and dropout needs the softmaxed map"
    if uniform:
        return "eager", f"{prefix}; SDPA is slower than eager attention here"
    return "eager", f"{prefix}; SDPA has no scale per offset"


def why_never(backend: str, qkv: Tensor, terms: OffsetTerms, dropout: float = 0.0) -> str | None:
    """Why a forced backend cannot do this on any machine, or None."""
    if backend == "sdpa":
        return sdpa_cannot(terms)
    if backend == "eager":
        return eager_cannot(terms, dropout)
    if backend == "fused":
        reason = never(qkv, terms)
        return reason and f"the fused backend does not apply: {reason}"
    return None


def why_not_fused(qkv: Tensor, terms: OffsetTerms) -> str | None:
    """Why the fused kernel is not taken for these arguments on this machine, or None."""
    return cannot(qkv, terms) or missing(qkv.device)


def window_attention(
    qkv: Tensor,
    terms: OffsetTerms,
    layout: WindowLayout,
    num_heads: int,
    cosine: bool = False,
    dropout: float = 0.0,
    backend: str = "auto",
    *,
    epilogue: Epilogue | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within windows: (B, H, W, 3C) -> (B, H, W, C). `window_attention_reference` is the
    specification.

    Args:
        epilogue: what the result gets of each token's own value.
        return_lse: return also the logarithm of each row's sum of exp(logits), bias and mask
            included, (B, H, W, heads), float32 or wider; it is differentiable.
        backend: a name of BACKENDS, or "auto"; the environment variable WINDOW_ATTENTION_BACKEND
            overrides "auto".
    Raises: ValueError for a name that does not exist, and where the forced backend cannot do what
        is asked.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT) or explain(qkv, terms, dropout)[0]
    if backend not in BACKENDS:
        raise ValueError(
            f"window_attention: no backend {backend!r}; there are auto, {', '.join(BACKENDS)}"
        )
    attend = BACKENDS[backend]
    if epilogue is None and not return_lse:
        return attend(qkv, terms, layout, num_heads, cosine, dropout)
    if backend == "fused":
        endings = {"epilogue": epilogue, "return_lse": return_lse}
        return attend(qkv, terms, layout, num_heads, cosine, dropout, **endings)
    y = attend(qkv, terms, layout, num_heads, cosine, dropout)
    return with_endings(y, qkv, terms, layout, num_heads, cosine, epilogue, return_lse)
