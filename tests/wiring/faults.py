"""Faults of the wiring: a file, one of its lines, the line with the fault, and the tests that have
to see it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file`; `tests` are files or tests as pytest takes them."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


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


def mutants(file: str, *entries: tuple[str, str, str, str]) -> list[Mutant]:
    """Faults of one file, each (name, old, new, test)."""
    return [Mutant(name, file, old, new, (test,)) for name, old, new, test in entries]


def dropped(file: str, test: str, *lines: str) -> list[Mutant]:
    """Arguments `name=value,` that are left out of a call, so that the default stands."""
    stem = file.rpartition("/")[2].removesuffix(".py")
    return [
        Mutant(f"{stem}_without_{line.partition('=')[0]}", file, f" {line},\n", "\n", (test,))
        for line in lines
    ]
