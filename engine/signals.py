"""Stopping on a signal so that all processes end after the same update."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from utils import World

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Notes SIGTERM (a scheduler takes the machine away) and SIGINT (Ctrl-C); a second Ctrl-C of a
    lone process interrupts at once.

    In a group the note is exchanged beside the training: each call of `agreed` starts an exchange
    over the CPU group and returns the result of the one before, so nothing waits and all processes
    learn of the stop after the same update.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.received = 0
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received and self.world.size == 1:
            raise KeyboardInterrupt
        self.received = self.received or number

    def agreed(self) -> int:
        """The number of the signal that any process had received by the previous call (alone: by
        now); 0: go on.
        """
        if self.world.control is None:
            return self.received
        result = self._take()
        note = torch.tensor([self.received])
        self._pending = (
            dist.all_reduce(note, dist.ReduceOp.MAX, group=self.world.control, async_op=True),
            note,
        )
        return result

    def _take(self) -> int:
        if self._pending is None:
            return 0
        work, note = self._pending
        self._pending = None
        work.wait()
        return int(note)

    def settle(self) -> int:
        """Like `agreed`, but waits, so that the answer holds for now and no exchange is left under
        way.
        """
        before = self._take()
        self.agreed()
        return before or (self._take() if self.world.control is not None else self.received)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started inside never see the stopping signals: data workers must live until the
    last update is done.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
