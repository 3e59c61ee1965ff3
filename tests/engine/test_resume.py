"""A run that was killed and started again with the same command ends with the same bits as one that
was not.
"""

import os
import random
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.engine.runs import arguments, assert_same_run, checkpoint, folder, run, train
from tests.helpers import ROOT


def slow(value):
    """A parameter that only the long test run uses."""
    return pytest.param(value, marks=pytest.mark.slow)


STEPS = {1: 22, 2: 11}  # updates of an epoch


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folders of runs that nobody killed, by number of processes; each is trained once."""
    runs = {}

    def get(nproc: int):
        if nproc not in runs:
            runs[nproc] = train(tmp_path_factory.mktemp(f"whole{nproc}"), nproc)
        return runs[nproc]

    return get


def killed_then_resumed(output, place: str, update: int, rank: int = 0, nproc: int = 1):
    killed = run(
        "tests/engine/killer.py", place, str(update), str(rank), *arguments(output), nproc=nproc
    )
    assert killed.returncode not in (0, 2), killed.stdout + killed.stderr
    return train(output, nproc)


@pytest.mark.parametrize("place", ["update", slow("save"), slow("batch"), slow("validate")])
def test_a_run_killed_anywhere_and_resumed_ends_bit_identical(tmp_path, undisturbed, place):
    update = random.Random(f"one process, {place}").randrange(4, 2 * STEPS[1])
    assert_same_run(killed_then_resumed(tmp_path, place, update), undisturbed(1))


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_two_processes_of_which_one_is_killed_resume_bit_identical(tmp_path, undisturbed, rank):
    update = random.Random(f"two processes, {rank}").randrange(4, 2 * STEPS[2])
    assert_same_run(killed_then_resumed(tmp_path, "update", update, rank, nproc=2), undisturbed(2))


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_the_run_ends_bit_identical(tmp_path, undisturbed):
    done = run(
        "tests/engine/killer.py", "update", "8", "1", *arguments(tmp_path), nproc=2, restarts=1
    )
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(folder(tmp_path), undisturbed(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, nproc, rank",
    [
        ("termgroupbatch", 1, 0),
        ("termbatch", 2, 1),
        pytest.param("termgroupbatch", 2, 1, marks=pytest.mark.long),
        ("termsave", 1, 0),
    ],
)
def test_sigterm_in_an_evaluation_or_a_save_keeps_the_epoch_and_the_run_ends_bit_identical(
    tmp_path, undisturbed, place, nproc, rank
):
    update = str(STEPS[nproc])
    stopped = run(
        "tests/engine/killer.py", place, update, str(rank), *arguments(tmp_path), nproc=nproc
    )
    assert stopped.returncode == (143 if nproc == 1 else 1), stopped.stderr
    assert "stopped by signal 15" in stopped.stdout
    progress = checkpoint(folder(tmp_path))["progress"]
    assert (progress["update"], progress["best_epoch"]) == (STEPS[nproc], -1)
    assert_same_run(train(tmp_path, nproc), undisturbed(nproc))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_at_random_times_ends_bit_identical(tmp_path, undisturbed, kills):
    """Row 2: the whole process group, data workers too, by the clock alone."""
    draw = random.Random(kills)
    for _ in range(kills):
        with subprocess.Popen(
            [sys.executable, "main.py", *arguments(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(3, 9))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert_same_run(train(tmp_path), undisturbed(1))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["term", "termgroup"])
@pytest.mark.parametrize("nproc", [1, 2])
def test_sigterm_saves_after_the_update_and_the_same_command_goes_on_bit_identical(
    tmp_path, undisturbed, place, nproc
):
    stopped = run("tests/engine/killer.py", place, "7", "0", *arguments(tmp_path), nproc=nproc)
    assert stopped.returncode == (143 if nproc == 1 else 1), (
        stopped.stderr
    )  # torchrun reports its workers' 143 as 1
    assert "stopped by signal 15" in stopped.stdout
    assert checkpoint(folder(tmp_path))["progress"]["update"] in (
        7,
        8,
    )  # in a group up to one update later
    assert not (folder(tmp_path) / ".lock").exists()
    assert_same_run(train(tmp_path, nproc), undisturbed(nproc))
