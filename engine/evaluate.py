"""Exact evaluation: sums of counts, one all-reduce, each image counted once."""

import csv
import io
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.finite import NoScoreError, refuse_outputs, refuse_weights
from engine.losses import upcast
from engine.progress import peak_memory
from engine.signals import StopSignal
from kernels.linear import evaluation
from utils import RunError, write_text

__all__ = ["EvalResult", "NoScoreError", "Totals", "evaluate", "write_per_class"]

_logger = logging.getLogger(__name__)

LARGEST_CONFUSION = 4096  # classes; K² counts of 8 bytes are 128 MiB there

Autocast = AbstractContextManager | Callable[[], AbstractContextManager] | None


@dataclass(frozen=True)
class EvalResult:
    """Sums over all images of all processes.

    count: images.
    loss: mean cross-entropy.
    acc1, acc5: per cent with the target first, or among the first `topk` = min(5, K).
    per_class: (K,) per cent, NaN where a class has no image, or None.
    class_images: (K,) images of each class, or None.
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
        self.num_classes = num_classes
        self.topk = min(5, num_classes)
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.loss = torch.zeros((), device=device, dtype=dtype)
        count = partial(torch.zeros, device=device, dtype=torch.int64)
        # images; target first; target among the first topk; outputs that are not finite
        self.counts = count(4)
        self.dtype = torch.float32  # of the outputs
        classes = num_classes if per_class else 0
        square = classes**2 if classes <= LARGEST_CONFUSION else 0
        # Flat, for only 1-D scatters are deterministic on CUDA.
        self.images_of = count(classes)  # images of each class
        self.first_of = count(classes)  # of these, target first
        self.pairs = count(square)  # at target * K + prediction

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits (B, K) of any float dtype, targets (B,)."""
        if logits.shape[1] != self.num_classes:
            raise RunError(
                f"the model gives {logits.shape[1]} classes, the data have {self.num_classes}; set"
                " MODEL.NUM_CLASSES"
            )
        self.dtype = logits.dtype
        logits = upcast(logits)
        finite = logits.isfinite().all(1)
        losses = F.cross_entropy(logits, targets, reduction="none")
        self.loss += losses.to(self.loss.dtype).sum()
        ranked = logits.topk(self.topk).indices
        right = ranked == targets[:, None]
        first = right[:, 0].long()
        ones = torch.ones_like(first)
        self.counts += torch.stack([ones.sum(), first.sum(), right.sum(), (~finite).sum()])
        if len(self.images_of):
            self.images_of.scatter_add_(0, targets, ones)
            self.first_of.scatter_add_(0, targets, first)
        if len(self.pairs):
            self.pairs.scatter_add_(0, targets * self.num_classes + ranked[:, 0], ones)

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
        count, first, within_topk, _ = self.counts.tolist()
        if not count:
            raise RunError("there is no image to evaluate")
        result = EvalResult(
            count=count,
            loss=self.loss.item() / count,
            acc1=100 * first / count,
            acc5=100 * within_topk / count,
            topk=self.topk,
        )
        if len(self.images_of):
            images = self.images_of.cpu()
            shares = 100 * self.first_of.cpu().double() / images.double()
            result = replace(result, per_class=shares, class_images=images)
        if len(self.pairs):
            confusion = self.pairs.cpu().view(self.num_classes, self.num_classes)
            result = replace(result, confusion=confusion)
        return result


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
    stop: StopSignal | None = None,
) -> EvalResult | None:
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
        print_freq: a line (and a wait for the device) every `print_freq` batches; 0 = none.
        stop: a signal ends the evaluation after the batch it comes in, on all processes; there is
            no result then. Every process must have one, or none.
    Raises: RunError if the classes disagree or there are no images; NoScoreError where weights or
        outputs are not finite.
    """
    device = torch.device(device)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # DDP's forward would wait for processes that have no batch left
    refuse_weights(model)
    training = model.training
    totals = Totals(num_classes, device, per_class)
    progress = ProgressLines(loader, print_freq, device, logger)
    model.eval()
    try:
        batches = loader if stop is None else stop.until_stopped(loader)
        with evaluation(model):
            for index, (images, targets) in enumerate(batches):
                images = images.to(device, non_blocking=True)
                targets = targets.to(device, non_blocking=True)
                with entered(autocast):
                    logits = model(images)
                totals.add(logits, targets)
                progress.after_batch(index, totals)
    finally:
        model.train(training)
    if stop is not None and stop.agree():
        return None
    if reduce and dist.is_available() and dist.is_initialized():
        totals.reduce()
    result = totals.result()
    refuse_outputs(int(totals.counts[3]), result.count, totals.dtype)
    logger.info(f" * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}")
    return result


def entered(autocast: Autocast) -> AbstractContextManager:
    """A context to enter: the given one, one made by the given function, or one that does
    nothing.
    """
    if autocast is None:
        return nullcontext()
    return autocast if hasattr(autocast, "__enter__") else autocast()


class ProgressLines:
    """Swin's lines of an evaluation, of this process: the value since the last line, and the
    average so far in brackets.
    """

    def __init__(self, loader, print_freq: int, device: torch.device, logger: logging.Logger):
        self.batches = len(loader) if hasattr(loader, "__len__") else "?"
        self.print_freq = print_freq
        self.device = device
        self.logger = logger
        self.started = time.perf_counter()
        self.time = self.started  # of the last line
        self.batch = 0  # batches up to the last line
        self.sums = torch.zeros(5, dtype=torch.float64)  # the counts, and the loss

    def after_batch(self, index: int, totals: Totals) -> None:
        """Logs a line, and waits for the device, after every print_freq batches."""
        if not self.print_freq or index % self.print_freq:
            return
        sums = torch.cat([totals.counts.cpu().double(), totals.loss.cpu().double()[None]])
        now = time.perf_counter()
        done = index + 1
        images, first, within_topk, _, loss = (sums - self.sums).tolist()
        all_images, all_first, all_within_topk, _, all_loss = sums.tolist()
        batch_time = (now - self.time) / (done - self.batch)
        mean_time = (now - self.started) / done
        fields = [
            f"Test: [{index}/{self.batches}]",
            f"Time {batch_time:.3f} ({mean_time:.3f})",
            f"Loss {loss / images:.4f} ({all_loss / all_images:.4f})",
            f"Acc@1 {100 * first / images:.3f} ({100 * all_first / all_images:.3f})",
            f"Acc@5 {100 * within_topk / images:.3f} ({100 * all_within_topk / all_images:.3f})",
        ]
        if self.device.type == "cuda":
            fields.append(f"Mem {peak_memory(self.device):.0f}MB")
        self.logger.info("\t".join(fields))
        self.time = now
        self.batch = done
        self.sums = sums


def write_per_class(
    result: EvalResult,
    folder: str | Path,
    class_names: list[str] | None = None,
    averaged: bool = False,
) -> list[Path]:
    """Writes per_class.csv (class, images, accuracy in per cent) and confusion.csv (rows: target,
    columns: prediction); of averaged weights per_class_ema.csv and confusion_ema.csv.
    """
    if result.per_class is None:
        raise ValueError(
            "this result has no per-class counts; evaluate with per_class=True (TEST.PER_CLASS)"
        )
    end = "_ema.csv" if averaged else ".csv"
    names = [str(name) for name in class_names or range(len(result.per_class))]
    shares = ["" if math.isnan(share) else f"{share:.4f}" for share in result.per_class.tolist()]
    images = result.class_images.tolist()
    rows = [["class", "images", "accuracy"], *zip(names, images, shares, strict=True)]
    written = [_write_table(Path(folder) / f"per_class{end}", rows)]
    if result.confusion is not None:
        counts = result.confusion.tolist()
        rows = [["target", *names]]
        rows += [[name, *row] for name, row in zip(names, counts, strict=True)]
        written.append(_write_table(Path(folder) / f"confusion{end}", rows))
    return written


def _write_table(path: Path, rows: list) -> Path:
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    write_text(path, table.getvalue())
    return path
