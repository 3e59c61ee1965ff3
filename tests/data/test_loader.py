"""Loading: exact under any number of workers and from any batch; faults arrive as one line."""

import os
import random
import re
import signal
import threading
import time
from multiprocessing import connection

import numpy as np
import pytest
import torch

import utils
from data import loader as loader_module
from data import waiting
from data.datasets import ImageDataset
from data.errors import DataError, worker_failure
from data.layouts import folder
from data.loader import Loader, TrainLoader
from data.randomness import Key
from data.samplers import EvalBatches, TrainBatches
from data.transforms import eval_transform, train_transform
from tests.data.fakes import class_folder

STATS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TRAIN = train_transform((40, 40), **STATS, auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5)
EVAL = eval_transform((40, 40), **STATS)


@pytest.fixture
def root(tmp_path):
    return class_folder(tmp_path)


def train_loader(
    root, num_workers=0, transform=TRAIN, copies=1, limit=10, **loading
) -> TrainLoader:
    source = folder(root).train
    return TrainLoader(
        ImageDataset(source, transform, seed=3, training=True),
        TrainBatches(len(source), 4, seed=3, copies=copies),
        num_workers=num_workers,
        corrupt_limit=limit,
        **loading,
    )


def val_loader(root, num_workers=0, **loading) -> Loader:
    source = folder(root, train=False).val
    return Loader(
        ImageDataset(source, EVAL), EvalBatches(len(source), 4), num_workers=num_workers, **loading
    )


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other)
    )


def test_batches_are_bit_identical_for_any_number_of_workers_and_over_epochs(root):
    single, double = (
        train_loader(root, 0),
        train_loader(root, 2),
    )  # the two workers persist over the epochs
    for epoch in range(3):
        assert same(list(single.epoch(epoch)), list(double.epoch(epoch)))
    assert not same(list(single.epoch(0)), list(single.epoch(1)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_entered_at_a_batch_continues_bit_by_bit(root, num_workers):
    loader = train_loader(root, num_workers)
    whole = list(loader.epoch(5))
    assert len(whole) == len(loader) == 3
    for start in (1, 2, 3):
        assert same(list(loader.epoch(5, start)), whole[start:])
    assert same(list(train_loader(root, num_workers).epoch(5, 1)), whole[1:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_leaving_an_epoch_early_does_not_disturb_the_next(root, num_workers):
    loader = train_loader(root, num_workers)
    expected = list(loader.epoch(1))
    next(loader.epoch(0))
    assert same(list(loader.epoch(1)), expected)


def test_a_start_beyond_the_epoch_is_refused(root):
    with pytest.raises(ValueError, match="start_batch 4 is outside the epoch of 3"):
        train_loader(root).epoch(0, 4)


def test_targets_belong_to_their_images(root):
    loader = train_loader(root, transform=EVAL)
    source = loader.dataset.source
    known = {EVAL(source.read(i)).sum().item(): int(source.labels[i]) for i in range(len(source))}
    for images, targets in loader.epoch(0):
        assert [known[image.sum().item()] for image in images] == targets.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_process_generators_are_left_untouched(root, num_workers):
    loader, evaluation = train_loader(root, num_workers), val_loader(root, num_workers)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    list(loader.epoch(0))
    list(evaluation)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[2])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1]))


def test_a_sample_that_takes_longer_than_one_look_at_the_clock_is_the_same(root, monkeypatch):
    """The thread that loads it draws from the global generators meanwhile."""
    monkeypatch.setattr(loader_module, "SLICE", 0.02)

    def slow(image):
        parts = [torch.rand(1)]
        time.sleep(0.05 if waits else 0)
        return torch.cat([*parts, torch.rand(1), torch.tensor([random.random()])])

    waits = False
    expected = next(train_loader(root, transform=slow).epoch(0))
    waits = True
    state = torch.get_rng_state()
    batch = next(train_loader(root, transform=slow).epoch(0))
    assert same([batch], [expected])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_state_of_the_process_has_no_influence_on_the_batches(root):
    torch.manual_seed(1)
    first = list(train_loader(root).epoch(0))
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert same(first, list(train_loader(root).epoch(0)))


