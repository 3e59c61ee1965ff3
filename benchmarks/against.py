"""This state of the code against another commit: whole models on the CPU, in turns.

    python benchmarks/against.py --commit 85d1fde --rounds 15
    python benchmarks/against.py --commit 85d1fde --family swinv2_t --dtype bfloat16 --json FILE

Each state has a process of its own; in every round both do the same step, one right after the
other, in changing order. A ratio is the median over rounds of new time to old time: below 1, this
state is faster. "inference" is inside `evaluation` where the code has it, as in validation;
"inference outside" is a forward without gradients and nothing else.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve()
FAMILIES = ("swin_t", "swinv2_t")
KINDS = ("inference", "inference outside", "training step")


def make_steps(family: str, batch: int, dtype_name: str) -> dict[str, Callable[[], None]]:
    """What is timed, with the code of the folder in PYTHONPATH."""
    import torch

    import models

    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as in main.py
    dtype = getattr(torch, dtype_name)
    size = 224 if family == "swin_t" else 256
    if family == "swin_t":
        model = models.SwinTransformer(drop_path_rate=0.0)
    else:
        model = models.SwinTransformerV2(256, window_size=8, drop_path_rate=0.0)
    images, targets = torch.randn(batch, 3, size, size), torch.arange(batch) % 1000
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    evaluation = getattr(models, "evaluation", contextlib.nullcontext)
    inside = contextlib.ExitStack()

    def infer() -> None:
        model.eval()
        if not inside._exit_callbacks:
            inside.enter_context(evaluation(model))
        with torch.inference_mode(), autocast():
            model(images)

    def infer_outside() -> None:
        inside.close()
        model.eval()
        with torch.inference_mode(), autocast():
            model(images)

    def train() -> None:
        inside.close()
        model.train()
        optimizer.zero_grad()
        with autocast():
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()

    return dict(zip(KINDS, (infer, infer_outside, train), strict=True))


def work(family: str, batch: int, dtype: str) -> None:
    """The process of one state: for each name of a step on stdin, its seconds on stdout."""
    steps = make_steps(family, batch, dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        steps[line.strip()]()
        print(time.perf_counter() - begin, flush=True)


class State:
    """The code of one folder, running in a process of its own."""

    def __init__(self, folder: Path, arguments: list[str]):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE), "--work", *arguments],
            env={**os.environ, "PYTHONPATH": str(folder)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, kind: str) -> float:
        """Of one step."""
        self.process.stdin.write(kind + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def answer(self) -> str:
        """The next line; the process's own error is on stderr."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a state ended early; its error is above")
        return line

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the files of `commit`."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=HERE.parent.parent, check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def compare(old: State, new: State, kind: str, rounds: int, warm_up: int = 3) -> dict:
    """One row: medians in ms, and the median of the ratios within a round."""
    pairs = []
    for turn in range(-warm_up, rounds):
        order = (old, new) if turn % 2 else (new, old)
        times = {state: state.seconds(kind) for state in order}
        if turn >= 0:
            pairs.append((times[old], times[new]))
    ratios = sorted(new_time / old_time for old_time, new_time in pairs)
    quarter = len(ratios) // 4
    return {
        "kind": kind,
        "old ms": 1e3 * statistics.median(pair[0] for pair in pairs),
        "new ms": 1e3 * statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(ratios),
        "middle half": [ratios[quarter], ratios[-1 - quarter]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", default="HEAD~1")
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.family, given.batch, given.dtype)
        return
    rows = []
    with checked_out(given.commit) as folder:
        for family in FAMILIES if given.family == "all" else [given.family]:
            options = ["--family", family, "--batch", str(given.batch), "--dtype", given.dtype]
            states = [State(place, options) for place in (folder, HERE.parent.parent)]
            for state in states:
                state.answer()
            for kind in KINDS if given.kind == "all" else [given.kind]:
                row = {"family": family, "dtype": given.dtype, "rounds": given.rounds}
                rows.append(row | compare(*states, kind, given.rounds))
                print(json.dumps(rows[-1]), flush=True)
            for state in states:
                state.close()
    if given.json:
        sys.path.insert(0, str(HERE.parent.parent))
        from benchmarks.machine import environment

        versions = {**environment("cpu"), "against": given.commit, "batch": given.batch}
        given.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
