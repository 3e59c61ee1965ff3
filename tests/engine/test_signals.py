"""Signals where no training runs: at the start of a run, in an evaluation, and those ignored."""

import os
import signal
from contextlib import contextmanager

import pytest

from engine.signals import STOPPING, Stopped, StopSignal, stopped_at_once
from tests.wiring.runs import PLACE, run
from utils import World


@contextmanager
def handler(number: int, action):
    """The process has this handler of a signal inside."""
    before = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ignored_at_the_start_stays_ignored_and_others_get_their_handler_back(number):
    with handler(number, signal.SIG_IGN), stopped_at_once(), StopSignal(World("cpu")) as stop:
        os.kill(os.getpid(), number)
        assert not stop.received and signal.getsignal(number) == signal.SIG_IGN
    before = signal.getsignal(number)
    with stopped_at_once():
        with StopSignal(World("cpu")) as stop:
            os.kill(os.getpid(), number)
            assert stop.received == number
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), number)
        assert stopped.value.number == number
    assert signal.getsignal(number) == before


def test_the_wait_for_an_item_ends_with_a_signal_but_in_a_group_not_that_for_an_update():
    world = World("cpu")
    with StopSignal(world) as stop:

        def items():
            yield 1
            os.kill(os.getpid(), signal.SIGTERM)
            yield 2

        world.control = "a group"
        assert list(stop.until_stopped(items(), together=True)) == [1, 2]
        assert list(stop.until_stopped(items())) == []
        stop.received = 0
        assert list(stop.until_stopped(items())) == [1]


def signalled(monkeypatch, place: str, number: int, *args) -> dict:
    """What main.py leaves behind where a signal comes in a call of this name."""
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *_, **__: os.kill(os.getpid(), number))
        return run(*args)


@pytest.mark.parametrize(
    "place",
    [
        "main.build_data",
        "program.setup.build_model",
        "program.beginning.choose",
        "engine.session.MetricLog",
    ],
)
def test_a_signal_at_the_start_ends_a_run_with_its_status_and_leaves_nothing(
    place, tmp_path, monkeypatch
):
    left = signalled(monkeypatch, place, signal.SIGTERM, tmp_path)
    assert left["status"] == [143]
    names = {name.rpartition("/")[2] for name in left["files"]}
    assert names <= {"log_rank0.txt", "config.json", "config.yaml"}
    assert "stopped by signal #: nothing had to be saved" in left["log"]


def test_an_evaluation_and_a_timing_end_with_a_signal_and_need_no_folder_to_write_to(
    tmp_path, monkeypatch
):
    run(tmp_path)
    nowhere = {"OUTPUT": "/proc/no"}
    evaluation = ("--eval", "--pretrained", str(tmp_path / PLACE / "best.pth"))
    for words, place in (
        (evaluation, "engine.evaluate.Totals.add"),
        (("--throughput",), "main.throughput"),
    ):
        left = run(tmp_path, nowhere, words)
        assert left["status"] == [0], left["errors"]
        said = "\n".join(left["log"])
        assert "no log file: /proc/no" in said and ("Acc@" in said or "images/s" in said)
        left = signalled(monkeypatch, place, signal.SIGUSR1, tmp_path, nowhere, words)
        assert left["status"] == [138]
    for settings, words in ((nowhere | {"TEST.PER_CLASS": True}, evaluation), (nowhere, ())):
        left = run(tmp_path, settings, words)
        assert left["status"] == [2] and "/proc/no" in left["errors"]


def test_the_averages_per_class_files_are_its_own(tmp_path):
    settings = {"TEST.PER_CLASS": True, "MODEL.EMA.ENABLE": True, "TRAIN.EPOCHS": 3}
    settings |= {"MODEL.EMA.DECAY": 0.9, "TRAIN.BASE_LR": 3.0}
    trained = run(tmp_path, settings)["files"]
    words = ("--eval", "--resume", str(tmp_path / PLACE / "last.pth"))
    tested = run(tmp_path / "test", settings, words)["files"]
    for kind in ("per_class", "confusion"):
        files = [f"{PLACE}/{kind}{end}.csv" for end in ("", "_ema")]
        assert all(trained[name] == tested[name] for name in files)
        assert trained[files[0]] != trained[files[1]]
