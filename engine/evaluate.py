"""Exact evaluation: sums of counts, one all-reduce, each image counted once."""

import csv
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.losses import upcast
from utils import RunError

_logger = logging.getLogger(__name__)

LARGEST_CONFUSION = 4096  # classes; K² counts of 8 bytes are 128 MiB there

Autocast = AbstractContextManager | Callable[[], AbstractContextManager] | None


@dataclass(frozen=True)
class EvalResult:
    """Sums over all images of all processes.

    count: images. loss: mean cross-entropy. acc1, acc5: per cent with the target first, or among
        the first `topk` = min(5, K).
    per_class: (K,) per cent, NaN where a class has no image, or None. class_images: (K,) images of
        each class, or None.
    confusion: (K, K) counts, [target, prediction], or None.
    """

    count: int
    loss: float
    acc1: float
    acc5: float
    topk: int
    per_class: Tensor | None = None
    class_images: Tensor | None = None
    confusion: Tensor | None = None


class Totals:
    """Running sums on the device: loss in float64, counts as integers, so no split of the images
    changes a count.
    """

    def __init__(self, num_classes: int, device: torch.device, per_class: bool = False):
        self.num_classes, self.topk = num_classes, min(5, num_classes)
        self.loss = torch.zeros(
            (), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64
        )  # MPS has no float64
        self.counts = torch.zeros(
            3, device=device, dtype=torch.int64
        )  # images, first, among the first topk
        classes = num_classes if per_class else 0
        square = classes**2 if classes <= LARGEST_CONFUSION else 0
        # Of each class: images, first; and pairs [target * K + prediction]. Flat, for only 1-D
        # scatters are deterministic on CUDA.
        self.images_of, self.first_of, self.pairs = (
            torch.zeros(n, device=device, dtype=torch.int64) for n in (classes, classes, square)
        )

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits (B, K) of any float dtype, targets (B,)."""
        if logits.shape[1] != self.num_classes:
            raise RunError(
                f"the model gives {logits.shape[1]} classes, the data have {self.num_classes}; set"
                " MODEL.NUM_CLASSES"
            )
        logits = upcast(logits)
        self.loss += F.cross_entropy(logits, targets, reduction="none").to(self.loss.dtype).sum()
        ranked = logits.topk(self.topk).indices
        right = ranked == targets[:, None]
        first = right[:, 0].long()
        self.counts += torch.stack([torch.ones_like(first).sum(), first.sum(), right.sum()])
        if len(self.images_of):
            self.images_of.scatter_add_(0, targets, torch.ones_like(first))
            self.first_of.scatter_add_(0, targets, first)
        if len(self.pairs):
            self.pairs.scatter_add_(
                0, targets * self.num_classes + ranked[:, 0], torch.ones_like(first)
            )

    def reduce(self) -> None:
        """Adds up all processes' sums, in one message: float64 holds counts exactly up to 2^53."""
        parts = [self.loss[None], self.counts, self.images_of, self.first_of, self.pairs]
        device = "cpu" if self.loss.device.type == "mps" else self.loss.device
        message = torch.cat([part.to(device).double() for part in parts])
        dist.all_reduce(message)
        for part, total in zip(parts, message.split([len(part) for part in parts]), strict=True):
            part.copy_(total)

    def result(self) -> EvalResult:
        """The means; waits for the device."""
        count, first, among = self.counts.tolist()
        if not count:
            raise RunError("there is no image to evaluate")
        means = EvalResult(
            count, self.loss.item() / count, 100 * first / count, 100 * among / count, self.topk
        )
        if not len(self.images_of):
            return means
        images = self.images_of.cpu()
        confusion = (
            self.pairs.cpu().view(self.num_classes, self.num_classes) if len(self.pairs) else None
        )
        return replace(
            means,
            per_class=100 * self.first_of.cpu().double() / images.double(),
            class_images=images,
            confusion=confusion,
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    *,
    device,
    num_classes: int,
    autocast: Autocast = None,
    reduce: bool = True,
    per_class: bool = False,
    print_freq: int = 0,
    logger: logging.Logger = _logger,
) -> EvalResult:
    """Loss and accuracy of `model` over the images of `loader`, exact for any batch size, order and
    number of processes.

    Args:
        model: in DDP or not; its mode is restored afterwards. An averaged model is passed as
            `ParameterEma.module`.
        loader: (images (B, 3, H, W), targets (B,)) of this process; may be empty or of another
            length than elsewhere.
        autocast: context, or function making one, around the forward pass; the loss is formed in
            float32.
        reduce: add up the sums of all processes; False where every process sees all images
            (TEST.SEQUENTIAL).
        per_class: also accuracy per class and, up to 4096 classes, the confusion matrix.
        print_freq: a line (and a wait for the device) every so many batches; 0 = none.
    Raises: RunError if the classes disagree or there are no images.
    """
    device = torch.device(device)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # DDP's forward would wait for processes that have no batch left
    training = model.training
    totals, lines = (
        Totals(num_classes, device, per_class),
        _Lines(loader, print_freq, device, logger),
    )
    model.eval()
    try:
        for index, (images, targets) in enumerate(loader):
            images, targets = (
                images.to(device, non_blocking=True),
                targets.to(device, non_blocking=True),
            )
            with entered(autocast):
                logits = model(images)
            totals.add(logits, targets)
            lines.after(index, totals)
    finally:
        model.train(training)
    if reduce and dist.is_available() and dist.is_initialized():
        totals.reduce()
    result = totals.result()
    logger.info(f" * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}")
    return result


