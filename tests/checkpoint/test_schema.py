"""A training state of another structure is refused in one line that names the entry."""

import dataclasses

import pytest
import torch

from checkpoint import FORMAT, CheckpointError, read_checkpoint
from checkpoint.schema import DEVICE_RNG, LAYOUT, MOMENTS, PROGRESS, SKIPPED, SUMS, check_training
from engine.state import CheckpointFolder, Layout, TrainState
from engine.statistics import UpdateStatistics
from tests.checkpoint.states import MISSING, changed, training_state
from tests.engine.runs import differences
from tests.engine.small import Loader, make_trainer

WHOLE = {"format": FORMAT, **training_state(ema=True)}
HALF = torch.zeros(3)


def refusal(state) -> str:
    """The message for a training state of another structure."""
    with pytest.raises(CheckpointError) as caught:
        check_training(state, "last.pth")
    message = str(caught.value)
    assert message.startswith("checkpoint last.pth: ") and "\n" not in message
    return message


def test_a_whole_training_state_is_accepted():
    check_training(WHOLE, "last.pth")
    check_training({"format": FORMAT, **training_state()}, "last.pth")


@pytest.mark.parametrize(
    "place",
    [
        "format",
        "model",
        "ema",
        "optimizer",
        "optimizer.state",
        "optimizer.param_groups",
        "lr_scheduler",
        "scaler",
        "progress",
        *(f"progress.{field}" for field in PROGRESS),
        "layout",
        *(f"layout.{field}" for field in LAYOUT),
        "ranks",
        "ranks.0.rng",
        "ranks.0.tally",
        "ranks.0.rng.python",
        "ranks.0.rng.python.words",
        "ranks.0.rng.numpy.keys",
        "ranks.0.rng.torch",
        "optimizer.state.0.exp_avg",
        "optimizer.state.1.exp_avg_sq",
        "optimizer.state.1.step",
        "optimizer.param_groups.0.params",
        "ema.w",
        "model.b",
    ],
)
def test_every_entry_is_needed(place):
    assert place.split(".")[-1] in refusal(changed(WHOLE, place, MISSING))


@pytest.mark.parametrize(
    "place, value, says",
    [
        ("format", 2, "format is 2, expected 1"),
        ("model", {"w": 3.0}, "model is a dict of 1, expected a dict of tensors"),
        ("model", {}, "model is a dict of 0"),
        ("ema", [1], "ema is a list of 1"),
        ("ema.w", HALF, r"ema.w is a tensor \(3,\) of float32, that of model is \(64, 32\)"),
        ("optimizer", None, "optimizer is None, expected a dict of state, param_groups"),
        ("optimizer.state", {}, "optimizer.state is empty after 5 updates"),
        ("optimizer.state.7", {}, r"optimizer.state\[7\] is of no parameter"),
        ("optimizer.state.0", 1.0, r"optimizer.state\[0\] is 1.0"),
        ("optimizer.state.0.exp_avg", HALF, r"optimizer.state\[0\] .* different shapes"),
        ("optimizer.state.0.exp_avg", 0.5, r"optimizer.state\[0\].exp_avg is 0.5, expected a ten"),
        ("optimizer.param_groups", [], "param_groups is a list of 0"),
        ("optimizer.param_groups.0.params", [0, 0], "param_groups do not number their params"),
        ("lr_scheduler", 3, "lr_scheduler is 3"),
        ("scaler", None, "scaler is None"),
        ("progress", [1], "progress is a list of 1, expected a dict of epoch, batch"),
        ("progress.epoch", -1, "progress.epoch is -1, expected a whole number, from 0 to"),
        ("progress.batch", 1.5, "progress.batch is 1.5"),
        ("progress.update", "5", "progress.update is '5'"),
        ("progress.update", True, "progress.update is True"),
        ("progress.best", float("nan"), "progress.best is nan, expected a number from 0 to 100"),
        ("progress.best", 101.0, "progress.best is 101.0"),
        ("progress.best_epoch", -2, "progress.best_epoch is -2"),
        ("progress.more", 1, "progress.more is no field of this version"),
        ("layout.world_size", 2, "ranks has 1 entries, layout.world_size is 2"),
        ("layout.accumulation", 0, "layout.accumulation is 0"),
        ("ranks", [], "ranks is a list of 0"),
        ("ranks.0", 1, r"ranks\[0\] is 1, expected a dict of rng, tally"),
        ("ranks.0.tally", torch.zeros(7).double(), "tally is a tensor .* expected .* 8 elements"),
        ("ranks.0.rng.torch", torch.zeros(9), "rng.torch is a tensor .* expected .* of uint8"),
        ("ranks.0.rng.python.words", torch.zeros(5).long(), "625 elements"),
        ("ranks.0.rng.numpy.position", 625, "position is 625, expected a whole number, from 0"),
        ("ranks.0.rng.cuda", [0], "rng.cuda is a list"),
        ("ranks.0.rng.python.words", torch.full((625,), -1), "625 elements of int64 from 0 to 2"),
        ("ranks.0.rng.python.version", 7, "version is 7, expected 3"),
        ("ranks.0.rng.python.gauss", torch.tensor(float("nan")), "gauss is a tensor"),
        ("ranks.0.rng.numpy.name", "PCG64", "name is 'PCG64', expected 'MT19937'"),
        ("ranks.0.rng.numpy.keys", torch.full((624,), 2**40), "624 elements of int64 from 0 to 2"),
        ("optimizer.state.0.step", HALF, r"state\[0\].step is a tensor .* expected a number"),
        ("optimizer.state.0.step", torch.tensor(float("nan")), r"state\[0\].step"),
        ("optimizer.state.0.step", -1, r"state\[0\].step is -1, expected a number, at least 0"),
        ("optimizer.param_groups.0.optimizer", [], "optimizer is a list of 0, expected a string"),
        ("optimizer.param_groups.0.betas", HALF, "betas is a tensor .* expected two numbers"),
        ("optimizer.param_groups.0.lr", "0.1", "lr is '0.1', expected a number"),
        ("lr_scheduler.last_update", -3, "last_update is -3, expected a whole number, at least 0"),
        ("lr_scheduler.last_update", float("nan"), "last_update is nan"),
        ("lr_scheduler.schedule", "cosine", "schedule is 'cosine', expected a dict"),
        ("config", "text", "config is 'text', expected a dict of plain data"),
    ],
)
def test_types_ranges_and_lengths_are_checked(place, value, says):
    with pytest.raises(CheckpointError, match=says):
        check_training(changed(WHOLE, place, value), "last.pth")


