"""What gpu_kernels.py times of the operation: window attention by several means on the same inputs;
interleaved, medians.

Inputs of an operation rotate through copies that together exceed the second-level cache, so that
each call finds its input in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import copy_rate, interleaved, relative_speed
from kernels.window_attention import BACKENDS, OffsetTerms, relative_position_index, window_layout
from kernels.window_attention.reference import merge_windows, split_windows

CACHE_BYTES = 128 << 20  # more than the second-level cache of any device to date


@dataclass(frozen=True)
class Shape:
    """One stage of a model: grid side, window side, heads of 32 channels. v2: cosine attention, one
    scale a head.
    """

    name: str
    side: int
    window: int
    heads: int
    batch: int
    shift: bool = True
    v2: bool = False
    table: bool = False  # a scale for each offset, which SDPA cannot apply
    compiled: bool = False  # FlexAttention and torch.compile too: half a minute each

    def but(self, **changes) -> "Shape":
        return Shape(**{**vars(self), **changes})


SHAPES = [
    Shape("Swin-T stage 1", 56, 7, 3, 128, compiled=True),
    Shape("Swin-T stage 1, CRPW", 56, 7, 3, 128, table=True, compiled=True),
    Shape("Swin-T stage 3", 14, 7, 12, 128),
    Shape("SwinV2-T w8 stage 1", 64, 8, 3, 128, v2=True),
    Shape("SwinV2-B w16 stage 1", 64, 16, 4, 64, v2=True, compiled=True),
    Shape("SwinV2-B w16 stage 1, CRPW", 64, 16, 4, 64, v2=True, table=True),
    Shape("SwinV2-B w16 stage 3", 16, 16, 16, 64, shift=False, v2=True),
    Shape("SwinV2-B w24 384 stage 1", 96, 24, 4, 16, v2=True),
]
QUICK_SHAPES = [
    Shape("small w7", 14, 7, 2, 2, table=True),
    Shape("small w12", 12, 12, 1, 1, shift=False, v2=True),
]


class Inputs:
    """The tensors of a shape: copies of qkv, its gradient and the tables."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype):
        size = (shape.side, shape.side)
        self.shape, self.heads = shape, shape.heads
        shift = shape.window // 2 if shape.shift else 0
        self.layout = window_layout(
            size, (shape.window, shape.window), (shift, shift), device=torch.device(device)
        )
        width, rows = 32 * shape.heads, (2 * shape.window - 1) ** 2
        bytes_each = shape.batch * shape.side**2 * 3 * width * dtype.itemsize
        copies = max(1, -(-CACHE_BYTES // bytes_each)) if device == "cuda" else 1
        self.qkv = [
            torch.randn(shape.batch, *size, 3 * width, device=device, dtype=dtype)
            for _ in range(copies)
        ]
        self.grad = torch.randn(shape.batch, *size, width, device=device, dtype=dtype)
        factor = 10.0 if shape.v2 else 32**-0.5
        self.scale = factor * (
            1 + 0.1 * torch.randn(rows if shape.table else 1, shape.heads, device=device)
        )
        self.bias = 0.5 * torch.randn(rows, shape.heads, device=device)
        self.turn = 0

    def next(self) -> Tensor:
        """A qkv that was not used of late."""
        self.turn = (self.turn + 1) % len(self.qkv)
        return self.qkv[self.turn]


def backend(name: str) -> Callable:
    """One of the project's implementations as a function of (qkv, scale, bias, inputs)."""

    def call(qkv: Tensor, scale: Tensor, bias: Tensor, inputs: Inputs) -> Tensor:
        return BACKENDS[name](
            qkv,
            OffsetTerms(inputs.layout.window, scale, bias),
            inputs.layout,
            inputs.heads,
            inputs.shape.v2,
        )

    return call


def flex(qkv: Tensor, scale: Tensor, bias: Tensor, inputs: Inputs) -> Tensor:
    """FlexAttention over windows as the batch, terms from the tables, with the copies that it needs
    around it.
    """
    from torch.nn.attention.flex_attention import flex_attention

    layout, index = inputs.layout, relative_position_index(inputs.layout.window, qkv.device)
    scale = scale.expand(len(bias), -1)
    q, k, v = (x.contiguous() for x in split_windows(qkv, layout, inputs.heads))
    if inputs.shape.v2:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))

    def score(logit, window, head, i, j):
        row = index[i, j]
        logit = logit * scale[row, head] + bias[row, head]
        if layout.mask is not None:
            logit = logit + layout.mask[window % layout.num_windows, i, j]
        return logit

    return merge_windows(flex_attention(q, k, v, score_mod=score, scale=1.0), layout)


def contestants(shape: Shape, device: str) -> dict[str, Callable]:
    """The means by which the shape can be computed. sdpa is timm's way: the mask and bias of each
    window formed in memory.
    """
    found = {name: backend(name) for name in ("fused", "reference", "eager")}
    if not shape.table:
        found["sdpa"] = backend("sdpa")
    if shape.compiled and device == "cuda":
        found["reference compiled"] = torch.compile(backend("reference"), dynamic=False)
        found["flex compiled"] = torch.compile(flex, dynamic=False)
    return found


def op_calls(inputs: Inputs, function: Callable) -> dict[str, Callable]:
    """The forward in inference, and forward with backward to qkv, the bias and, unless it is the
    constant scale of V1, the scale.
    """
    learnt = inputs.shape.table or inputs.shape.v2

    def forward() -> None:
        with torch.no_grad():
            function(inputs.next(), inputs.scale, inputs.bias, inputs)

    def both() -> None:
        qkv, scale, bias = (
            t.detach().requires_grad_() for t in (inputs.next(), inputs.scale, inputs.bias)
        )
        scale.requires_grad_(learnt)
        leaves = (qkv, scale, bias) if learnt else (qkv, bias)
        torch.autograd.grad(function(qkv, scale, bias, inputs), leaves, inputs.grad)

    return {"forward": forward, "forward and backward": both}


def time_ops(
    shapes: list[Shape],
    device: str,
    dtype: torch.dtype,
    rounds: int,
    time_is_up: Callable[[], bool],
) -> Iterator[dict]:
    """One row a shape, kind and contestant. The least bytes: q, k, v and the output once, and in
    the backward their gradients too.
    """
    copied = copy_rate(device)
    for shape in shapes:
        if time_is_up():
            yield {"shape": shape.name, "failed": "no time left"}
            continue
        inputs = Inputs(shape, device, dtype)
        calls = {
            name: op_calls(inputs, function)
            for name, function in contestants(shape, device).items()
        }
        tokens = inputs.grad.numel() * dtype.itemsize  # bytes of one tensor of tokens
        for kind, moved in (("forward", 4), ("forward and backward", 4 + 7)):
            found = interleaved({name: call[kind] for name, call in calls.items()}, rounds, device)
            for name, row in found.items():
                rate = moved * tokens / row["ms"] / 1e6 if "ms" in row else None
                yield {
                    "shape": shape.name,
                    "N": shape.window**2,
                    "batch": shape.batch,
                    "kind": kind,
                    "by": name,
                    **row,
                    "speed relative to fused": relative_speed(found, row),
                    "GB/s of the least bytes": rate,
                    "share of a copy's": rate and rate / copied,
                }
        del inputs, calls
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
