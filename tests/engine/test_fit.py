"""The loop around the update: what it runs, saves and reports, and when."""

import math
import os
import signal
import time

import pytest
import torch

from engine.finite import NoScoreError
from engine.guard import DivergedError
from engine.signals import STOPPING, StopSignal
from engine.train import Plan, fit
from tests.engine.small import Loader, Silent, evaluation, make_trainer
from utils import RunError


class Recorder:
    """A report and a checkpoint folder that write down their calls, in one list."""

    def __init__(self, trainer, read: bool = True) -> None:
        self.trainer = trainer
        self.read = read
        self.calls = []

    def start_epoch(self, state) -> None:
        self.calls.append(("start", state.epoch, state.batch))

    def update(self, trainer):
        assert trainer.model.training
        return trainer.statistics.read() if self.read else None

    def end_epoch(self, trainer, complete: bool = True) -> None:
        self.calls.append(("end", trainer.state.epoch, complete))

    def validation(self, state, kind: str, result) -> None:
        self.calls.append((kind, state.epoch, result.acc1))

    def best(self, state) -> None:
        self.calls.append(("best", state.best_epoch, state.best))

    def no_score(self, state, kind: str, error) -> float:
        self.calls.append(("no_score", state.epoch, str(error)))
        return math.nan

    def save(self, payload, copies=lambda: None) -> None:
        copies()
        self.payload = payload
        progress = payload["progress"]
        self.calls.append(("save", progress["epoch"], progress["batch"]))

    def keep_best(self, weights, **about) -> None:
        self.weights = weights
        self.calls.append(("keep_best", about))

    def keep_epoch(self, epoch: int, last: bool = False) -> None:
        self.calls.append(("keep_epoch", epoch, last))

    def of(self, *names: str) -> list:
        return [call for call in self.calls if call[0] in names]


def run(trainer, loader=None, accuracies=(50.0,), *, read: bool = True, extra=None, **plan):
    """fit() with everything recorded; returns (recorder, status)."""
    recorder = Recorder(trainer, read)
    values = iter(accuracies)
    with StopSignal(trainer.world) as stop:
        status = fit(
            trainer,
            loader or Loader(4),
            lambda model, **_: evaluation(next(values)),
            plan=Plan(**{"epochs": len(accuracies), **plan}),
            folder=recorder,
            report=recorder,
            stop=stop,
            extra=extra,
        )
    return recorder, status


def fit_until(trainer, loader, evaluate, recorder, epochs: int) -> int:
    """The status of `fit`, which a signal may end."""
    with StopSignal(trainer.world) as stop:
        return fit(
            trainer,
            loader,
            evaluate,
            plan=Plan(epochs),
            folder=recorder,
            report=recorder,
            stop=stop,
        )


def test_an_epoch_is_trained_validated_saved_and_named_in_this_order():
    recorder, status = run(make_trainer(), extra={"config": {}, "metadata": {"family": "net"}})
    assert status == 0
    about = {"epoch": 0, "accuracy": 50.0, "averaged": False, "family": "net"}
    assert recorder.calls == [
        ("start", 0, 0),
        ("end", 0, True),
        ("save", 0, 4),
        ("val", 0, 50.0),
        ("best", 0, 50.0),
        ("keep_best", about),
        ("keep_epoch", 0, True),
        ("save", 1, 0),
    ]


def test_only_a_higher_accuracy_is_a_new_best_and_only_the_last_epoch_is_final():
    recorder, _ = run(make_trainer(), accuracies=(0.0, 30.0, 30.0, 20.0))
    assert recorder.of("best") == [("best", 0, 0.0)] + 3 * [("best", 1, 30.0)]
    assert [about["epoch"] for _, about in recorder.of("keep_best")] == [0, 1]
    assert [last for *_, last in recorder.of("keep_epoch")] == [False, False, False, True]


@pytest.mark.parametrize("leads", [True, False])
def test_the_best_weights_are_those_whose_accuracy_counts(leads):
    trainer = make_trainer(ema=True, ema_leads=leads)
    recorder, _ = run(trainer, accuracies=(40.0, 60.0), epochs=1)
    module = trainer.ema.module if leads else trainer.model
    assert recorder.of("keep_best")[0][1]["averaged"] is leads
    for name, tensor in module.state_dict().items():
        assert torch.equal(recorder.weights[name], tensor)


def test_what_the_caller_adds_is_in_every_checkpoint():
    recorder, _ = run(make_trainer(), extra={"config": {"SEED": 3}})
    assert recorder.payload["config"] == {"SEED": 3}
    assert recorder.payload["progress"]["update"] == 4


