"""Two processes (torchrun, gloo): what they must agree on."""

import json

import pytest
import torch

from tests.engine.runs import run
from tests.engine.small import Loader, make_trainer
from tests.engine.two_ranks import flat, no_dropout


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes saw; they are started once."""
    path = tmp_path_factory.mktemp("ranks") / "out.json"
    done = run("tests/engine/two_ranks.py", str(path), nproc=2)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


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


def test_values_travel_between_processes(ranks):
    assert [rank["mean"] for rank in ranks] == [1.5, 1.5]
    assert [rank["broadcast"] for rank in ranks] == ["from 0", "from 0"]
