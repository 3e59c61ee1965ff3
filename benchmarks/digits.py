"""Every system on scikit-learn's handwritten digits: accuracy over seeds, training time and
parameters, as a table.

    python benchmarks/digits.py --json benchmarks/results/digits.json
    python benchmarks/digits.py configs/digits/digits_vit.yaml --seeds 0

Each run is `python main.py --cfg YAML --seed S` with one thread; --jobs runs go side by side, one a
core. The accuracy is that of the last epoch on the 364 held-out images (one image is 0.27 points),
so no epoch is chosen by it. CPU seconds are the whole program's, start and validation after each
epoch included, user and system time. Finished runs of --output are read, not repeated.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(yaml: Path, seed: int, output: Path) -> dict:
    """One training: {"config", "seed", "accuracy" in percent, "cpu seconds", "parameters"}."""
    folder = output / yaml.stem / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    command = [
        sys.executable,
        "main.py",
        "--cfg",
        str(yaml.relative_to(ROOT)),
        "--seed",
        str(seed),
        "--output",
        str(output / "runs"),
        "--tag",
        f"seed{seed}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    with open(folder / "output.txt", "w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed; its output is in {folder / 'output.txt'}")
    log = _folder_of(output, yaml, seed)
    entries = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    accuracy = [entry["acc1"] for entry in entries if entry["kind"] == "val"][-1]
    parameters = int(re.search(r"number of params: (\d+)", (log / "log_rank0.txt").read_text())[1])
    result = {
        "config": yaml.stem,
        "seed": seed,
        "accuracy": accuracy,
        "cpu seconds": usage.ru_utime + usage.ru_stime,
        "parameters": parameters,
    }
    kept.write_text(json.dumps(result))
    return result


def _folder_of(output: Path, yaml: Path, seed: int) -> Path:
    name = re.search(r"\bNAME: ([\w.-]+)", yaml.read_text())[1]
    return output / "runs" / name / f"seed{seed}"


def table(results: list[dict]) -> str:
    """A Markdown table, one row a configuration."""
    lines = [
        (
            "| configuration | accuracy of the last epoch, each seed | mean | CPU seconds |"
            " parameters |"
        ),
        "|---|---|---|---|---|",
    ]
    for config in dict.fromkeys(result["config"] for result in results):
        rows = [result for result in results if result["config"] == config]
        scores = [row["accuracy"] for row in rows]
        seconds = [row["cpu seconds"] for row in rows]
        lines.append(
            f"| {config} | {' / '.join(f'{score:.2f}' for score in scores)} |"
            f" {statistics.mean(scores):.2f} | {min(seconds):.0f}-{max(seconds):.0f} |"
            f" {rows[0]['parameters']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs, prints and stores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("yaml", nargs="*", type=Path, help="default: all of configs/digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "digits_table")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = [file.resolve() for file in arguments.yaml] or sorted(
        (ROOT / "configs" / "digits").glob("*.yaml")
    )
    work = [(file, seed) for file in files for seed in arguments.seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda item: run(*item, arguments.output.resolve()), work))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, capture_output=True
    ).stdout.strip()
    print(table(results), f"\ncommit {commit}, {arguments.jobs} runs side by side, one thread each")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"commit": commit, "jobs": arguments.jobs, "results": results}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
