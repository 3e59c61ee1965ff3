"""Whole models on the CPU against timm and torchvision, in one interleaved run.

    python benchmarks/cpu_models.py --rounds 15 --json benchmarks/results/cpu_models.json
    python benchmarks/cpu_models.py --rounds 15 --dtype bfloat16 --json FILE
    python benchmarks/cpu_models.py --rounds 15 --compile --kind inference --json FILE

Every round times each model once, in an order that rotates, so that a busy machine slows all of
them alike; a ratio is the median over rounds of the ratio within a round. The same random images
for all. A training step is forward, cross entropy, backward and an AdamW update. "plain formula" is
this project's model with the reference backend for attention; its other layers are ours. "timm" is
its default, for both Swins the original's sequence of operations; "timm, fused attention" is Swin
with PyTorch's fused attention. bfloat16 is autocast. Inference is inside `models.evaluation`, as in
validation; other projects' models do not know it.
Peak memory (Linux) is what training steps of one model alone add to the resident size of a process
of its own.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import environment
from benchmarks.model_speed import fused_attention
from models import SwinTransformer, SwinTransformerV2, evaluation
from models.attention import AttentionSpec


def without_drop_path(model: torch.nn.Module) -> torch.nn.Module:
    """torchvision fixes the rate of its Swin models; it is set to 0 afterwards, as for the
    others.
    """
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    return model


def fused_timm(name: str) -> torch.nn.Module:
    """timm's model with PyTorch's fused attention, which timm calls experimental in Swin; its
    SwinV2 has none.
    """
    with fused_attention(True):
        return timm.create_model(name, drop_path_rate=0.0)


IDENTITY = AttentionSpec(("qk_residual", "crpw"))
PLAIN_FORMULA = AttentionSpec(backend="reference")
FAMILIES = {
    "swin_t": (
        224,
        {
            "ours": lambda: SwinTransformer(drop_path_rate=0.0),
            "ours + qk_residual + crpw": lambda: SwinTransformer(
                drop_path_rate=0.0, attention=IDENTITY
            ),
            "plain formula": lambda: SwinTransformer(drop_path_rate=0.0, attention=PLAIN_FORMULA),
            "timm": lambda: timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0),
            "timm, fused attention": lambda: fused_timm("swin_tiny_patch4_window7_224"),
            "torchvision": lambda: without_drop_path(torchvision.models.swin_t()),
        },
    ),
    "swinv2_t": (
        256,
        {
            "ours": lambda: SwinTransformerV2(256, window_size=8, drop_path_rate=0.0),
            "ours + qk_residual + crpw": lambda: SwinTransformerV2(
                256, window_size=8, drop_path_rate=0.0, attention=IDENTITY
            ),
            "plain formula": lambda: SwinTransformerV2(
                256, window_size=8, drop_path_rate=0.0, attention=PLAIN_FORMULA
            ),
            "timm": lambda: timm.create_model("swinv2_tiny_window8_256", drop_path_rate=0.0),
            "torchvision": lambda: without_drop_path(torchvision.models.swin_v2_t()),
        },
    ),
}


def make_steps(
    model: torch.nn.Module,
    images: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> dict[str, Callable[[], None]]:
    """The two things that are timed."""
    targets = torch.arange(len(images)) % 1000
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    call = torch.compile(model) if compiled else model
    autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), autocast():
            call(images)

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        with autocast():
            loss = torch.nn.functional.cross_entropy(call(images), targets)
        loss.backward()
        optimizer.step()

    return {"inference": infer, "training step": train}


def interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order rotates from round to round."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            steps[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(family: str, name: str, batch: int) -> float:
    """MiB of resident memory that three training steps add at most, in a fresh process."""
    command = [sys.executable, __file__, "--family", family, "--only", name, "--batch", str(batch)]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def run_alone(family: str, name: str, batch: int) -> None:
    """Prints the memory that three training steps need, in MiB."""
    size, makers = FAMILIES[family]
    step = make_steps(makers[name](), torch.randn(batch, 3, size, size))["training step"]
    before = resident_peak()
    for _ in range(3):
        step()
    print(resident_peak() - before)


def resident_peak() -> float:
    """MiB of memory that this process has held at most (VmHWM; getrusage would count the parent's
    on Linux).
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(family: str, arguments: argparse.Namespace) -> list[dict]:
    """One row per model and kind of step."""
    size, makers = FAMILIES[family]
    images = torch.randn(arguments.batch, 3, size, size)
    models = {name: make() for name, make in makers.items() if name in arguments.models}
    steps = {
        name: make_steps(model, images, getattr(torch, arguments.dtype), arguments.compile)
        for name, model in models.items()
    }
    rows = []
    for kind in ("inference", "training step") if arguments.kind == "both" else (arguments.kind,):
        with evaluation(*models.values()):  # without effect on the models of others
            seconds = interleaved(
                {name: step[kind] for name, step in steps.items()}, arguments.rounds
            )
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            # the ratio of each round is the fairest comparison: both models met the same load
            ratios = [other / own for other, own in zip(seconds["ours"], values, strict=True)]
            rows.append(
                {
                    "family": family,
                    "kind": kind,
                    "dtype": arguments.dtype,
                    "compiled": arguments.compile,
                    "model": name,
                    "ms": 1e3 * medians[name],
                    "least ms": 1e3 * min(values),
                    "speed relative to ours": statistics.median(ratios),
                }
            )
    if arguments.memory:
        for name in makers:
            rows.append(
                {
                    "family": family,
                    "kind": "peak memory of a training step",
                    "model": name,
                    "MiB": peak_memory(family, name, arguments.batch),
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    """A Markdown table."""
    lines = ["| model | what | by | median | speed relative to ours |", "|---|---|---|---|---|"]
    for row in rows:
        value = f"{row['ms']:.0f} ms" if "ms" in row else f"{row['MiB']:.0f} MiB"
        lines.append(
            f"| {row['family']} | {row['kind']} | {row['model']} | {value} | "
            + (f"{row['speed relative to ours']:.3f}x |" if "ms" in row else "|")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--kind", choices=["inference", "training step", "both"], default="both")
    every = list({name: None for _, makers in FAMILIES.values() for name in makers})
    parser.add_argument("--models", nargs="+", choices=every, default=every)
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice"
    )
    parser.add_argument(
        "--flush-denormals",
        action="store_true",
        help="subnormal numbers count as 0 for all, as in main.py",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also measure peak memory, each model in a process of its own",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(arguments.flush_denormals)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.only:
        run_alone(arguments.family, arguments.only, arguments.batch)
        return
    rows = [
        row
        for family in (FAMILIES if arguments.family == "all" else [arguments.family])
        for row in measure(family, arguments)
    ]
    versions = {
        **environment("cpu"),
        "batch": arguments.batch,
        "rounds": arguments.rounds,
    }
    print(table(rows), "\n", versions, sep="")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
