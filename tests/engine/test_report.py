"""What a run says while it trains: remaining times, speed, losses; nothing without a meaning."""

import logging
import re
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import torch

from engine.logs import MetricLog, read_metrics
from engine.progress import Progress, clock
from engine.report import Report
from engine.signals import StopSignal
from engine.state import CheckpointFolder, Layout, TrainState, copy_whole
from engine.train import Plan, fit
from tests.checkpoint.states import changed, training_state
from tests.engine.small import Loader, NoFiles, evaluation, make_trainer
from utils import World

UPDATE = 60.0  # seconds of a micro-batch on the clock of these tests
VALIDATION = 600.0  # of an evaluation


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class SlowLoader(Loader):
    """Batches that take a minute each."""

    def __init__(self, clock: Clock, batches: int) -> None:
        super().__init__(batches)
        self.clock = clock

    def epoch(self, epoch: int, start_batch: int = 0):
        for batch in super().epoch(epoch, start_batch):
            self.clock.wait(UPDATE)
            yield batch


class TimedReport(Report):
    """Records, for each line of an update, the moment and the seconds that it promises."""

    def _line(self, trainer, read):
        progress, state = self.progress, trainer.state
        moment = progress.timer()
        promise = moment + progress.run_remaining(state), moment + progress.epoch_remaining(state)
        self.__dict__.setdefault("promised", []).append((state.epoch, *promise))
        return super()._line(trainer, read)


def train(
    caplog=None,
    folder=None,
    *,
    batches: int = 6,
    accumulation: int = 1,
    epochs: int = 3,
    max_steps: int = 0,
    state: TrainState | None = None,
    loader=None,
    **options,
):
    """A whole run on a clock of its own; returns (trainer, report, clock, log lines)."""
    clock = Clock()
    trainer = make_trainer(accumulation=accumulation, **options)
    trainer.state = state or trainer.state

    def evaluate(model, **_):
        clock.wait(VALIDATION)
        return evaluation()

    with MetricLog(folder, tensorboard=False) as metrics, StopSignal(trainer.world) as stop:
        report = TimedReport(
            trainer.world,
            metrics,
            layout=trainer.layout,
            batches=batches,
            epochs=epochs,
            max_steps=max_steps,
            print_freq=1,
            timer=clock,
        )
        if caplog is not None:
            caplog.set_level(logging.INFO)
        fit(
            trainer,
            (loader or SlowLoader)(clock, batches),
            evaluate,
            plan=Plan(epochs, max_steps=max_steps),
            folder=NoFiles(),
            report=report,
            stop=stop,
        )
    lines = [record.getMessage() for record in caplog.records] if caplog is not None else []
    return trainer, report, clock, [line for line in lines if line.startswith("Train:")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 2},
        {"accumulation": 4},
        {"max_steps": 9},
        {"max_steps": 12},
        {"max_steps": 100},
        {"state": TrainState(epoch=1, batch=2, update=8)},
    ],
    ids=str,
)
def test_the_promised_end_of_the_run_is_when_it_ends(options):
    _, report, clock, _ = train(**options)
    epochs = [epoch for epoch, *_ in report.promised]
    rest = UPDATE * (6 % options.get("accumulation", 1))  # batches that fill no window
    for epoch, end, _ in report.promised:
        # before the first validation its time is not known
        unknown = (VALIDATION + rest) * len(set(epochs)) if epoch == epochs[0] else 0
        assert clock.now - end == pytest.approx(unknown)


def test_the_promised_end_of_an_epoch_is_when_its_last_update_is_done():
    _, report, _, _ = train(epochs=2)
    ends = {epoch: {end for e, _, end in report.promised if e == epoch} for epoch in (0, 1)}
    assert ends == {0: {1000 + 6 * UPDATE}, 1: {1000 + 12 * UPDATE + VALIDATION}}


def test_the_promised_end_of_an_epoch_is_not_after_max_steps():
    _, report, _, _ = train(epochs=1, max_steps=4)
    assert {end for _, _, end in report.promised} == {1000 + 4 * UPDATE}


