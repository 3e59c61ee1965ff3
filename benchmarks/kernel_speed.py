"""What gpu_kernels.py times: window attention by several means on the same inputs, and whole
models; interleaved, medians.

Inputs of an operation rotate through copies that together exceed the second-level cache, so that
each call finds its input in memory.
"""

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.window_attention import BACKENDS, OffsetTerms, relative_position_index, window_layout
from kernels.window_attention.interface import ENVIRONMENT
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
        return (
            logit if layout.mask is None else logit + layout.mask[window % layout.num_windows, i, j]
        )

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


def clock(device: str) -> Callable[[Callable], float]:
    """A function that returns the seconds that a call takes on the device."""
    if device == "cpu":

        def on_cpu(call: Callable) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return on_cpu

    def on_cuda(call: Callable) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(
            10_000_000
        )  # 5 ms, so that the launches are queued before the first one runs
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    return on_cuda


def interleaved(
    calls: dict[str, Callable], rounds: int, device: str, warm_up: int = 3
) -> dict[str, dict]:
    """{"ms": median, "least": } of each, each round in another order; one that fails has {"failed":
    its reason}.
    """
    timer, seconds, failed = clock(device), {name: [] for name in calls}, {}
    for turn in range(-warm_up, rounds):
        names = [name for name in calls if name not in failed]
        for name in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
            try:
                took = timer(calls[name])
            except Exception as error:  # a competitor that cannot do the shape must not end the run
                first_line = (str(error).strip().splitlines() or [""])[0]
                failed[name] = f"{type(error).__name__}: {first_line}"[:160]
                continue
            if turn >= 0:
                seconds[name].append(took)
    done = {name: values for name, values in seconds.items() if name not in failed}
    rows = {
        name: {"ms": 1e3 * statistics.median(values), "least": 1e3 * min(values)}
        for name, values in done.items()
    }
    return {**rows, **{name: {"failed": reason} for name, reason in failed.items()}}


def copy_rate(device: str, repeats: int = 5) -> float:
    """GB/s, read and written, of a copy of a gigabyte (on the CPU 64 MiB): what memory allows."""
    source = torch.randn((1 << 28) if device == "cuda" else 1 << 24, device=device)
    target, timer = torch.empty_like(source), clock(device)
    seconds = [timer(lambda: target.copy_(source)) for _ in range(repeats)]
    return 2 * source.nbytes / min(seconds[1:]) / 1e9


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
                speed = (
                    found["fused"]["ms"] / row["ms"]
                    if "ms" in row and "ms" in found["fused"]
                    else None
                )
                rate = moved * tokens / row["ms"] / 1e6 if "ms" in row else None
                yield {
                    "shape": shape.name,
                    "N": shape.window**2,
                    "batch": shape.batch,
                    "kind": kind,
                    "by": name,
                    **row,
                    "speed relative to fused": speed,
                    "GB/s of the least bytes": rate,
                    "share of a copy's": rate and rate / copied,
                }
        del inputs, calls
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """All window attention by one backend."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = name
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT)
        if before is not None:
            os.environ[ENVIRONMENT] = before


class Family(NamedTuple):
    """A model of the project (a function of its attention), on images of side x side, and timm's
    name for its counterpart.
    """

    side: int
    batch: int
    make: Callable
    counterpart: str | None


def families(quick: bool) -> dict[str, Family]:
    """What is timed as whole models."""
    from models import SwinTransformer, SwinTransformerV2

    if quick:
        small = {
            "embed_dim": 32,
            "depths": (2,),
            "num_heads": (1,),
            "num_classes": 10,
            "drop_path_rate": 0.0,
        }
        return {
            "one stage, w7": Family(56, 2, functools.partial(SwinTransformer, 56, **small), None)
        }
    base = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    v2 = functools.partial(SwinTransformerV2, 256, drop_path_rate=0.0)
    return {
        "Swin-T": Family(
            224,
            128,
            functools.partial(SwinTransformer, drop_path_rate=0.0),
            "swin_tiny_patch4_window7_224",
        ),
        "SwinV2-T w8": Family(
            256, 128, functools.partial(v2, window_size=8), "swinv2_tiny_window8_256"
        ),
        "SwinV2-B w16": Family(
            256, 64, functools.partial(v2, window_size=16, **base), "swinv2_base_window16_256"
        ),
    }


def steps_of(
    model: torch.nn.Module, images: Tensor, how: str | None = None, compiled: bool = False
) -> dict[str, Callable]:
    """Inference and a training step (AdamW) under bfloat16 autocast; how: the backend of the
    project's models.
    """
    kind = images.device.type
    targets = torch.arange(len(images), device=images.device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=kind == "cuda" or None)
    choice = contextlib.nullcontext if how is None else functools.partial(forced, how)
    call = torch.compile(model, dynamic=False) if compiled else model

    def infer() -> None:
        model.eval()
        with choice(), torch.no_grad(), torch.autocast(kind, torch.bfloat16):
            call(images)

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        with choice(), torch.autocast(kind, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(call(images), targets)
        with choice():
            loss.backward()
        optimizer.step()

    return {"inference": infer, "training step": train}


def rivals(family: Family, images: Tensor) -> dict[str, dict[str, Callable]]:
    """Each model run eagerly: {who: {kind: step}}."""
    from models.attention import AttentionSpec

    device = images.device
    own = family.make().to(device)
    found = {how: steps_of(own, images, how) for how in ("fused", "reference", "eager")}
    sharpened = AttentionSpec(("qk_residual", "crpw"))
    found["fused, QK residual + CRPW"] = steps_of(
        family.make(attention=sharpened).to(device), images, "fused"
    )
    if family.counterpart:
        import timm

        found["timm"] = steps_of(
            timm.create_model(family.counterpart, drop_path_rate=0.0).to(device), images
        )
    return found


def compiled_rivals(family: Family, images: Tensor) -> dict[str, dict[str, Callable]]:
    """Each model through torch.compile, and the project's without it."""
    device = images.device
    found = {
        "fused": steps_of(family.make().to(device), images),
        "fused, compiled": steps_of(family.make().to(device), images, compiled=True),
    }
    if family.counterpart:
        import timm

        found["timm, compiled"] = steps_of(
            timm.create_model(family.counterpart, drop_path_rate=0.0).to(device),
            images,
            compiled=True,
        )
    return found


def peak(call: Callable, device: str) -> float | None:
    """MiB that a call needs at most beyond what is held, or None where it fails or the device does
    not say.
    """
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        call()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return None
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def time_models(
    device: str,
    rounds: int,
    quick: bool,
    time_is_up: Callable[[], bool],
    entrants: Callable = rivals,
) -> Iterator[dict]:
    """One row a model, kind and entrant."""
    for name, family in families(quick).items():
        if time_is_up():
            yield {"model": name, "failed": "no time left"}
            continue
        images = torch.randn(family.batch, 3, family.side, family.side, device=device)
        steps = entrants(family, images)
        for kind in ("inference", "training step"):
            found = interleaved(
                {who: step[kind] for who, step in steps.items()}, rounds, device, warm_up=2
            )
            for who, row in found.items():
                speed = (
                    found["fused"]["ms"] / row["ms"]
                    if "ms" in row and "ms" in found["fused"]
                    else None
                )
                memory = peak(steps[who][kind], device) if "ms" in row else None
                yield {
                    "model": name,
                    "batch": family.batch,
                    "kind": kind,
                    "by": who,
                    **row,
                    "speed relative to fused": speed,
                    "peak MiB": memory,
                }
        del steps
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
