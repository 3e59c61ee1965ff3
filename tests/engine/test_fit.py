"""The loop around the update: what it runs, saves and reports, and when."""

import os
import signal

import pytest
import torch

from engine.guard import DivergedError
from engine.signals import StopSignal
from engine.train import Plan, fit
from tests.engine.small import Loader, Silent, evaluation, make_trainer


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

    def save(self, payload) -> None:
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
            lambda model: evaluation(next(values)),
            plan=Plan(**{"epochs": len(accuracies), **plan}),
            folder=recorder,
            report=recorder,
            stop=stop,
            extra=extra,
        )
    return recorder, status


def test_an_epoch_is_trained_validated_saved_and_named_in_this_order():
    recorder, status = run(make_trainer(), extra={"config": {}, "metadata": {"family": "net"}})
    assert status == 0
    about = {"epoch": 0, "accuracy": 50.0, "averaged": False, "family": "net"}
    assert recorder.calls == [
        ("start", 0, 0),
        ("end", 0, True),
        ("val", 0, 50.0),
        ("best", 0, 50.0),
        ("save", 1, 0),
        ("keep_best", about),
        ("keep_epoch", 0, True),
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
def test_inside_an_epoch_every_save_steps_updates_are_saved_but_not_its_end(
    accumulation, save_steps, inside
):
    trainer = make_trainer(accumulation=accumulation)
    recorder, _ = run(trainer, Loader(6), save_steps=save_steps)
    assert [call[1:] for call in recorder.of("save")] == [(0, batch) for batch in inside] + [(1, 0)]


def test_a_limit_of_updates_validates_and_saves_where_it_stops():
    recorder, status = run(make_trainer(), accuracies=(10.0, 20.0, 30.0), max_steps=6)
    assert status == 0
    assert recorder.of("start", "val", "save", "keep_epoch") == [
        ("start", 0, 0),
        ("val", 0, 10.0),
        ("save", 1, 0),
        ("keep_epoch", 0, False),
        ("start", 1, 0),
        ("val", 1, 20.0),
        ("save", 1, 2),
    ]


class Signalled(Loader):
    """SIGTERM comes with the third batch of the first epoch."""

    def epoch(self, epoch: int, start_batch: int = 0):
        for index, batch in enumerate(super().epoch(epoch, start_batch)):
            if (epoch, index) == (0, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def test_a_signal_saves_after_the_update_it_came_in_without_validating():
    recorder, status = run(make_trainer(), Signalled(6))
    assert status == signal.SIGTERM
    assert recorder.calls == [("start", 0, 0), ("end", 0, False), ("save", 0, 3)]


def test_a_signal_during_the_validation_stops_after_the_epoch_is_saved():
    class Evaluation(Recorder):
        def validation(self, state, kind, result):
            os.kill(os.getpid(), signal.SIGTERM)
            super().validation(state, kind, result)

    trainer = make_trainer()
    recorder = Evaluation(trainer)
    with StopSignal(trainer.world) as stop:
        status = fit(
            trainer,
            Loader(2),
            lambda model: evaluation(),
            plan=Plan(5),
            folder=recorder,
            report=recorder,
            stop=stop,
        )
    assert status == signal.SIGTERM
    assert recorder.of("start", "save", "keep_epoch") == [
        ("start", 0, 0),
        ("save", 1, 0),
        ("keep_epoch", 0, False),
    ]


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
