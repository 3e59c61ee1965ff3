"""The attention operation on the CPU, layout included: the fused kernel against PyTorch's
operations, in one interleaved run.

    python benchmarks/cpu_attention.py --json benchmarks/results/cpu_attention.json

Forward is without a gradient; backward is that of qkv, scale and bias, its forward not timed.
Seconds are this process' CPU time with one thread, so that other programs disturb less; each round
takes every backend once, in rotating order, and a ratio is the median over rounds of the ratio
within a round. "reference" is the plain formula, operation by operation, as in eager Swin; "eager"
is this project's own
PyTorch form. Errors are against float64: the norm of the difference over the norm of the result,
the fused kernel beside the reference run in the same dtype.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import environment
from kernels.window_attention import BACKENDS, OffsetTerms, window_layout
from kernels.window_attention.fused import missing

# name, grid side, window side, shift, heads of 32 channels, a scale per offset, cosine attention
SHAPES = (
    ("Swin-T stage 1", 56, 7, 0, 3, False, False),
    ("Swin-T stage 1, shifted, CRPW", 56, 7, 3, 3, True, False),
    ("Swin-T stage 3, shifted", 14, 7, 3, 12, False, False),
    ("SwinV2-T w8 stage 1, shifted", 64, 8, 4, 3, False, True),
    ("SwinV2-B w16 stage 1, shifted", 64, 16, 8, 4, False, True),
)
RESULTS = ("y", "dqkv", "dscale", "dbias")
BACKENDS_TIMED = ("fused", "eager", "reference")


class Work:
    """One shape in one dtype: qkv of `batch` images and the two tables."""

    def __init__(self, shape: tuple, dtype: torch.dtype, batch: int):
        _, side, window, shift, heads, per_offset, self.cosine = shape
        torch.manual_seed(0)
        offsets = (2 * window - 1) ** 2
        self.heads = heads
        self.layout = window_layout((side, side), (window, window), (shift, shift))
        self.qkv = torch.randn(batch, side, side, 96 * heads).to(dtype)
        usual = 10.0 if self.cosine else 32**-0.5
        rows = offsets if per_offset else 1
        self.scale = usual * (1 + 0.1 * torch.randn(rows, heads))
        self.bias = torch.randn(offsets, heads)
        self.grad = torch.randn(batch, side, side, 32 * heads).to(dtype)

    def forward(self, backend: str, qkv: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """(B, H, W, C)."""
        return BACKENDS[backend](
            qkv, OffsetTerms(self.layout.window, scale, bias), self.layout, self.heads, self.cosine
        )

    def outcome(self, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output and gradients of qkv, scale and bias, all computed in `dtype` if one is given."""
        leaves = [
            tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
            for tensor in (self.qkv, self.scale, self.bias)
        ]
        y = self.forward(backend, *leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad.to(y.dtype))]

    def seconds(self, backend: str) -> tuple[float, float]:
        """CPU seconds of a forward and of a backward."""
        with torch.inference_mode():
            start = time.process_time()
            self.forward(backend, self.qkv, self.scale, self.bias)
            forward = time.process_time() - start
        leaves = [tensor.detach().requires_grad_() for tensor in (self.qkv, self.scale, self.bias)]
        y = self.forward(backend, *leaves)
        start = time.process_time()
        torch.autograd.grad(y, leaves, self.grad)
        return forward, time.process_time() - start


def measure(shape: tuple, dtype: torch.dtype, batch: int, rounds: int) -> dict:
    """Medians and ratios of one shape."""
    work = Work(shape, dtype, batch)
    taken: dict[str, list[tuple[float, float]]] = {backend: [] for backend in BACKENDS_TIMED}
    for turn in range(-2, rounds):
        order = BACKENDS_TIMED[turn % 3 :] + BACKENDS_TIMED[: turn % 3]
        for backend in order:
            seconds = work.seconds(backend)
            if turn >= 0:
                taken[backend].append(seconds)
    row = {"shape": shape[0], "dtype": str(dtype).removeprefix("torch.")}
    for index, kind in enumerate(("forward", "backward")):
        row[f"{kind} ms"] = 1e3 * statistics.median(seconds[index] for seconds in taken["fused"])
        for other in BACKENDS_TIMED[1:]:
            ratios = [
                theirs[index] / ours[index]
                for ours, theirs in zip(taken["fused"], taken[other], strict=True)
            ]
            row[f"{kind} x {other}"] = statistics.median(ratios)
    exact = work.outcome("reference", torch.float64)
    fused, plain = work.outcome("fused"), work.outcome("reference")
    for name, right, ours, theirs in zip(RESULTS, exact, fused, plain, strict=True):
        row[f"error {name}"] = [
            ((tensor.double() - right).norm() / right.norm()).item() for tensor in (ours, theirs)
        ]
    return row


def table(rows: list[dict]) -> str:
    """Two Markdown tables: speed and error."""
    lines = [
        "| shape | dtype | forward, backward ms | forward: x reference, x eager"
        " | backward: x reference, x eager |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [
            f"{row[f'{kind} x reference']:.2f}, {row[f'{kind} x eager']:.2f}"
            for kind in ("forward", "backward")
        ]
        times = f"{row['forward ms']:.1f}, {row['backward ms']:.1f}"
        lines.append(f"| {row['shape']} | {row['dtype']} | {times} | {' | '.join(ratios)} |")
    lines += [
        "",
        "| shape | dtype | error of y | of dqkv | of dscale | of dbias |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = " | ".join("{:.1e} ({:.1e})".format(*row[f"error {name}"]) for name in RESULTS)
        lines.append(f"| {row['shape']} | {row['dtype']} | {errors} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if missing("cpu"):
        sys.exit(f"there is no fused kernel here: {missing('cpu')}")
    torch.set_num_threads(1)
    rows = [
        measure(shape, dtype, arguments.batch if shape[2] < 16 else 2, arguments.rounds)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    versions = {**environment(), "batch": arguments.batch, "rounds": arguments.rounds}
    print(table(rows), versions, sep="\n")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