def test_copies_of_repeated_augmentation_are_augmented_differently(root):
    images = torch.cat([images for images, _ in train_loader(root, copies=3).epoch(0)])
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-300]),
    "html": lambda file: file.write_bytes(b"<html>"),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_training_image_is_replaced_the_same_way_everywhere_and_named_once(
    root, caplog, damage, num_workers
):
    victim = root / "train" / "bee" / "006.jpg"
    loader = train_loader(root, num_workers)
    DAMAGE[damage](victim)
    epochs = [list(loader.epoch(epoch)) for epoch in (0, 1, 2, 3, 4)]
    assert (
        sum(str(victim) in record.message for record in caplog.records) == 1
        and len(loader.corrupt) == 1
    )
    if num_workers == 0 and damage != "gone":
        again = train_loader(root)
        assert all(same(list(again.epoch(epoch)), batches) for epoch, batches in enumerate(epochs))


def test_what_replaces_a_damaged_image_follows_the_seed(root):
    source = folder(root).train
    with open(source.name(3), "wb"):
        pass
    first, again, other = (
        ImageDataset(source, EVAL, seed, training=True).__getitems__(
            [Key(epoch, 3) for epoch in range(6)]
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_replacing_one_image_changes_no_other(root):
    source = folder(root).train
    whole = list(train_loader(root, transform=EVAL).epoch(0))
    index = TrainBatches(15, 4, seed=3).order(0)[0][2]
    with open(source.name(index), "wb"):
        pass
    damaged = list(train_loader(root, transform=EVAL).epoch(0))
    assert same(whole[1:], damaged[1:]) and torch.equal(
        whole[0][0][[0, 1, 3]], damaged[0][0][[0, 1, 3]]
    )
    assert not torch.equal(whole[0][0][2], damaged[0][0][2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_damage_than_the_limit_stops_with_one_line(root, num_workers):
    for file in sorted((root / "train").rglob("*.jpg"))[:8]:
        file.write_bytes(b"")
    loader = train_loader(root, num_workers, limit=2)
    message = (
        r"3 training images cannot be read, more than DATA.CORRUPT_LIMIT 2; the last: .*\.jpg:"
        r" empty file"
    )
    with pytest.raises(DataError, match=message) as caught:
        for epoch in range(3):
            list(loader.epoch(epoch))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_without_one_readable_image_stops(root, num_workers):
    for file in (root / "train").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(
        DataError, match="10 training images in a row cannot be read, the last: .*jpg"
    ):
        list(train_loader(root, num_workers, limit=100).epoch(0))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_validation_image_is_an_error_that_names_the_file(root, num_workers, damage):
    loader = val_loader(root, num_workers)
    DAMAGE[damage](root / "val" / "bee" / "019.jpg")
    with pytest.raises(
        DataError, match="validation image cannot be read: .*val/bee/019.jpg"
    ) as caught:
        list(loader)
    assert "\n" not in str(caught.value)


class Acts:
    """A transform that does something else first."""

    def __init__(self, act):
        self.act = act

    def __call__(self, image):
        self.act()
        return EVAL(image)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_worker_hangs_and_the_file_it_was_reading_is_named(root, num_workers, monkeypatch, caplog):
    """With and without loading processes; before that a warning shows where the program waits."""
    monkeypatch.setattr(waiting, "STALL", 0.4)
    monkeypatch.setattr(loader_module, "SLICE", 0.25)
    hanging = Acts(lambda: time.sleep(30))
    loader = train_loader(root, num_workers, transform=hanging, timeout=1)
    before = torch.get_rng_state()
    began = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"no batch arrived within DATA.TIMEOUT seconds while reading '.*train/.*jpg'",
    ) as caught:
        list(loader.epoch(0))
    assert time.monotonic() - began < 10 and "\n" not in str(caught.value)
    warning = next(line for line in caplog.messages if line.startswith("no batch for"))
    assert "while reading '" in warning and "thread MainThread" in warning
    if not num_workers:
        assert "thread images" in warning and "time.sleep(30)" in warning
        # the state that a checkpoint would hold is that between two batches
        assert torch.equal(torch.get_rng_state(), before)
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_signal_ends_the_wait_for_a_batch_that_does_not_come(root, num_workers):
    class Stop(BaseException):
        pass

    def stop(number, frame):
        raise Stop

    loader = train_loader(root, num_workers, transform=Acts(lambda: time.sleep(30)))
    before = signal.signal(signal.SIGTERM, stop)
    try:
        began = time.monotonic()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Stop):
            next(loader.epoch(0))
        loader.close()
        assert time.monotonic() - began < 10
    finally:
        signal.signal(signal.SIGTERM, before)


DEATH = "a data worker died.*lower DATA.NUM_WORKERS"


def test_worker_killed_while_it_loads(root):
    loader = train_loader(root, 1, transform=Acts(lambda: os.kill(os.getpid(), 9)))
    with pytest.raises(DataError, match=DEATH) as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)
    loader.close()


def kill(loader) -> None:
    """Kills the workers and waits until they are gone."""
    workers = loader._loader._iterator._workers
    for process in workers:
        os.kill(process.pid, signal.SIGKILL)
        connection.wait([process.sentinel], timeout=5)


@pytest.mark.parametrize("making", [train_loader, val_loader])
def test_worker_killed_between_two_batches_disturbs_nothing_but_the_next(root, making):
    """The report waits until a batch is asked for, so that an update is never left half done."""
    loader = making(root, 2)
    batches = iter(loader)
    next(batches)
    kill(loader)
    for _ in range(100):
        time.sleep(0.001)  # torch's own handler would raise here
    with pytest.raises(DataError, match=DEATH) as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    loader.close()
    assert len(list(loader)) == len(loader)  # with new workers


def test_worker_killed_between_two_epochs(root):
    loader = train_loader(root, 2)
    list(loader.epoch(0))
    kill(loader)
    with pytest.raises(DataError, match=DEATH):
        list(loader.epoch(1))
    loader.close()


def test_worker_killed_is_not_told_as_a_device_that_is_full(capsys):
    report = RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed")
    utils.print_error(worker_failure(report))
    told = capsys.readouterr().err
    assert "a data worker died" in told and "device" not in told


def test_worker_killed_before_the_loader_is_closed(root):
    loader, other = train_loader(root, 2), val_loader(root, 1)
    list(loader.epoch(0))
    kill(loader)
    loader.close()
    assert len(list(other)) == len(other)  # whose wait is not disturbed by the dead of another
    other.close()


@pytest.mark.parametrize(
    "error", [ConnectionResetError(), EOFError(), FileNotFoundError(2, "gone"), RuntimeError("x")]
)
def test_worker_killed_while_it_sends_a_batch(root, error, monkeypatch):
    """What breaks off is reported as the death that it is, whatever torch makes of it; without a
    death it stays what it is.
    """
    loader = train_loader(root, 1)
    batches = loader.epoch(0)
    next(batches)

    def broken(self):
        raise error

    monkeypatch.setattr(waiting.FromWorkers, "get", broken)
    with pytest.raises(type(error)):
        next(batches)
    kill(loader)
    with pytest.raises(DataError, match=r"died \(pid [0-9]+, exit status -9\)"):
        loader._next(waiting.FromWorkers(None))
    loader.close()


def test_worker_killed_with_the_thread_that_pins_memory():
    """torch does not look after that thread where it has a timeout."""

    class Iterator:
        _pin_memory_thread = threading.Thread()  # not alive

        def __next__(self):
            raise RuntimeError("DataLoader timed out after 5 seconds")

    with pytest.raises(RuntimeError) as caught:
        waiting.FromWorkers(Iterator()).get()
    assert re.search(DEATH, str(worker_failure(caught.value)))


def test_workers_that_cannot_be_started_are_told(root, monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    loader = train_loader(root, 2)
    monkeypatch.setattr(loader_module.DataLoader, "__iter__", refuse)
    with pytest.raises(DataError, match="2 data workers cannot be started .Resource temporarily"):
        list(loader.epoch(0))


def test_other_runtime_errors_are_not_taken_for_worker_failures():
    assert worker_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    report = (
        "DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that workers are"
        " out of shared memory."
    )
    assert "shm" in str(worker_failure(RuntimeError(report)))


def test_workers_do_not_see_the_signals_that_stop_a_run(root):
    loader = train_loader(root, 1)
    batches = loader.epoch(0)
    worker = loader._loader._iterator._workers[0]
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        os.kill(worker.pid, getattr(signal, name))
    assert len(list(batches)) == 3 and worker.is_alive()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGTERM not in blocked and signal.SIGINT not in blocked
    loader.close()