def test_a_line_of_an_update_reads_like_swins_with_the_end_of_the_run(caplog):
    trainer, _, _, lines = train(caplog, epochs=2)
    fields = lines[7].split("\t")
    assert fields[0] == "Train: [1/2][1/6]"
    left = 4 * UPDATE + VALIDATION
    ends = datetime.now() + timedelta(seconds=left)
    found = re.fullmatch(r"eta 0:04:00 \(run 0:14:00, ends (\S+ \S+)\)", fields[1])
    assert abs(datetime.strptime(found[1], "%Y-%m-%d %H:%M") - ends) < timedelta(minutes=5)
    assert fields[2] == f"lr {0.01 * 0.9**7:.4g} wd 0.01"
    assert fields[3:5] == [
        "time 60.0000 (60.0000)",
        f"images/s {4 / UPDATE:.1f} ({4 / UPDATE:.1f})",
    ]
    assert [field.split()[0] for field in fields[5:]] == ["loss", "grad_norm", "skipped"]


@pytest.mark.parametrize("lr", ["2e-07", "0.001", "0.0005123"])
def test_a_small_learning_rate_is_not_shown_as_zero(caplog, lr):
    trainer, report, _, _ = train(epochs=0)
    trainer.optimizer.param_groups[0]["lr"] = float(lr)
    assert f"\tlr {lr} wd" in report._line(trainer, trainer.statistics.read())


def test_the_time_of_a_batch_is_a_share_of_the_updates(caplog):
    _, _, _, lines = train(caplog, accumulation=2, epochs=1)
    assert lines[1].split("\t")[3:5] == [
        f"time {UPDATE:.4f} ({UPDATE:.4f})",
        f"images/s {4 / UPDATE:.1f} ({4 / UPDATE:.1f})",
    ]


def test_images_per_second_are_those_of_all_processes_and_of_whole_updates():
    clock = Clock()
    layout = Layout(batch_size=8, world_size=3, accumulation=2)
    progress = Progress(layout, batches=20, epochs=1, timer=clock)
    for seconds in (2.0, 2.0, 1.0, 1.0):
        clock.wait(seconds)
        progress.update()
        if seconds == 2.0:
            assert progress.recent_images_per_second() == 48 / 2
    assert progress.recent_images_per_second() == 48  # over the last two
    assert progress.images_per_second() == 4 * 48 / 6
    assert (progress.last, progress.mean) == (1.0, 1.5)


def test_nothing_is_divided_by_a_clock_that_stands_still():
    progress = Progress(Layout(8, 1, 1), batches=20, epochs=1, timer=Clock())
    progress.update()
    assert progress.images_per_second() == progress.recent_images_per_second() == 0
    assert progress.run_remaining(TrainState(batch=1)) == 0


def line_of(device: str, scaled: bool, monkeypatch) -> str:
    trainer, report, _, _ = train(epochs=0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    trainer.device = torch.device(device)
    trainer.scaler = SimpleNamespace(is_enabled=lambda: scaled, get_scale=lambda: 65536.0)
    return report._line(trainer, trainer.statistics.read())


def test_memory_is_told_on_cuda_and_the_loss_scale_in_float16_alone(monkeypatch):
    assert "mem" not in line_of("cpu", False, monkeypatch)
    assert "loss_scale" not in line_of("cpu", False, monkeypatch)
    assert line_of("cuda", False, monkeypatch).endswith("\tmem 3MB")
    assert "\tloss_scale 65536\t" in line_of("cpu", True, monkeypatch)


def test_the_mean_loss_of_every_epoch_is_that_of_its_own_updates(tmp_path):
    train(folder=tmp_path)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    means = {e["epoch"]: e["train_loss"] for e in entries if e["kind"] == "epoch"}
    norms = {e["epoch"]: e["grad_norm"] for e in entries if e["kind"] == "epoch"}
    assert list(means) == [0, 1, 2]
    for epoch in means:
        updates = [e for e in entries if e["kind"] == "train" and e["epoch"] == epoch]
        assert len(updates) == 6
        assert means[epoch] == pytest.approx(sum(e["loss"] for e in updates) / 6)
        assert norms[epoch] == pytest.approx(sum(e["grad_norm"] for e in updates) / 6)


def test_the_line_shows_the_mean_loss_of_its_epoch(caplog, tmp_path):
    _, _, _, lines = train(caplog, tmp_path, epochs=2)
    losses = [e["loss"] for e in read_metrics(tmp_path / "metrics.jsonl") if e["kind"] == "train"]
    assert f"\tloss {losses[6]:.4f} ({losses[6]:.4f})\t" in lines[6]
    assert f"\tloss {losses[8]:.4f} ({sum(losses[6:9]) / 3:.4f})\t" in lines[8]


def test_the_metric_log_has_every_number_of_updates_epochs_and_evaluations(tmp_path):
    trainer, _, _, _ = train(folder=tmp_path, epochs=1, batches=2, ema=True)
    first, _, epoch, val, val_ema = read_metrics(tmp_path / "metrics.jsonl")
    read = trainer.statistics.read()
    assert first["lr"] == 0.01 and first["skipped"] == 0
    assert epoch == {
        "step": 2,
        "epoch": 0,
        "kind": "epoch",
        "train_loss": read["loss_mean"],
        "grad_norm": read["norm_mean"],
        "skipped": 0,
    }
    result = {"step": 2, "epoch": 0, "acc1": 50.0, "acc5": 90.0, "loss": 1.0}
    assert val == {**result, "kind": "val"}
    assert val_ema == {**result, "kind": "val_ema"}


def test_skipped_updates_are_counted_in_the_line_and_in_the_metric_log(caplog, tmp_path):
    class Broken(SlowLoader):
        def epoch(self, epoch, start_batch=0):
            for index, (images, targets) in enumerate(super().epoch(epoch, start_batch)):
                yield images * (float("nan") if index == 1 else 1.0), targets

    _, _, _, lines = train(caplog, tmp_path, epochs=1, loader=Broken)
    assert [line.rpartition("\t")[2] for line in lines] == ["skipped 0"] + 5 * ["skipped 1"]
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["skipped"] for entry in entries if "skipped" in entry] == [0] + 6 * [1]


