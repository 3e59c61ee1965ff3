"""Everything the fused window attention needs a GPU for, in one call of under nine minutes on an
H200.

    python benchmarks/gpu_kernels.py --json FILE                          all, on this CUDA device
    python benchmarks/gpu_kernels.py --parts build correctness sanitizer  some of them
    python benchmarks/gpu_kernels.py --device cpu --quick                 what needs no GPU

Parts: build (compiles the kernels for this device), correctness (the shapes of the emulated tests
and random ones, against float64, and the operation in PyTorch), determinism (bit-equal when run
twice, and from a CUDA graph), sanitizer (compute-sanitizer's memcheck and racecheck on small
shapes), ops and models (speed and memory, against other means; medians of interleaved rounds). Only
when named, since compiling takes minutes: compiled (whole models through torch.compile). A part
that fails is reported and the next one runs; the exit status is 1 if any did.
"""

import argparse
import ctypes
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import kernel_speed, model_speed
from benchmarks.machine import environment
from kernels.library import loader
from kernels.window_attention import Epilogue, OffsetTerms, window_attention, window_layout
from kernels.window_attention.reference import merge_windows
from kernels.window_attention.testing import (
    EPILOGUES,
    SMALL_CASES,
    TILED_CASES,
    Case,
    Drawn,
    by_part,
    by_pytorch,
    draw_case,
)
from kernels.window_attention.testing_accuracy import distances, problems
from kernels.window_attention.testing_call import GRADIENTS, Kernel
from kernels.window_attention.testing_epilogue import (
    SMALL_BASES,
    TILED_BASES,
    with_epilogue,
    with_gradient_of_lse,
)

ROOT = Path(__file__).resolve().parent.parent
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PARTS = ("build", "correctness", "determinism", "sanitizer", "ops", "models")
NAMED = ("compiled",)
# Seconds after which a part starts nothing more; the sum of PARTS leaves room for starting up
# within nine minutes.
SECONDS = {
    "build": 180,
    "correctness": 60,
    "determinism": 20,
    "sanitizer": 100,
    "ops": 110,
    "models": 60,
    "compiled": 240,
}
QUICK = [
    Case((7, 7), missing=(2, 3), shift=(3, 3), scale="table"),
    Case((8, 8), (1, 2), cosine=True, dropout=0.2, dtype=F32),
    Case((9, 12), (1, 1), scale="table", post=True, dtype=F16),
    Case((16, 16), (1, 1), heads=1),
]
# with an epilogue, and a gradient of the log-sum-exp
ENDED = [
    Case((7, 7), missing=(2, 3), shift=(3, 3), epilogue="affine", lse=True),
    Case((8, 8), (1, 2), cosine=True, epilogue="exclusive", lse=True),
    Case((9, 12), (1, 1), scale="table", epilogue="exclusive", lse=True),
    Case((7, 7), dtype=F32, epilogue="affine", lse=True),
]
# more windows than there are multiprocessors, so that a block takes several
LARGE = [
    Case((7, 7), (8, 8), shift=(3, 3), batch=8, heads=3, scale="table"),
    Case((8, 8), (8, 8), shift=(4, 4), batch=8, heads=3, cosine=True),
    Case((16, 16), (4, 4), shift=(8, 8), batch=8, cosine=True),
    Case((24, 24), (2, 2), shift=(12, 12), batch=2, heads=1, scale="table"),
    Case((12, 12), (3, 3), missing=(5, 0), shift=(6, 6), batch=4, dtype=F16, dropout=0.1),
    Case((7, 7), (8, 8), shift=(3, 3), batch=8, heads=3, epilogue="affine", lse=True),
    Case((16, 16), (4, 4), shift=(8, 8), batch=8, epilogue="exclusive", lse=True),
]
SANITIZED = [
    Case((7, 7), (2, 2), missing=(2, 3), shift=(3, 3), scale="table"),
    Case((8, 8), (1, 2), cosine=True, dropout=0.1, dtype=F16),
    Case((9, 12), (1, 2), shift=(4, 6), scale="table", post=True),
    Case((10, 10), (1, 1), heads=1, dtype=F32),
    Case((24, 24), (1, 1), heads=1, scale="table"),
    Case((7, 7), (1, 2), missing=(2, 3), shift=(3, 3), epilogue="exclusive", lse=True),
    Case((9, 12), (1, 1), heads=1, epilogue="affine", lse=True),
]


class Failure(RuntimeError):
    """A part's check did not hold."""