def test_a_parameter_without_a_gradient_needs_no_moments():
    check_training(changed(WHOLE, "optimizer.state.1"), "last.pth")


def test_an_optimizer_without_momentum_and_one_whose_updates_were_all_skipped_keep_nothing():
    sgd = [{"lr": 0.1, "params": [0, 1], "momentum": 0, "optimizer": "SGD"}]
    nothing = changed(WHOLE, "optimizer.state", {})
    check_training(changed(nothing, "optimizer.param_groups", sgd), "last.pth")
    tally = torch.zeros(8, dtype=torch.float64)
    tally[SKIPPED] = 5
    check_training(changed(nothing, "ranks.0.tally", tally), "last.pth")


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
def test_what_a_trainer_saves_follows_the_schema(tmp_path, optimizer):
    trainer = make_trainer(mix=True, ema=True, optimizer=optimizer)
    files = CheckpointFolder(tmp_path)
    for updates in range(3):
        files.save(trainer.capture())
        read_checkpoint(files.last).training_state()
        trainer.update([next(iter(Loader(size=4).epoch(updates)))])
        trainer.advance(6)


def test_the_schema_has_the_fields_of_the_classes_it_describes():
    assert list(PROGRESS) == [field.name for field in dataclasses.fields(TrainState)]
    assert list(LAYOUT) == [field.name for field in dataclasses.fields(Layout)]
    assert PROGRESS.keys() == dataclasses.asdict(TrainState()).keys()
    assert UpdateStatistics.FIELDS[SKIPPED] == "skipped"
    assert SUMS.holds(UpdateStatistics(torch.device("cpu")).values)
    assert set(DEVICE_RNG) >= {"cuda", "mps"}  # utils.choose_device


@pytest.mark.parametrize("name", MOMENTS)
def test_the_moments_are_those_that_the_optimizer_keeps(name):
    from timm.optim import Lamb

    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = {"AdamW": torch.optim.AdamW, "Lamb": Lamb}[name]([parameter])
    optimizer.step()
    assert set(MOMENTS[name]) <= optimizer.state[parameter].keys()


def test_another_structure_in_a_file_is_one_line_that_names_the_file(tmp_path):
    files = CheckpointFolder(tmp_path)
    files.save(changed(training_state(), "ranks"))
    checkpoint = read_checkpoint(files.last)
    with pytest.raises(CheckpointError, match=r"last\.pth: ranks is missing; .*--pretrained"):
        checkpoint.training_state()
    # what is asked of the file is checked: its weights are whole
    assert differences(dict(checkpoint.weights()), training_state()["model"]) == []
