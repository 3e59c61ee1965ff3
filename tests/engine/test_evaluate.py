"""Evaluation is exact: one number for one set of images, however they are split."""

import csv
import logging
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    recall_score,
    top_k_accuracy_score,
)
from torch import nn

from engine.evaluate import ProgressLines, Totals, evaluate, write_per_class
from engine.signals import StopSignal
from kernels.linear import kept_for
from utils import RunError, World

# the children only evaluate
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
CLASSES, IMAGES = 7, 61


class Lookup(nn.Module):
    """An image is the number of its row of logits, so that no arithmetic depends on the split."""

    def __init__(self, classes=CLASSES, images=IMAGES):
        super().__init__()
        self.logits = nn.Parameter(
            2 * torch.randn(images, classes, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].long()]


def data(classes=CLASSES, images=IMAGES):
    numbers = torch.arange(images).float().view(-1, 1, 1, 1)
    return numbers, torch.randint(classes, (images,), generator=torch.Generator().manual_seed(1))


def split(sizes, chosen=slice(None)):
    images, targets = (tensor[chosen] for tensor in data())
    return list(zip(images.split(sizes), targets.split(sizes), strict=True))


def run(loader, model=None, **options):
    return evaluate(model or Lookup(), loader, device="cpu", num_classes=CLASSES, **options)


def test_result_is_that_of_scikit_learn():
    model, (_, targets) = Lookup(), data()
    result = run(split(10), model, per_class=True)
    scores = model.logits.detach().double().softmax(1).numpy()
    guesses = scores.argmax(1)
    assert result.count == IMAGES and result.topk == 5
    assert result.acc1 == pytest.approx(100 * accuracy_score(targets, guesses), rel=1e-12)
    assert result.acc5 == pytest.approx(100 * top_k_accuracy_score(targets, scores, k=5), rel=1e-12)
    assert result.loss == pytest.approx(log_loss(targets, scores), rel=1e-6)
    confusion = confusion_matrix(targets, guesses, labels=range(CLASSES))
    assert result.confusion.tolist() == confusion.tolist()
    recall = 100 * recall_score(targets, guesses, average=None)
    assert result.per_class.tolist() == pytest.approx(recall, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 13, 60, 61])
def test_batch_size_does_not_change_the_result(size):
    whole, split_up = run(split(IMAGES), per_class=True), run(split(size), per_class=True)
    assert (whole.count, whole.acc1, whole.acc5) == (split_up.count, split_up.acc1, split_up.acc5)
    assert torch.equal(whole.confusion, split_up.confusion)
    assert whole.loss == pytest.approx(split_up.loss, rel=1e-14)


def on_one_of(rank, world, folder, reduce):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    model = nn.parallel.DistributedDataParallel(Lookup())
    result = run(split(4, slice(rank, None, world)), model, per_class=True, reduce=reduce)
    torch.save(vars(result), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_agree_on_the_result_of_one_process(world, tmp_path):
    """61 images over 2 or 3 processes in batches of 4: unequal numbers of batches, no image twice,
    none left out.
    """
    mp.start_processes(on_one_of, (world, str(tmp_path), True), nprocs=world, start_method="fork")
    alone = run(split(IMAGES), per_class=True)
    for rank in range(world):
        result = torch.load(tmp_path / f"{rank}.pth")
        assert result["count"] == alone.count
        assert result["acc1"] == alone.acc1 and result["acc5"] == alone.acc5
        assert torch.equal(result["confusion"], alone.confusion)
        assert torch.equal(result["per_class"], alone.per_class)
        assert result["loss"] == pytest.approx(alone.loss, rel=1e-14)


def test_more_processes_than_images_do_not_hang(tmp_path, monkeypatch):
    two = [tensor[:2] for tensor in data()]
    monkeypatch.setitem(
        globals(),
        "split",
        lambda size, chosen: list(zip(*(tensor[chosen].split(1) for tensor in two), strict=True)),
    )
    mp.start_processes(on_one_of, (3, str(tmp_path), True), nprocs=3, start_method="fork")
    assert [torch.load(tmp_path / f"{rank}.pth")["count"] for rank in range(3)] == [2, 2, 2]


def test_without_reduction_every_process_keeps_its_own_count(tmp_path):
    mp.start_processes(on_one_of, (2, str(tmp_path), False), nprocs=2, start_method="fork")
    assert [torch.load(tmp_path / f"{rank}.pth")["count"] for rank in range(2)] == [31, 30]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_fewer_than_five_classes_use_all_of_them(classes):
    images, targets = data(classes)
    result = evaluate(Lookup(classes), [(images, targets)], device="cpu", num_classes=classes)
    assert result.topk == classes and result.acc5 == 100.0


def test_a_signal_ends_an_evaluation_with_its_batch_and_without_a_result():
    batches = split(10)
    seen = []

    class Signalled(Lookup):
        def forward(self, images):
            seen.append(len(images))
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(images)

    with StopSignal(World("cpu")) as stop:
        assert run(batches, Signalled(), stop=stop) is None and len(seen) == 2
    with StopSignal(World("cpu")) as stop:
        assert run(batches, stop=stop) == run(batches)


def test_a_class_without_images_has_no_accuracy():
    result = run([(torch.zeros(1, 1, 1, 1), torch.tensor([3]))], per_class=True)
    assert [math.isnan(share) for share in result.per_class.tolist()] == [
        k != 3 for k in range(CLASSES)
    ]


def test_loss_is_formed_in_float32_under_autocast():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, CLASSES)

        def forward(self, images):
            logits = self.linear(images.flatten(1))
            assert logits.dtype == torch.bfloat16
            self.given = logits.detach().double()
            return logits

    model, (images, targets) = Wide(), data()
    for autocast in (
        torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ):
        result = run([(images / IMAGES, targets)], model, autocast=autocast)
        exact = nn.functional.cross_entropy(model.given, targets).item()
        assert result.loss == pytest.approx(exact, rel=1e-6)  # bfloat16 would err by 4e-3


