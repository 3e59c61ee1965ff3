"""In which precision a product is computed, and how much of it at a time.

A processor without 16-bit arithmetic multiplies 16-bit matrices several times slower than float32
ones (PyTorch takes them apart in every product). There the product is computed in float32, with
weights that are not rounded, and its result is rounded to 16 bits once: never less exact than the
16-bit product.
"""

import platform
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.modes import autocast_dtype

# What is converted from or to 16 bits is worked on in chunks of this size, which stay in the cache;
# from 32 MiB on the C library would map and clear fresh pages for every such matrix.
CHUNK_BYTES = 4 << 20
FEWEST_ROWS = 64  # of a chunk


def _slow_dtypes() -> frozenset[torch.dtype]:
    """16-bit dtypes that this processor has no arithmetic for; none on other than x86-64."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    has_bfloat16 = _answers(torch.cpu, "_is_avx512_bf16_supported") or _answers(
        torch.cpu, "_is_amx_tile_supported"
    )
    has_float16 = torch.backends.mkldnn.is_available() and _answers(
        torch.ops.mkldnn, "_is_mkldnn_fp16_supported"
    )
    arithmetic = {torch.bfloat16: has_bfloat16, torch.float16: has_float16}
    return frozenset(dtype for dtype, available in arithmetic.items() if not available)


def _answers(place: object, question: str) -> bool:
    """PyTorch's answer; a version that does not know the question is taken to say yes."""
    return getattr(place, question, lambda: True)()


WIDENED = _slow_dtypes()  # what is multiplied in float32 on the CPU


def result_dtype(x: Tensor) -> torch.dtype:
    """Of a product with x: autocast's where it is on (it leaves float64 alone), else that of x.

    Raises: TypeError for integers, which a product would round the weights to.
    """
    if not x.is_floating_point():
        given = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"a linear layer got {given}; its input must be floating point")
    autocast = autocast_dtype(x.device.type)
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


def computed_in(dtype: torch.dtype, kind: str) -> torch.dtype:
    """The dtype of the operands of a product whose result has `dtype`, on devices of `kind`."""
    return torch.float32 if kind == "cpu" and dtype in WIDENED else dtype


def describe_products(dtype: torch.dtype, kind: str) -> str | None:
    """A line for a log where linear layers do not compute in autocast's dtype, else None."""
    if computed_in(dtype, kind) == dtype:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"products: this processor has no {name} arithmetic; linear layers compute in float32,"
        f" their results are {name}"
    )


def row_chunks(rows: int, width: int, inner: torch.dtype) -> Iterator[slice]:
    """Slices of `rows` rows of `width` numbers of dtype `inner`, each of about CHUNK_BYTES."""
    step = max(FEWEST_ROWS, CHUNK_BYTES // (width * inner.itemsize))
    return (slice(start, start + step) for start in range(0, rows, step))