def entered(autocast: Autocast) -> AbstractContextManager:
    """A context to enter: the given one, one made by the given function, or one that does
    nothing.
    """
    if autocast is None:
        return nullcontext()
    return autocast if hasattr(autocast, "__enter__") else autocast()


class _Lines:
    """The reference's progress lines of this process: value since the last line, and average in
    brackets.
    """

    def __init__(self, loader, print_freq: int, device: torch.device, logger: logging.Logger):
        self.batches = len(loader) if hasattr(loader, "__len__") else "?"
        self.print_freq, self.device, self.logger = print_freq, device, logger
        self.begin = self.before = time.perf_counter()
        self.seen, self.sums = (
            0,
            torch.zeros(4, dtype=torch.float64),
        )  # images, first, among topk, loss

    def after(self, index: int, totals: Totals) -> None:
        if not self.print_freq or index % self.print_freq:
            return
        sums = torch.cat([totals.counts.cpu().double(), totals.loss.cpu().double()[None]])
        now, new = time.perf_counter(), sums - self.sums
        batches = index + 1 - self.seen
        clock = f"Time {(now - self.before) / batches:.3f} ({(now - self.begin) / (index + 1):.3f})"
        self.before, self.seen, self.sums = now, index + 1, sums
        memory = (
            torch.cuda.max_memory_allocated(self.device) / 2**20
            if self.device.type == "cuda"
            else 0
        )
        self.logger.info(
            "\t".join(
                [
                    f"Test: [{index}/{self.batches}]",
                    clock,
                    f"Loss {new[3] / new[0]:.4f} ({sums[3] / sums[0]:.4f})",
                    f"Acc@1 {100 * new[1] / new[0]:.3f} ({100 * sums[1] / sums[0]:.3f})",
                    f"Acc@5 {100 * new[2] / new[0]:.3f} ({100 * sums[2] / sums[0]:.3f})",
                    f"Mem {memory:.0f}MB",
                ]
            )
        )


def write_per_class(
    result: EvalResult, folder: str | Path, class_names: list[str] | None = None
) -> list[Path]:
    """Writes per_class.csv (class, images, accuracy in per cent) and confusion.csv (rows: target,
    columns: prediction).
    """
    if result.per_class is None:
        raise ValueError(
            "this result has no per-class counts; evaluate with per_class=True (TEST.PER_CLASS)"
        )
    names = list(map(str, class_names or range(len(result.per_class))))
    shares = ["" if math.isnan(share) else f"{share:.4f}" for share in result.per_class.tolist()]
    tables = {
        "per_class.csv": [
            ["class", "images", "accuracy"],
            *map(list, zip(names, result.class_images.tolist(), shares, strict=True)),
        ]
    }
    if result.confusion is not None:
        rows = result.confusion.tolist()
        tables["confusion.csv"] = [
            ["target", *names],
            *([name, *row] for name, row in zip(names, rows, strict=True)),
        ]
    for file, table in tables.items():
        with (Path(folder) / file).open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(table)
    return [Path(folder) / file for file in tables]