@pytest.mark.parametrize(
    "accumulation, save_steps, inside",
    [(1, 0, []), (1, 1, [1, 2, 3, 4, 5]), (1, 3, [3]), (2, 1, [2, 4]), (2, 2, [4]), (1, 6, [])],
)
def test_inside_an_epoch_every_save_steps_updates_are_saved_and_its_end_before_validating(
    accumulation, save_steps, inside
):
    trainer = make_trainer(accumulation=accumulation)
    recorder, _ = run(trainer, Loader(6), save_steps=save_steps)
    positions = [(0, batch) for batch in [*inside, 6]] + [(1, 0)]
    assert [call[1:] for call in recorder.of("save")] == positions


class Failing(Loader):
    """Its data end with an error where a third batch is asked for."""

    def epoch(self, epoch: int, start_batch: int = 0):
        for index, batch in enumerate(super().epoch(epoch, start_batch), start_batch):
            if index == 2:
                raise RunError("a data worker died")
            yield batch


@pytest.mark.parametrize("accumulation, updates", [(1, 2), (2, 1), (4, 0)])
def test_worker_killed_the_updates_before_it_are_saved(accumulation, updates):
    trainer = make_trainer(accumulation=accumulation)
    recorder = Recorder(trainer)
    with StopSignal(trainer.world) as stop, pytest.raises(RunError, match="a data worker died"):
        fit(
            trainer,
            Failing(),
            None,
            plan=Plan(epochs=1),
            folder=recorder,
            report=recorder,
            stop=stop,
            extra={"config": {"SEED": 3}},
        )
    assert recorder.of("save") == ([("save", 0, 2)] if updates else [])
    if updates:
        assert recorder.payload["progress"]["update"] == updates
        assert recorder.payload["config"] == {"SEED": 3}


def test_a_limit_of_updates_validates_and_saves_where_it_stops():
    recorder, status = run(make_trainer(), accuracies=(10.0, 20.0, 30.0), max_steps=6)
    assert status == 0
    assert recorder.of("start", "val", "save", "keep_epoch") == [
        ("start", 0, 0),
        ("save", 0, 4),
        ("val", 0, 10.0),
        ("keep_epoch", 0, False),
        ("save", 1, 0),
        ("start", 1, 0),
        ("save", 1, 2),
        ("val", 1, 20.0),
        ("save", 1, 2),
    ]


def test_a_signal_saves_after_the_update_it_came_in_without_validating():
    class Signalled(Recorder):
        def update(self, trainer):
            if trainer.state.update == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().update(trainer)

    trainer = make_trainer()
    recorder = Signalled(trainer)
    status = fit_until(trainer, Loader(6), lambda *_, **__: evaluation(), recorder, 5)
    assert status == signal.SIGTERM
    assert recorder.calls == [("start", 0, 0), ("end", 0, False), ("save", 0, 3)]


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("evaluation_of", [0, 1], ids=["the weights", "their average"])
def test_a_signal_in_a_validation_ends_it_and_the_epoch_is_saved(number, evaluation_of):
    seen = []

    def evaluate(model, averaged, stop):
        for batch in stop.until_stopped(range(5)):
            seen.append((averaged, batch))
            if averaged == evaluation_of and batch == 1:
                os.kill(os.getpid(), number)
        return None if stop.agree() else evaluation()

    trainer = make_trainer(ema=True)
    recorder = Recorder(trainer)
    status = fit_until(trainer, Loader(2), evaluate, recorder, 5)
    assert status == number
    assert seen[-1] == (bool(evaluation_of), 1)  # no batch more
    assert recorder.of("start", "save", "keep_epoch") == [("start", 0, 0), ("save", 0, 2)]
    again, status = run(
        trainer, Loader(2), (50.0, 50.0), epochs=1
    )  # as a restarted run: it validates first
    assert status == 0 and again.of("start", "val", "save") == [
        ("start", 0, 2),
        ("val", 0, 50.0),
        ("save", 1, 0),
    ]


def test_a_validation_that_fails_loses_no_epoch():
    recorder = Recorder(make_trainer())

    def evaluate(*_, **__):
        raise RunError("an image cannot be read")

    with pytest.raises(RunError), StopSignal(recorder.trainer.world) as stop:
        fit(
            recorder.trainer,
            Loader(2),
            evaluate,
            plan=Plan(5),
            folder=recorder,
            report=recorder,
            stop=stop,
        )
    assert recorder.of("save") == [("save", 0, 2)]