class Run:
    """What the parts share: the device, the library, the clock."""

    def __init__(self, arguments: argparse.Namespace):
        self.device, self.quick, self.rounds = arguments.device, arguments.quick, arguments.rounds
        self.kernel: Kernel | None = None

    def load(self) -> Kernel:
        """The kernel's C interface; compiles it if need be."""
        if self.kernel is None:
            path, reason = loader.load()
            missing = reason if path is None else loader.missing(self.device)
            if missing:
                raise Failure(f"no kernel for {self.device}: {missing}")
            self.kernel = Kernel(
                ctypes.CDLL(str(path)), "wa_cuda" if self.device == "cuda" else "wa_cpu"
            )
        return self.kernel

    def cases(self) -> list[Case]:
        """The shapes that are compared with float64."""
        if self.quick:
            return QUICK
        source = random.Random(2026)
        drawn = [draw_case(source) for _ in range(200)]
        bases = [*SMALL_BASES, *TILED_BASES]
        ended = [*ENDED, *with_epilogue(bases), *with_gradient_of_lse(bases)]
        return [*SMALL_CASES, *TILED_CASES, *LARGE, *ended, *drawn]


def part_build(run: Run, time_is_up: Callable[[], bool]) -> list[dict]:
    """Seconds until the library is there (0 or so where it was built before)."""
    start = time.perf_counter()
    run.load()
    return [{"seconds": time.perf_counter() - start, "library": loader.load()[0].name}]


def part_correctness(run: Run, time_is_up: Callable[[], bool]) -> list[dict]:
    """Cases tried, and what is wrong with them; then the operation as PyTorch calls it."""
    kernel, wrong, tried = run.load(), [], 0
    for case in run.cases():
        if time_is_up():
            break
        drawn = Drawn(case)
        wrong += [f"{case}: {text}" for text in problems(kernel.run(drawn), drawn)]
        tried += 1
    wrong += [
        f"operation, {case}: {text}"
        for case in QUICK[:1] + QUICK[2:] + ENDED
        for text in check_operation(case, run.device)
    ]
    if wrong:
        raise Failure(
            f"{len(wrong)} results of {tried} cases err more than PyTorch's own in the same"
            " dtype:\n  " + "\n  ".join(wrong[:40])
        )
    return [{"cases": tried, "of": len(run.cases())}]


def check_operation(case: Case, device: str) -> list[str]:
    """What errs of the output and gradients of window_attention(backend="fused") with autograd."""
    drawn = Drawn(case)
    factors = EPILOGUES[case.epilogue]
    inputs = {name: getattr(drawn, name) for name in GRADIENTS}
    leaves = {
        name: t.to(device, copy=True).requires_grad_()
        for name, t in inputs.items()
        if t is not None
    }
    terms = OffsetTerms(case.window, leaves["scale"], leaves.get("bias"), leaves.get("post"))
    layout = window_layout(case.grid, case.window, case.shift, device=torch.device(device))
    epilogue = Epilogue(**{name: leaves[name] for name in factors}) if factors else None
    endings = {"epilogue": epilogue, "return_lse": True}
    out, lse = window_attention(
        leaves["qkv"], terms, layout, case.heads, case.cosine, 0.0, "fused", **endings
    )
    grads = [drawn.grad_out.to(device), torch.zeros_like(lse)]
    if case.lse:
        rows = drawn.grad_lse.nan_to_num(0).flatten(0, 1).unsqueeze(-1).to(device)
        grads[1] = merge_windows(rows, layout)
    torch.autograd.backward([out, lse], grads)
    grads = {name: leaf.grad.cpu() for name, leaf in leaves.items()}
    ours = by_part({"out": out.detach().cpu(), **grads}, case)
    exact, plain = by_pytorch(drawn, torch.float64), by_pytorch(drawn, case.dtype)
    wrong = []
    for name, truth in exact.items():
        error, _ = distances(ours[name], truth)
        allowed = 2 * distances(plain[name], truth)[0] + 1e-4 * truth.norm().item()
        if error > allowed:
            wrong.append(f"{name}: {error:.2e}")
    return wrong


def part_determinism(run: Run, time_is_up: Callable[[], bool]) -> list[dict]:
    """Cases that gave the same bits three times, and from a CUDA graph."""
    kernel, cases = run.load(), QUICK if run.quick else LARGE
    for case in cases:
        drawn = Drawn(case)
        first, *others = (kernel.run(drawn) for _ in range(3))
        for other in others:
            differing = [
                name
                for name in first
                if not torch.equal(first[name].nan_to_num(7), other[name].nan_to_num(7))
            ]
            if differing:
                raise Failure(f"{case}: not the same bits twice: {differing}")
    if run.device == "cuda":
        check_graph()
    return [{"cases": len(cases), "CUDA graph": run.device == "cuda"}]


