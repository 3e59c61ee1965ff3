"""A run that was killed and started again with the same command ends with the same bits as one that
was not.
"""

import random

import pytest

from tests.engine.runs import arguments, assert_same_run, checkpoint, folder, run, train


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


@pytest.mark.parametrize("place", ["update", slow("save"), slow("validate")])
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
