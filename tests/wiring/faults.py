"""Faults of the wiring: a file, one of its lines, the line with the fault, and the tests that have
to see it.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file`; `tests` are files or tests as pytest takes them."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PROGRAM = ("main.py", "program/beginning.py", "program/setup.py")
ARRIVAL = "tests/test_arrival.py::test_every_"
MODEL = ARRIVAL + "setting_of_a_model_changes_what_it_computes_or_is_refused[{}]"
DATA = ARRIVAL + "setting_of_the_data_changes_what_is_seen_or_is_refused"
MODEL_RUN = ARRIVAL + "other_setting_changes_a_run_or_is_refused[MODEL]"
TRAIN_RUN = ARRIVAL + "other_setting_changes_a_run_or_is_refused[TRAIN]"
# A test of this folder, by its name.
ON_DATA = "tests/wiring/test_data.py::test_{}"
ON_MODELS = "tests/wiring/test_models.py::test_{}"
ON_RATES = "tests/wiring/test_rates.py::test_{}"
ON_RUNS = "tests/wiring/test_runs.py::test_{}"
GOING_ON = "tests/wiring/test_going_on.py::test_{}"
ARGUMENT = ON_MODELS.format("every_setting_of_a_model_is_the_argument_of_its_name[{}]")


def mutants(files: str | tuple[str, ...], *entries: tuple[str, str, str, str]) -> list[Mutant]:
    """Faults, each (name, old, new, test), of one file, or of the first that has `old`."""
    return [
        Mutant(name, holding(files, old), old, new, (test,)) for name, old, new, test in entries
    ]


def dropped(files: str | tuple[str, ...], test: str, *lines: str) -> list[Mutant]:
    """Arguments `name=value,` that are left out of a call, so that the default stands."""
    found = []
    for line in lines:
        file = holding(files, f" {line},\n")
        stem = file.rpartition("/")[2].removesuffix(".py")
        name = f"{stem}_without_{line.partition('=')[0]}"
        found.append(Mutant(name, file, f" {line},\n", "\n", (test,)))
    return found


def holding(files: str | tuple[str, ...], text: str) -> str:
    """The file, or the first of several, that has the text; where none has it the first."""
    if isinstance(files, str):
        return files
    root = Path(__file__).resolve().parents[2]
    return next((file for file in files if text in (root / file).read_text()), files[0])