def check_graph() -> None:
    """The operation's forward and backward captured and replayed on new inputs."""
    inputs = kernel_speed.Inputs(kernel_speed.SHAPES[1].but(batch=4), "cuda", BF16)
    leaves = [
        t.detach().clone().requires_grad_() for t in (inputs.qkv[0], inputs.scale, inputs.bias)
    ]

    def step() -> tuple[torch.Tensor, ...]:
        out = kernel_speed.backend("fused")(*leaves, inputs)
        return out, *torch.autograd.grad(out, leaves, inputs.grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    if not all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True)):
        raise Failure("a CUDA graph gives another result than the call")


def part_sanitizer(run: Run, time_is_up: Callable[[], bool]) -> list[dict]:
    """memcheck and racecheck over small shapes, each in a process of its own."""
    if run.device != "cuda":
        return [{"skipped": "compute-sanitizer checks CUDA kernels"}]
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return [{"skipped": "compute-sanitizer is not installed"}]
    rows = []
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            "--kernel-name-exclude",
            "kernel_substring=at::native",
            sys.executable,
            __file__,
            "--only-run-small",
        ]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=SECONDS["sanitizer"] / 2,
                check=False,
            )
        except subprocess.TimeoutExpired:
            rows.append({"tool": check, "skipped": "not done in its time"})
            continue
        text = done.stdout + done.stderr
        if done.returncode:
            raise Failure(
                f"{check} ended with {done.returncode}:\n" + "\n".join(text.splitlines()[-30:])
            )
        rows.append(
            {
                "tool": check,
                "seconds": time.perf_counter() - start,
                "said": text.strip().splitlines()[-1],
            }
        )
    return rows


def part_ops(run: Run, time_is_up: Callable[[], bool]) -> list[dict]:
    """Speed of the operation."""
    shapes = kernel_speed.QUICK_SHAPES if run.quick else kernel_speed.SHAPES
    return list(kernel_speed.time_ops(shapes, run.device, BF16, run.rounds, time_is_up))


def part_models(run: Run, time_is_up: Callable[[], bool]) -> list[dict]:
    """Speed and memory of whole models."""
    return list(
        model_speed.time_models(run.device, max(2, run.rounds * 2 // 3), run.quick, time_is_up)
    )


def part_compiled(run: Run, time_is_up: Callable[[], bool]) -> list[dict]:
    """Speed and memory of whole models through torch.compile."""
    return list(
        model_speed.time_models(
            run.device,
            max(2, run.rounds * 2 // 3),
            run.quick,
            time_is_up,
            model_speed.compiled_rivals,
        )
    )


def table(rows: list[dict]) -> str:
    """A Markdown table of rows that may lack some columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        lines + ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows]
    )


def run_parts(run: Run, parts: list[str]) -> dict[str, list[dict]]:
    """The rows of each part; a failed one has a row {"failed": reason}."""
    results = {}
    for part in parts:
        start = time.perf_counter()
        limit = SECONDS[part]
        print(f"== {part}", flush=True)
        try:
            rows = globals()[f"part_{part}"](
                run, lambda start=start, limit=limit: time.perf_counter() - start > limit
            )
        except Exception as error:  # the other parts are still worth their time
            rows = [{"failed": f"{type(error).__name__}: {error}"}]
        results[part] = rows
        print(rows[0]["failed"] if "failed" in rows[0] and len(rows) == 1 else table(rows))
        print(f"({time.perf_counter() - start:.1f} s)\n", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes and few of them")
    parser.add_argument("--parts", nargs="+", choices=PARTS + NAMED, default=list(PARTS))
    parser.add_argument(
        "--rounds", type=int, default=15, help="of each timing (models: two thirds of them)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-run-small", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_kernels: there is no CUDA device here, so nothing was checked or timed on a GPU;"
            " --device cpu --quick tries what can be tried without one",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    run = Run(arguments)
    if arguments.only_run_small:
        for case in SANITIZED:
            run.load().run(Drawn(case))
        return 0
    found = {"environment": environment(arguments.device), "command": sys.argv[1:], "parts": {}}
    print("\n".join(f"{name}: {value}" for name, value in found["environment"].items()), "\n")
    found["parts"] = run_parts(run, arguments.parts)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1, default=str) + "\n")
    failed = [
        part for part, rows in found["parts"].items() if len(rows) == 1 and "failed" in rows[0]
    ]
    print(f"failed: {', '.join(failed)}" if failed else "every part did what it should")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
