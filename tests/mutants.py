"""One-line faults in the wiring, and the tests that have to see each of them.

    python -m tests.mutants --list
    python -m tests.mutants --only ema_decay --only crop_ratio
    python -m tests.mutants --sample 8 --seed 3

Each fault is written into a copy of the tree, where the tests it names run, and only these; a test
must fail. A fault whose line is no longer in the file is an error: the line has changed, and the
fault has to follow it. Exit status: 0 where every fault was seen.
"""

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.wiring import (
    faults_data,
    faults_engine,
    faults_main,
    faults_models,
    faults_processes,
    faults_rates,
)
from tests.wiring.faults import Mutant

MUTANTS = [
    *faults_data.DATA_MUTANTS,
    *faults_models.MODEL_MUTANTS,
    *faults_engine.ENGINE_MUTANTS,
    *faults_rates.RATE_MUTANTS,
    *faults_rates.OPTIMIZER_MUTANTS,
    *faults_main.MAIN_MUTANTS,
    *faults_main.SETTINGS_MUTANTS,
    *faults_main.SESSION_MUTANTS,
    *faults_processes.PROCESS_MUTANTS,
]
ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".*", "output", "__pycache__", "*.pyc", "docs", "build", "dist", "*.egg-info")
LIMIT = 20.0  # seconds of processor time


@dataclass(frozen=True)
class Outcome:
    """What the tests said of a fault: seen, missed, or broken (they did not run)."""

    mutant: Mutant
    verdict: str
    seconds: float
    output: str


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The file's text with the fault. Raises: ValueError where its line is not there once."""
    text = (root / mutant.file).read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of the tree, with the neighbouring folder of test vectors if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        vectors = ROOT.parent / "shared"
        if vectors.is_dir():
            (Path(folder) / "shared").symlink_to(vectors)
        yield tree


def judge(mutant: Mutant, tree: Path) -> Outcome:
    """Runs the fault's tests on a copy of the tree that has it, and restores the copy."""
    place = tree / mutant.file
    before = place.read_text()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not long", *mutant.tests]
    # no bytecode: two texts of equal length within a second would share it
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    place.write_text(mutated(mutant, tree))
    started = processor_time()
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, text=True, capture_output=True, check=False
        )
    finally:
        place.write_text(before)
    verdict = {0: "missed", 1: "seen"}.get(done.returncode, "broken")
    return Outcome(mutant, verdict, processor_time() - started, done.stdout + done.stderr)


def processor_time() -> float:
    """Seconds that finished child processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def judge_all(mutants: Sequence[Mutant]) -> list[Outcome]:
    """Judges the faults one after the other, with a line for each."""
    outcomes = []
    with copied_tree() as tree:
        for mutant in mutants:
            outcome = judge(mutant, tree)
            outcomes.append(outcome)
            print(f"{outcome.verdict:7} {outcome.seconds:5.1f} s  {mutant.name}", flush=True)
    return outcomes


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each fault that was missed, did not run, or took too long to be seen."""
    lines = [
        f"{outcome.mutant.name}: {outcome.verdict}\n{outcome.output[-1500:]}"
        for outcome in outcomes
        if outcome.verdict != "seen"
    ]
    slow = [outcome for outcome in outcomes if outcome.seconds > LIMIT]
    return lines + [f"{outcome.mutant.name}: {outcome.seconds:.0f} s" for outcome in slow]


def sampled(count: int, seed: int) -> list[Mutant]:
    """Some of the faults, drawn without repetition."""
    return random.Random(seed).sample(MUTANTS, count)


def main() -> int:
    """Reads the command line and judges what it names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the faults and stop")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--sample", type=int, metavar="N", help="N of them, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.only or mutant.name in arguments.only]
    if unknown := set(arguments.only) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; --list names them")
    if arguments.sample:
        chosen = sampled(arguments.sample, arguments.seed)
    if arguments.list:
        print("\n".join(f"{mutant.name:32} {mutant.file}" for mutant in chosen))
        return 0
    lines = failures(judge_all(chosen))
    print("\n".join(lines) or f"all {len(chosen)} faults were seen")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