def test_the_log_of_an_epoch_gives_its_time_and_speed(caplog):
    train(caplog, epochs=2)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("EPOCH")]
    speed = f"({4 / UPDATE:.1f} images/s)"
    assert told == [f"EPOCH {epoch} training takes 0:06:00 {speed}" for epoch in (0, 1)]


def test_a_stopped_run_says_where_to_go_on_and_a_finished_one_what_came_out(caplog, tmp_path):
    clock = Clock()
    metrics = SimpleNamespace(path=None)
    report = Report(
        World("cpu"),
        metrics,
        layout=Layout(4, 1, 1),
        batches=6,
        epochs=2,
        print_freq=1,
        timer=clock,
    )
    caplog.set_level(logging.INFO)
    folder = CheckpointFolder(tmp_path)
    state = TrainState(best=87.5, best_epoch=3)
    clock.wait(90061)

    def said(**options):
        caplog.clear()
        report.finish(state, folder, **options)
        return [record.getMessage() for record in caplog.records]

    assert said(signal=15) == [
        "stopped by signal 15; nothing is saved yet, the same command begins anew"
    ]
    about = {"best": 87.5, "best_epoch": 3, "epoch": 4}
    folder.save(changed(training_state(), "progress", training_state()["progress"] | about))
    [stopped] = said(signal=15)
    assert "signal 15" in stopped and str(folder.last) in stopped
    time, missing = said()
    assert time == "Training time 1 day, 1:01:01"
    assert missing.startswith("best accuracy 87.50% (epoch 3), of which no checkpoint is left")
    copy_whole(folder.last, folder.best)
    assert said()[1] == f"best accuracy 87.50% (epoch 3), checkpoint {folder.best}"
    state.best = 88.0
    assert "of which no checkpoint is left" in said()[1]
    state.best_epoch = -1
    assert said()[1] == "no epoch has a score, so there is no best checkpoint"


def test_the_picture_is_told_the_length_of_an_epoch_and_what_the_training_loss_is(
    monkeypatch, tmp_path
):
    told = {}
    monkeypatch.setattr("engine.report.plot_curves", lambda *args, **options: told.update(options))
    report = Report(
        World("cpu"),
        SimpleNamespace(path=tmp_path / "metrics.jsonl"),
        layout=Layout(4, 1, accumulation=3),
        batches=10,
        epochs=2,
        print_freq=1,
        training_loss="with label smoothing",
    )
    report.finish(TrainState(), CheckpointFolder(tmp_path))
    assert told == {"updates_per_epoch": 3, "training_loss": "with label smoothing"}


def test_the_mean_loss_of_an_epoch_is_over_all_processes(tmp_path):
    trainer, _, _, _ = train(epochs=0)
    trainer.statistics.add(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(True))
    world = World("cpu")
    world.mean = lambda value: value + 10
    with MetricLog(tmp_path, tensorboard=False) as metrics:
        report = Report(
            world, metrics, layout=trainer.layout, batches=6, epochs=1, print_freq=1, timer=Clock()
        )
        report.end_epoch(trainer)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train_loss"] == 13


def test_a_clock_shows_hours_minutes_and_seconds():
    assert clock(3661.9) == "1:01:01"
