"""metrics.jsonl of a stopped and resumed run is that of a run never stopped."""

import json
import logging
import sys
from unittest.mock import Mock

import pytest
import torch

from engine.logs import LogError, MetricLog, read_metrics
from engine.wandb_run import WandbOptions


def entries(log, first, last):
    """What a run writes for updates first..last: a line each, and an evaluation every third."""
    for step in range(first, last + 1):
        log.write(step, (step - 1) // 3, "train", loss=1 / step, lr=1e-3 * step)
        if step % 3 == 0:
            evaluation(log, step)


def evaluation(log, step):
    log.write(step, step // 3, "eval", loss=2 / step, acc1=10.0 * step)


def open_log(folder, **options):
    return MetricLog(folder, **{"tensorboard": False, **options})


def test_a_line_is_an_object_with_step_epoch_kind_and_numbers(tmp_path):
    with open_log(tmp_path) as log:
        log.write(3, 1, "train", loss=torch.tensor(0.5), skipped=2)
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
            "step": 3,
            "epoch": 1,
            "kind": "train",
            "loss": 0.5,
            "skipped": 2,
        }


@pytest.mark.parametrize(
    "checkpoint, killed", [(0, 5), (2, 5), (3, 5), (5, 5), (2, 9), (6, 9), (9, 9)]
)
def test_resumed_file_equals_the_uninterrupted_one(tmp_path, checkpoint, killed):
    with open_log(tmp_path / "whole", resume_step=-1) as log:
        entries(log, 1, 12)
    with open_log(tmp_path / "parts", resume_step=-1) as log:
        entries(log, 1, killed)
    with open_log(tmp_path / "parts", resume_step=checkpoint) as log:
        if checkpoint and checkpoint % 3 == 0:
            evaluation(log, checkpoint)  # saved before the evaluation, which therefore runs again
        entries(log, checkpoint + 1, 12)
    parts = (tmp_path / "parts" / "metrics.jsonl").read_bytes()
    assert parts == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("cut", [1, 20, 43])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    with open_log(tmp_path) as log:
        entries(log, 1, 2)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-cut])
    with open_log(tmp_path, resume_step=2) as log:
        entries(log, 2, 2)
    assert path.read_text() == whole


def test_a_new_run_keeps_the_old_ones_numbers_in_a_backup(tmp_path):
    with open_log(tmp_path) as log:
        entries(log, 1, 5)
    old = (tmp_path / "metrics.jsonl").read_bytes()
    open_log(tmp_path, resume_step=-1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"" and (
        tmp_path / "metrics.jsonl.bak"
    ).read_bytes() == old


def test_without_a_step_the_file_is_added_to(tmp_path):
    for step in (1, 2):
        with open_log(tmp_path) as log:
            entries(log, step, step)
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_numbers_that_are_not_finite_are_null_in_valid_json(tmp_path):
    with open_log(tmp_path) as log:
        log.write(1, 0, "train", loss=float("nan"), grad_norm=float("inf"))
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None and line["grad_norm"] is None


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with MetricLog(None, wandb=WandbOptions()) as log:
        log.write(1, 0, "train", loss=1.0)
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_log(tmp_path, tensorboard=True) as log:
        entries(log, 1, 3)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert events.Scalars("eval/acc1")[0].value == 30.0


@pytest.mark.parametrize("resume_step, first", [(-1, 0), (4, 5)])
def test_tensorboard_drops_what_comes_after_the_resumed_update(
    resume_step, first, tmp_path, monkeypatch
):
    board = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    with open_log(tmp_path, resume_step=resume_step, tensorboard=True):
        board.SummaryWriter.assert_called_once_with(tmp_path / "tensorboard", purge_step=first)


def test_missing_tensorboard_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING), open_log(tmp_path, tensorboard=True) as log:
        log.write(1, 0, "train", loss=1.0)
    assert "pip install tensorboard" in caplog.text and read_metrics(tmp_path / "metrics.jsonl")


class FakeWandb:
    """Weights & Biases as far as it is used, without the helpers that newer releases have lost."""

    def __init__(self, failing: tuple = ()) -> None:
        self.failing, self.started, self.logged, self.finished = failing, [], [], 0
        self.taken = set()

    def init(self, **options):
        self.started.append(options)
        if "taken" in self.failing and options.get("mode") != "offline":
            self.taken.add(options["id"])
            raise OSError("no network")
        if options["id"] in self.taken:
            raise RuntimeError(f"run ID {options['id']} is in use")
        if "init" in self.failing and options.get("mode") != "offline" or "all" in self.failing:
            raise OSError("no network")
        return self

    def teardown(self):
        self.taken.clear()

    def log(self, values, step):
        if "log" in self.failing:
            raise BrokenPipeError("its process is gone")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1
        if "log" in self.failing:
            raise BrokenPipeError("its process is gone")


def open_wandb(folder, monkeypatch, failing=(), **options):
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = {"wandb": WandbOptions(), "name": "swin/tag", "resume_step": -1, **options}
    with open_log(folder, **options) as log:
        log.write((options["resume_step"] or 0) + 2, 0, "train", loss=1.0)
        return fake, log.mark["wandb"] if log.mark else None


def test_wandb_is_given_the_numbers_and_continues_under_its_id(tmp_path, monkeypatch):
    fake, mark = open_wandb(tmp_path, monkeypatch, config={"a": 1})
    [started] = fake.started
    assert started["config"] == {"a": 1} and started["project"] == "swin"
    assert mark == {"id": started["id"], "name": "swin/tag"}
    assert fake.logged == [(1, {"train/loss": 1.0, "epoch": 0})] and fake.finished == 1
    again, _ = open_wandb(tmp_path, monkeypatch, resume_step=1)
    assert again.started[0]["id"] == started["id"] and again.started[0]["resume"] == "allow"
    moved, _ = open_wandb(tmp_path / "moved", monkeypatch, resume_step=1, known=mark)
    assert moved.started[0]["id"] == started["id"]
    for folder, options in (
        (tmp_path, {}),  # begun anew
        (tmp_path / "other", {"resume_step": 1, "known": mark, "name": "swin/other"}),
    ):
        assert open_wandb(folder, monkeypatch, **options)[1]["id"] != started["id"]


def test_wandb_gets_project_entity_group_and_tags(tmp_path, monkeypatch):
    options = WandbOptions("mine", "us", "seeds", ["a", "b"])
    [started] = open_wandb(tmp_path, monkeypatch, wandb=options)[0].started
    assert [started[key] for key in ("project", "entity", "group", "tags")] == [
        "mine",
        "us",
        "seeds",
        ["a", "b"],
    ]
    [started] = open_wandb(tmp_path, monkeypatch, name="a:100%/tag")[0].started
    assert started["project"] == "a_100_"


@pytest.mark.parametrize("failing", ["init", "all", "log"])
def test_wandb_that_fails_never_ends_the_run(failing, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        fake, _ = open_wandb(tmp_path, monkeypatch, failing=(failing,))
    assert "no network" in caplog.text or "its process is gone" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert bool(fake.logged) == (failing == "init")  # offline, for `wandb sync`


def test_a_failed_start_of_wandb_goes_on_offline_under_its_id(tmp_path, monkeypatch):
    fake, mark = open_wandb(tmp_path, monkeypatch, failing=("taken",))
    assert fake.logged and {started["id"] for started in fake.started} == {mark["id"]}


def test_missing_wandb_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LogError, match="pip install wandb"):
        open_log(tmp_path, wandb=WandbOptions())
