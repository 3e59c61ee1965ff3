"""Two processes (torchrun, gloo): what they must agree on."""

import json
import threading

import pytest
import torch

from tests.engine.runs import run
from tests.engine.small import Loader, make_trainer
from tests.engine.two_ranks import flat, no_dropout
from utils import RunError, World


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes saw; they are started once."""
    path = tmp_path_factory.mktemp("ranks") / "out.json"
    done = run("tests/engine/two_ranks.py", str(path), nproc=2)
    assert done.returncode == 0, done.stderr
    for rank, one in enumerate(found := json.loads(path.read_text())):
        one["programs"] = json.loads(path.with_name(f"process{rank}.json").read_text())
    return found


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """What main.py said on each of two processes in the cases that take longer."""
    folder = tmp_path_factory.mktemp("more")
    done = run("tests/engine/two_programs.py", str(folder), nproc=2)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"process{rank}.json").read_text()) for rank in (0, 1)]


def test_half_the_batch_each_equals_the_whole_batch_on_one_process(ranks):
    alone = no_dropout(make_trainer(accumulation=3, clip=1.0))
    for epoch in range(3):
        alone.update(list(Loader(3).epoch(epoch)))
    for rank in ranks:
        torch.testing.assert_close(
            torch.tensor(rank["averaging"]["weights"]), torch.tensor(flat(alone)), atol=1e-5, rtol=0
        )
    assert ranks[0]["averaging"]["weights"] == ranks[1]["averaging"]["weights"]


def test_an_accumulated_update_reduces_gradients_once(ranks):
    reductions = [rank["averaging"]["reductions"] for rank in ranks]
    assert reductions == [3, 3]  # three updates of three micro-batches, one bucket


def test_a_nan_on_one_process_skips_the_update_on_both(ranks):
    for rank in ranks:
        assert rank["nan"]["unchanged"] and rank["nan"]["skipped"] == 1
    assert [rank["nan"]["bad_losses"] for rank in ranks] == [0, 1]


def test_divergence_is_reported_with_the_process_it_came_from(ranks):
    assert "processes with a non-finite loss: 1)" in ranks[0]["divergence"]
    assert all("last 2 updates (0 to 1" in rank["divergence"] for rank in ranks)


def test_a_signal_to_one_process_stops_both_after_the_same_update(ranks):
    updates = [rank["signal"]["update"] for rank in ranks]
    assert updates[0] == updates[1] and 3 <= updates[0] <= 5
    assert [rank["no_signal"] for rank in ranks] == [0, 0]


def test_all_processes_evaluate_the_running_statistics_that_are_saved(ranks):
    first, second = [one["statistics"] for one in ranks]
    assert first["own"] != second["own"]
    assert first["evaluated"] == second["evaluated"] == [first["own"]] * 2  # network and average


def test_values_travel_between_processes(ranks):
    assert [rank["mean"] for rank in ranks] == [1.5, 1.5]
    assert [rank["broadcast"] for rank in ranks] == ["from 0", "from 0"]


# ---- main.py, where the second process differs

TOLD = {  # case: what the line says
    "modifiers": "MODEL.ATTENTION.MODIFIERS is ['qk_residual'] on process 1 and [] on process 0",
    "batch": "DATA.BATCH_SIZE is 4 on process 1 and 8 on process 0",
    "images": "the data: validation images is ",
    "weights": "the weights: head.weight differs, process 1 from process 0",
    "teacher": "the teacher's weights: 1.bias differs, process 1 from process 0",
}
TOLD_LATER = {
    "rate": "TRAIN.BASE_LR is 0.2 on process 1 and 0.1 on process 0",
    "seed": "SEED is 1 on process 1",
    "decay": "TRAIN.WEIGHT_DECAY is 0.3 on process 1",
    "accumulation": "TRAIN.ACCUMULATION_STEPS is 2 on process 1",
    "saving": "TRAIN.SAVE_STEPS is 1 on process 1",
    "precision": "AMP_DTYPE is 'bfloat16' on process 1 and 'auto' on process 0",
    "code": "the code: source of models is 'changed' on process 1",
    "drift": "the weights after update 2: head.bias differs, process 1 from process 0;",
    "average": "the weights after update 2: head.bias (average) differs, process 1 from",
    "moment": "save after update 1: head.bias (optimizer's exp_avg) differs, process 1 from",
}


def assert_told(programs: list[dict], cases: dict[str, str]) -> None:
    """Every process ends with status 2 and the one line."""
    for case, words in cases.items():
        for status, errors, _, _ in [one[case] for one in programs]:
            assert status == 2 and words in errors and errors.count("\n") == 1, (case, errors)


def test_processes_that_differ_are_refused_by_name_and_key(ranks):
    assert_told([one["programs"] for one in ranks], TOLD)


def test_a_process_that_leaves_out_an_exchange_is_found_out(ranks):
    """Row 20: the others go on with gradients of other updates, and plausible losses."""
    lines = {}
    for rank, one in enumerate(ranks):
        status, lines[rank], _, _ = one["programs"]["skipped"]
        assert status != 0
    assert "after update 2: cls_token differs, process 1 from process 0" in lines[1]
    assert "differs, process 1" in lines[0]  # told by process 1 before it went


@pytest.mark.slow
def test_every_other_difference_is_told_too_and_places_may_differ(more):
    assert_told(more, TOLD_LATER)
    assert [one["places"][:2] for one in more] == [[0, ""], [0, ""]]


@pytest.mark.slow
def test_another_computation_of_the_same_is_a_warning(more):
    assert [one["attention"][:2] for one in more] == [[0, ""], [0, ""]]
    log = "\n".join(more[0]["attention"][2])
    assert "not the same on process 1: by another kernel" in log


@pytest.mark.slow
def test_slow_beginnings_and_long_saving_outlast_the_group_timeout(more):
    assert [one["slow"][:2] for one in more] == [[0, ""], [0, ""]]
    assert more[0]["slow"][3] > 6


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_wait_with_the_stacks_of_all(more):
    """Row 19."""
    status, errors, log, _ = more[0]["stuck"]
    assert status == 1 and "TRAIN.GROUP_TIMEOUT" in errors and "all of them live" in errors
    logs = ["\n".join(one["stuck"][2]) for one in more]
    assert all("all stacks" in text for text in logs) and "in stuck" in logs[1]


def test_processes_on_other_devices_are_refused_before_they_form_a_group():
    store, said = torch.distributed.HashStore(), {}

    def compare(rank: int) -> None:
        world = World.__new__(World)
        world.rank, world.size = rank, 2
        world.device = torch.device("cpu" if rank else "cuda")
        with pytest.raises(RunError) as refusal:
            world._compare_devices(store)
        said[rank] = str(refusal.value)

    threads = [threading.Thread(target=compare, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert said[0] == said[1]
    assert said[0].startswith("process 1 runs on cpu as one of 2, process 0 on cuda")
