"""How fast a training is and how long it still takes, from the wall clock alone."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta

import torch

from engine.state import Layout, TrainState

MIB = 2**20


class Progress:
    """Times updates and epochs; all times are in seconds.

    Args:
        layout: images and micro-batches of an update.
        batches: micro-batches of an epoch.
        epochs, max_steps: the run ends after `epochs` epochs, or `max_steps` updates if that is
            earlier (0: no limit).
        timer: seconds since any fixed moment.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        batches: int,
        epochs: int,
        max_steps: int = 0,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.layout = layout
        self.epochs = epochs
        self.max_steps = max_steps
        self.updates_per_epoch = batches // layout.accumulation
        self.timer = timer
        self.run_started = timer()
        self.updates = 0  # since the start of the epoch
        self.between_epochs = 0.0  # from the last update of an epoch to the start of the next
        self.start_epoch()

    def start_epoch(self) -> None:
        """An epoch starts, or a resumed one goes on; times of updates count from here."""
        now = self.timer()
        if self.updates:
            self.between_epochs = now - self.latest
        self.epoch_started = now
        self.latest = now
        self.last = 0.0  # of the last update
        self.updates = 0
        self._marked = (now, 0)

    def update(self) -> None:
        """An update is done."""
        now = self.timer()
        self.last = now - self.latest
        self.latest = now
        self.updates += 1

    def since_start(self) -> float:
        """Time of the run so far."""
        return self.timer() - self.run_started

    @property
    def training(self) -> float:
        """Time of the epoch's updates so far."""
        return self.latest - self.epoch_started

    @property
    def mean(self) -> float:
        """Time of an update, on average over the epoch so far."""
        return self.training / max(self.updates, 1)

    def images_per_second(self) -> float:
        """Images of all processes, on average over the epoch so far."""
        return self._rate(self.updates, self.training)

    def recent_images_per_second(self) -> float:
        """The same since this was last asked for."""
        before, updates = self._marked
        self._marked = (self.latest, self.updates)
        return self._rate(self.updates - updates, self.latest - before)

    def _rate(self, updates: int, seconds: float) -> float:
        return updates * self.layout.images / seconds if seconds > 0 else 0.0

    def epoch_remaining(self, state: TrainState) -> float:
        """Time until the updates of the epoch are done."""
        ahead = self.updates_per_epoch - self._done(state)
        return self.mean * min(ahead, self._updates_ahead(state))

    def run_remaining(self, state: TrainState) -> float:
        """Time until the run ends. Validation and checkpoints take as long as after the last epoch;
        in the first epoch this is not known yet and counts as 0.
        """
        updates = self._updates_ahead(state)
        ends = -(-(self._done(state) + updates) // self.updates_per_epoch)  # rounded up
        return self.mean * updates + self.between_epochs * ends

    def _done(self, state: TrainState) -> int:
        """Updates of the epoch under way."""
        return state.batch // self.layout.accumulation

    def _updates_ahead(self, state: TrainState) -> int:
        """Updates until the end of the run."""
        ahead = (self.epochs - state.epoch) * self.updates_per_epoch - self._done(state)
        if self.max_steps:
            ahead = min(ahead, self.max_steps - state.update)
        return max(ahead, 0)


def clock(seconds: float) -> str:
    """H:MM:SS, after days if there are any."""
    return str(timedelta(seconds=int(seconds)))


def time_of_day(seconds: float) -> str:
    """The local date and time `seconds` from now, to the minute."""
    return f"{datetime.now() + timedelta(seconds=seconds):%Y-%m-%d %H:%M}"


def peak_memory(device: torch.device) -> float:
    """The most memory that tensors have taken on a CUDA device, in MiB."""
    return torch.cuda.max_memory_allocated(device) / MIB