class Late(Loader):
    """Its second batch never comes; a signal does."""

    def epoch(self, epoch: int, start_batch: int = 0):
        for index, batch in enumerate(super().epoch(epoch, start_batch)):
            if start_batch + index == self.late:
                os.kill(os.getpid(), self.number)
                time.sleep(60)
            yield batch


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("late", [0, 1], ids=["first", "second"])
def test_a_signal_ends_the_wait_for_a_batch_that_does_not_come(number, late):
    loader = Late(3)
    loader.number, loader.late = number, late
    recorder, status = run(make_trainer(), loader)
    assert status == number
    assert recorder.calls == [("start", 0, 0), ("end", 0, False), ("save", 0, late)]


def test_a_signal_in_the_last_save_of_a_run_changes_nothing():
    class Saving(Recorder):
        def keep_epoch(self, epoch, last=False):
            os.kill(os.getpid(), signal.SIGTERM)
            super().keep_epoch(epoch, last)

    trainer = make_trainer()
    recorder = Saving(trainer)
    with StopSignal(trainer.world) as stop:
        for epochs, expected in ((1, 0), (3, signal.SIGTERM)):
            status = fit(
                trainer,
                Loader(2),
                lambda *_, **__: evaluation(),
                plan=Plan(epochs),
                folder=recorder,
                report=recorder,
                stop=stop,
            )
            assert status == expected
            trainer.state.epoch, stop.received = 1, 0
    assert recorder.of("save")[-1] == ("save", 2, 0)


def test_a_limit_reached_with_an_epochs_last_update_begins_no_other():
    class Asked(Loader):
        def epoch(self, epoch: int, start_batch: int = 0):
            asked.append((epoch, start_batch))
            return super().epoch(epoch, start_batch)

    asked, trainer = [], make_trainer()
    recorder, status = run(trainer, Asked(4), max_steps=4, epochs=3)
    assert status == 0 and asked == [(0, 0)]
    assert recorder.of("val", "save") == [("save", 0, 4), ("val", 0, 50.0), ("save", 1, 0)]
    recorder, status = run(trainer, Asked(4), max_steps=4, epochs=3)  # started again
    assert status == 0 and recorder.calls == [] and asked == [(0, 0)]


def test_outputs_that_are_not_finite_get_no_score_and_training_goes_on():
    results = iter([10.0, None, 5.0])

    def evaluate(model, **_):
        score = next(results)
        if score is None:
            raise NoScoreError("no score", by_weights=False)
        return evaluation(score)

    trainer = make_trainer()
    recorder = Recorder(trainer)
    fit_until(trainer, Loader(2), evaluate, recorder, 3)
    assert recorder.of("val", "no_score") == [
        ("val", 0, 10.0),
        ("no_score", 1, "no score"),
        ("val", 2, 5.0),
    ]
    assert (trainer.state.best, trainer.state.best_epoch) == (10.0, 0)


def test_batches_are_asked_for_by_epoch_and_position():
    class Asked(Loader):
        def epoch(self, epoch: int, start_batch: int = 0):
            asked.append((epoch, start_batch))
            return super().epoch(epoch, start_batch)

    asked, trainer = [], make_trainer()
    trainer.state.epoch, trainer.state.batch, trainer.state.update = 1, 2, 6
    run(trainer, Asked(4), accuracies=(1.0, 2.0), epochs=3)
    assert asked == [(1, 2), (2, 0)]
    assert trainer.state.update == 6 + 2 + 4


def test_a_model_in_eval_mode_is_trained_in_training_mode():
    trainer = make_trainer()
    trainer.model.eval()
    run(trainer)  # the recorder asserts it
    assert int(trainer.model.calls) == 4


def test_divergence_is_seen_at_the_end_of_an_epoch_that_read_nothing():
    class Broken(Loader):
        def epoch(self, epoch: int, start_batch: int = 0):
            for images, targets in super().epoch(epoch, start_batch):
                yield images * float("nan"), targets

    with pytest.raises(DivergedError, match="in the last 4 updates"):
        run(make_trainer(), Broken(4), read=False, max_nonfinite=2)
    with pytest.raises(DivergedError, match="in the last 2 updates"):
        run(make_trainer(), Broken(4), max_nonfinite=2)


def test_the_statistics_of_a_continued_epoch_go_on_and_those_of_a_new_one_start_again():
    whole = make_trainer()
    run(whole, Loader(6))
    parts = make_trainer()
    run(parts, Loader(6), max_steps=2)
    run(parts, Loader(6))
    assert parts.statistics.read() == whole.statistics.read()
    run(parts, Loader(6), accuracies=(1.0, 2.0))
    assert parts.statistics.read()["finite"] == 6


def test_the_silent_report_of_other_tests_has_every_method_that_is_called():
    calls = {name for name in vars(Recorder) if not name.startswith("_")}
    assert calls - {"save", "keep_best", "keep_epoch", "of"} <= set(vars(Silent))
