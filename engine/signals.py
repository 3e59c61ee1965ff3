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


def exit_status(number: int) -> int:
    """What a shell expects of a process that this signal ended; 0 for no signal."""
    return 128 + number if number else 0


class StopSignal:
    """Records SIGTERM (a scheduler ends the job) and SIGINT (Ctrl-C); a second Ctrl-C of a run of
    one process interrupts at once.

    In a group the signal is exchanged beside the training: each call of `poll` starts an exchange
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
            self._before = {number: signal.signal(number, self._record) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received and self.world.size == 1:
            raise KeyboardInterrupt
        self.received = self.received or number

    def poll(self) -> int:
        """The number of the signal that any process had received by the previous call (alone: by
        now); 0: go on.
        """
        if self.world.control is None:
            return self.received
        result = self._wait()
        number = torch.tensor([self.received])
        work = dist.all_reduce(
            number,
            dist.ReduceOp.MAX,
            group=self.world.control,
            async_op=True,
        )
        self._pending = (work, number)
        return result

    def _wait(self) -> int:
        if self._pending is None:
            return 0
        work, number = self._pending
        self._pending = None
        work.wait()
        return int(number)

    def agree(self) -> int:
        """Like `poll`, but waits: the signals received by now count, and no exchange stays
        pending.
        """
        earlier = self._wait()
        now = self.poll()
        if self.world.control is not None:
            now = self._wait()
        return earlier or now


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
