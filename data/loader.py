"""The DataLoader with this package's order, error reporting and restart at a batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.datasets import Batch
from data.errors import DataError, worker_failure
from data.samplers import EvalBatches, TrainBatches

logger = logging.getLogger(__name__)


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
        self.corrupt_limit = corrupt_limit
        self.corrupt: set[str] = set()  # names of unreadable images met so far
        parallel = {}
        if num_workers:
            parallel = {"timeout": timeout, "persistent_workers": True, "prefetch_factor": 2}
            dataset.reading = torch.full((num_workers,), -1, dtype=torch.int64).share_memory_()
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

        Left to the end of the program they could keep it from ending: they are joined there, and
        one that was started with SIGTERM blocked, or hangs, does not follow the request to stop.
        Here such a one is killed.
        """
        workers = self._loader._iterator
        self._loader._iterator = None
        if workers is not None:
            processes = workers._workers
            workers._shutdown_workers()
            for process in processes:
                if process.is_alive():
                    process.kill()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._checked(iter(self._loader))

    def _checked(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._received(batches):
            if batch.error:
                raise DataError(batch.error)
            for note in batch.replaced:
                self._count(note)
            yield batch.images, batch.targets

    def _received(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise worker_failure(error, self._being_read()) or error from None
            yield batch

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