@pytest.mark.parametrize("training", [True, False])
def test_model_runs_in_eval_mode_without_gradients_and_gets_its_mode_back(training):
    class Watch(Lookup):
        def forward(self, images):
            assert not self.training and not torch.is_grad_enabled()
            assert kept_for(self) is not None  # weights are prepared
            return super().forward(images)

    model = Watch().train(training)
    run(split(8), model)
    assert model.training == training


def test_log_lines_are_swins(caplog):
    with caplog.at_level(logging.INFO):
        result = run(split(10), print_freq=3, logger=logging.getLogger("x"))
    lines = [record.message for record in caplog.records]
    assert [line.split("\t")[0] for line in lines[:-1]] == [
        "Test: [0/7]",
        "Test: [3/7]",
        "Test: [6/7]",
    ]
    assert [field.split()[0] for field in lines[0].split("\t")] == [
        "Test:",
        "Time",
        "Loss",
        "Acc@1",
        "Acc@5",
    ]
    assert lines[-1] == f" * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}"
    averages = [field.rpartition(" ")[2] for field in lines[-2].split("\t")[2:]]  # over all images
    assert averages == [f"({result.loss:.4f})", f"({result.acc1:.3f})", f"({result.acc5:.3f})"]


def test_a_line_shows_what_came_since_the_last_one_and_the_average_so_far(caplog):
    with caplog.at_level(logging.INFO):
        run(split(10), print_freq=3, logger=logging.getLogger("x"))
    line = caplog.records[1].message  # batches 1 to 3; the average is over 0 to 3
    latest, average = run(split(10)[1:4]), run(split(10)[:4])
    assert f"\tLoss {latest.loss:.4f} ({average.loss:.4f})\t" in line
    assert f"\tAcc@1 {latest.acc1:.3f} ({average.acc1:.3f})\t" in line
    assert line.endswith(f"\tAcc@5 {latest.acc5:.3f} ({average.acc5:.3f})")


def test_a_line_shows_the_time_of_a_batch_since_the_last_line_and_so_far(caplog, monkeypatch):
    moments = iter([0.0, 3.0, 9.0, 12.0])  # the start, and three lines
    clock = SimpleNamespace(perf_counter=lambda: next(moments))
    monkeypatch.setattr("engine.evaluate.time", clock)
    with caplog.at_level(logging.INFO):
        run(split(10), print_freq=3, logger=logging.getLogger("x"))
    times = [record.message.split("\t")[1] for record in caplog.records[:-1]]
    assert times == ["Time 3.000 (3.000)", "Time 2.000 (2.250)", "Time 1.000 (1.714)"]


def test_peak_memory_is_told_on_cuda_alone(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    lines = ProgressLines([], 1, torch.device("cuda"), logging.getLogger("x"))
    totals = Totals(CLASSES, torch.device("cpu"))
    images, targets = split(10)[0]
    totals.add(Lookup()(images), targets)
    with torch.no_grad(), caplog.at_level(logging.INFO):
        lines.after_batch(0, totals)
    assert caplog.records[0].message.endswith("\tMem 3MB")


def test_disagreeing_class_counts_and_empty_sets_are_refused():
    with pytest.raises(RunError, match="the model gives 7 classes, the data have 3"):
        evaluate(Lookup(), split(5), device="cpu", num_classes=3)
    with pytest.raises(RunError, match="no image"):
        run([])


def test_per_class_files_hold_the_counts(tmp_path):
    result = run(split(10), per_class=True)
    names = [f"class {k}" for k in range(CLASSES)]
    files = write_per_class(result, tmp_path, names)
    table, matrix = (list(csv.reader(file.open())) for file in files)
    assert table[0] == ["class", "images", "accuracy"] and [row[0] for row in table[1:]] == names
    assert sum(int(row[1]) for row in table[1:]) == IMAGES
    assert [[int(cell) for cell in row[1:]] for row in matrix[1:]] == result.confusion.tolist()
    with pytest.raises(ValueError, match="TEST.PER_CLASS"):
        write_per_class(run(split(10)), tmp_path)
