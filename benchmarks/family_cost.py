"""What each arm of the near-identity family adds to a training step of Swin-T on the CPU.

    python benchmarks/family_cost.py --json benchmarks/results/family_float32.json
    python benchmarks/family_cost.py --dtype bfloat16 --arms self_mix exclusive --json FILE
    python benchmarks/family_cost.py --table FILE ... > benchmarks/results/family_cost.md

A step is forward, cross entropy, backward and the program's AdamW with its two groups, in processor
time. Six arms at a time: a round does them once in random order, with a step of the plain model
before and after; an arm's ratio is its time over the mean of these two. The median over rounds is
reported, with the middle half. "plain" among the arms is a second plain model: the noise.

Arms are the files of configs/identity/family for Swin-T, or modifiers as in a config; by default
all whose steps differ. A run that is
repeated with the same file goes on where it stopped; runs of different arms may go on side by side,
one core each, into files of their own.
"""

import argparse
import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.machine import ROOT, environment
from config import load_config
from models import build_model
from optimizer import build_optimizer

CONFIGS = ROOT / "configs/identity/family"
PREFIX = "swin_tiny_patch4_window7_224_"
PLAIN = ROOT / "configs/identity/swin_tiny_patch4_window7_224.yaml"
NOISE = "plain"
TOGETHER = 6  # arms between two steps of the plain model
# Files whose steps do what those of another file do, from other values.
ALIKE = ("mimetic_qk", "mimetic_vo", "orthogonal_random", "orthogonal_unmatched", "shaped_paper")
ALIKE += ("value_skipinit_paper", "gate_paper", "branch_gain_0", "qkres_exclusive", "qkres_qk_norm")
Step = Callable[[], None]


def all_arms() -> list[str]:
    """The noise, and the arms that have a file for Swin-T."""
    names = [path.stem.removeprefix(PREFIX) for path in sorted(CONFIGS.glob(f"{PREFIX}*.yaml"))]
    return [NOISE, *(name for name in names if name not in ALIKE)]


def settings(arm: str):
    """The config of an arm, without stochastic depth, whose skipped blocks would be noise."""
    options = ["MODEL.DROP_PATH_RATE", 0.0]
    path = CONFIGS / f"{PREFIX}{arm}.yaml"
    if path.is_file():
        return load_config(path, options)
    modifiers = [] if arm == NOISE else [arm]
    return load_config(PLAIN, [*options, "MODEL.ATTENTION.MODIFIERS", modifiers])


def training_step(arm: str, batch: int, dtype: torch.dtype) -> tuple[Step, int]:
    """One update of a model of its own, and how many parameters it has."""
    config = settings(arm)
    torch.manual_seed(0)
    model = build_model(config)
    model.train()
    optimizer = build_optimizer(config, model, lr=1e-4)
    side = config.DATA.IMG_SIZE
    images, targets = torch.randn(batch, 3, side, side), torch.arange(batch) % 1000
    autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)

    def step() -> None:
        with autocast():
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(parameter.numel() for parameter in model.parameters())


def seconds(step: Step) -> float:
    """Of one step: the processor's time, which other programs disturb less than the clock's."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def measure(given: argparse.Namespace) -> None:
    """Rounds until every arm has `given.rounds`, each written to the file at once."""
    done = json.loads(given.json.read_text()) if given.json.is_file() else {"arms": {}}
    conditions = {"dtype": given.dtype, "batch": given.batch}
    if done.setdefault("conditions", conditions) != conditions:
        raise SystemExit(f"{given.json} holds {done['conditions']}, not {conditions}")
    done["versions"] = environment("cpu")
    short = [name for name in given.arms if rounds_of(done["arms"], name) < given.rounds]
    plain = training_step(NOISE, given.batch, getattr(torch, given.dtype))
    for first in range(0, len(short), TOGETHER):
        measure_group(short[first : first + TOGETHER], plain, done, given)


def measure_group(
    names: list[str], plain: tuple[Step, int], done: dict, given: argparse.Namespace
) -> None:
    """The same for a few arms, whose models are given up afterwards.

    Written are, for each arm and round, its seconds and the mean of the two plain steps around.
    """
    base, arms, steps = plain[1], done["arms"], {}
    for name in names:
        steps[name], count = training_step(name, given.batch, getattr(torch, given.dtype))
        arms.setdefault(name, {"pairs": []})["parameters added"] = count - base
    for _ in range(2):  # buffers, caches and AdamW's moments
        for step in [plain[0], *steps.values()]:
            step()
    shuffled, before = random.Random(0), seconds(plain[0])
    while order := [name for name in steps if rounds_of(arms, name) < given.rounds]:
        shuffled.shuffle(order)
        times = {name: seconds(steps[name]) for name in order}
        after = seconds(plain[0])
        for name, own in times.items():
            arms[name]["pairs"].append([own, (before + after) / 2])
        before = after
        draft = given.json.with_suffix(".part")
        draft.write_text(json.dumps(done, indent=1) + "\n")
        os.replace(draft, given.json)
    for name in names:
        middle, low, high = summary(arms[name]["pairs"])
        print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


def rounds_of(arms: dict[str, dict], name: str) -> int:
    """How many an arm has behind it."""
    return len(arms[name]["pairs"]) if name in arms else 0


def summary(pairs: list[list[float]]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of an arm to the plain model."""
    ratios = sorted(own / plain for own, plain in pairs)
    quarter = len(ratios) // 4
    return statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]


def table(paths: list[Path]) -> str:
    """All runs as one table in Markdown, and the conditions of each."""
    runs = [json.loads(path.read_text()) for path in paths]
    dtypes = sorted({run["conditions"]["dtype"] for run in runs}, reverse=True)
    rows: dict[str, dict] = {}
    for run in runs:
        for name, arm in run["arms"].items():
            middle, low, high = summary(arm["pairs"])
            row = rows.setdefault(name, {"parameters": arm["parameters added"]})
            row[run["conditions"]["dtype"]] = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    lines = [
        "| arm | parameters added | " + " | ".join(dtypes) + " |",
        "|:----|--:|" + "--:|" * len(dtypes),
    ]
    for name in sorted(rows, key=lambda name: (name != NOISE, name)):
        cells = [rows[name].get(dtype, "") for dtype in dtypes]
        lines.append(f"| {name} | {rows[name]['parameters']:,} | " + " | ".join(cells) + " |")
    lines += ["", *dict.fromkeys(map(described, runs))]
    return "\n".join(lines)


def described(run: dict) -> str:
    """The conditions of a run in one line."""
    at, how = run["versions"], run["conditions"]
    rounds = sorted({len(arm["pairs"]) for arm in run["arms"].values()})
    return (
        f"- {how['dtype']}: batch {how['batch']}, {' to '.join(map(str, rounds))} rounds,"
        f" {at['date'][:10]}, commit {at['commit'][:7]}, {at['threads']} thread of"
        f" {at['processor']} ({at['capability']}), PyTorch {at['torch']}, Python {at['python']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", default=all_arms(), metavar="ARM")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--json", type=Path, help="results; what it holds already is kept")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print, not measure")
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
        return
    if given.json is None:
        parser.error("--json FILE says where the results go")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as in main.py
    measure(given)


if __name__ == "__main__":
    main()
