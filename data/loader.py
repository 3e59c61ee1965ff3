"""The DataLoader with this package's order, error reporting and restart at a batch."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.datasets import Batch
from data.errors import DataError, worker_failure
from data.samplers import EvalBatches, TrainBatches
from data.waiting import (
    SLICE,
    STALL,
    FromMemory,
    FromThread,
    FromWorkers,
    NotYet,
    Patience,
    end_processes,
    prepare_worker,
    reports_wanted,
    starting_workers,
    tell_stall,
)

logger = logging.getLogger(__name__)
Fetcher = FromWorkers | FromThread | FromMemory


def _as_is(batch: Batch) -> Batch:
    return batch


class Loader:
    """Yields (images, targets). Neither building nor iterating draws from the process's global
    generators.

    Args:
        dataset: answers __getitems__(keys) with a Batch, has `source` and `reading`.
        batches: the batch sampler.
        num_workers: 0 loads in this process; workers live as long as the loader.
        timeout: seconds to wait for a batch, 0 for ever.
        corrupt_limit: different unreadable images tolerated.
    Raises (while iterating): DataError.
    """

    def __init__(
        self,
        dataset,
        batches: TrainBatches | EvalBatches,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout: float = 0,
        corrupt_limit: int = 0,
    ):
        self.dataset = dataset
        self.batches = batches
        self.num_workers = num_workers
        self.timeout = timeout
        # so that a whole number of them makes the timeout
        self.slice = timeout / math.ceil(timeout / SLICE) if timeout else SLICE
        self.corrupt_limit = corrupt_limit
        self.corrupt: set[str] = set()  # names of unreadable images met so far
        self._end: Callable[[], Any] = lambda: None  # ends the loading processes
        parallel = {}
        if num_workers:
            parallel = {
                "timeout": self.slice,
                "persistent_workers": True,
                "prefetch_factor": 2,
                "worker_init_fn": prepare_worker,
            }
        # the image that each worker, or the one thread of this process, is at
        reading = torch.full((max(num_workers, 1),), -1)
        dataset.reading = reading.share_memory_() if num_workers else reading
        # A generator of its own, or every start of an epoch draws a seed from torch's global one.
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            generator=torch.Generator(),
            **parallel,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def close(self) -> None:
        """Ends the loading processes; the loader can be used again, with new ones.

        The end of the loader or of the program does that too: left to the interpreter they would be
        asked by a signal that they do not see, and waited for.
        """
        self._loader._iterator = None
        self._end()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._checked(self._start())

    def _start(self) -> Fetcher:
        """Starts the epoch, and with the first one the workers."""
        if not self.num_workers:
            batches = iter(self._loader)
            if self.dataset.may_stall:
                return FromThread(batches, self.slice)
            return FromMemory(batches)
        try:
            if self._loader._iterator is not None:
                return FromWorkers(self._restarted())
            with starting_workers():
                workers = iter(self._loader)
                self._end = weakref.finalize(self, end_processes, workers, os.getpid())
            return FromWorkers(workers)
        except Exception as error:
            raise self._failure(error) from None

    def _restarted(self) -> Iterator[Batch]:
        """The workers, at the start of another epoch: each answers once it has left the one before,
        and for that its timeout is the whole one.
        """
        workers = self._loader._iterator
        reading = self._being_read()
        alarm = threading.Timer(STALL, tell_stall, (STALL, self.timeout, reading, workers._workers))
        alarm.daemon = True
        alarm.start()
        workers._timeout = self.timeout
        try:
            with reports_wanted():
                return iter(self._loader)
        finally:
            workers._timeout = self.slice
            alarm.cancel()

    def _checked(self, batches: Fetcher) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            while (batch := self._next(batches)) is not None:
                if batch.error:
                    raise DataError(batch.error)
                for note in batch.replaced:
                    self._count(note)
                yield batch.images, batch.targets
        finally:
            batches.close()

    def _next(self, batches: Fetcher) -> Batch | None:
        begun, patience = time.monotonic(), None
        while True:
            try:
                return batches.get()
            except NotYet:
                pass
            except Exception as error:
                raise self._failure(error) from None
            if patience is None:
                patience = Patience(self.timeout, begun, self._being_read, self._processes())
            patience.check()

    def _processes(self) -> list:
        workers = self._loader._iterator
        return [] if workers is None else workers._workers

    def _failure(self, error: Exception) -> Exception:
        """What to tell where a batch did not come; of a dead worker a DataError."""
        if isinstance(error, OSError) and self._loader._iterator is None and self.num_workers:
            return DataError(
                f"{self.num_workers} data workers cannot be started ({error.strerror or error});"
                " lower DATA.NUM_WORKERS"
            )
        return worker_failure(error, self._being_read(), self._processes()) or error

    def _count(self, note: str) -> None:
        if note in self.corrupt:
            return
        self.corrupt.add(note)
        if len(self.corrupt) > self.corrupt_limit:
            raise DataError(
                f"{len(self.corrupt)} training images cannot be read, more than DATA.CORRUPT_LIMIT"
                f" {self.corrupt_limit}; the last: {note}"
            )
        logger.warning(
            "training image replaced, it cannot be read (%d of at most %d): %s",
            len(self.corrupt),
            self.corrupt_limit,
            note,
        )

    def _being_read(self) -> str:
        """The images that the workers are at, in words."""
        if self.dataset.reading is None:
            return ""
        indices = [index for index in self.dataset.reading.tolist() if index >= 0]
        names = ", ".join(f"'{self.dataset.source.name(index)}'" for index in indices)
        return f" while reading {names}" if names else ""


class TrainLoader(Loader):
    """A Loader whose epochs can be entered at any batch; the batches from there on are those of the
    whole epoch, bit by bit.
    """

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start_batch, start_batch + 1, ... of `epoch`. Raises: ValueError if the epoch has
        fewer than start_batch.
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(
                f"start_batch {start_batch} is outside the epoch of {len(self)} batches on this"
                " rank"
            )
        self.batches.epoch = epoch
        self.batches.start = start_batch
        return iter(self)
