"""Stopping on a signal so that all processes end after the same update."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from utils import World

Item = TypeVar("Item")
# Schedulers announce the end of a job with one of these, a lost terminal with SIGHUP.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
STOPPING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Stopped(BaseException):
    """A stopping signal has come where nothing has to be finished first. number: which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_status(number: int) -> int:
    """What a shell expects of a process that this signal ended; 0 for no signal."""
    return 128 + number if number else 0


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """The stopping signals call `handler` inside, in the main thread. Those that were ignored when
    the process began, as SIGHUP under nohup, stay ignored.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def stopped_at_once() -> contextmanager:
    """Inside, a stopping signal raises `Stopped` wherever the program is: nothing has to be saved
    in an evaluation, or before a training has begun.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    return handled_by(stop)


class StopSignal:
    """Records the stopping signals while a training runs; a second Ctrl-C of a run of one process
    interrupts at once.

    In a group the signal is exchanged beside the training: each call of `poll` starts an exchange
    over the CPU group and returns the result of the one before, so nothing waits and all processes
    learn of the stop after the same update.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.received = 0
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._waiting = False  # for an item that may be given up
        self._handlers = handled_by(self._record)

    def __enter__(self) -> "StopSignal":
        self._handlers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.__exit__(None, None, None)

    def _record(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received and self.world.size == 1:
            raise KeyboardInterrupt
        self.received = self.received or number
        if self._waiting:
            raise Stopped(number)

    def until_stopped(self, items: Iterable[Item], together: bool = False) -> Iterator[Item]:
        """The items until a signal comes, which also ends the wait for the next one: data may be
        long in coming.

        together: all processes of a group must take as many items; in a group a signal then waits
        for the next `poll`.
        """
        if together and self.world.control is not None:
            yield from items
            return
        iterator = iter(items)
        while True:
            try:
                self._waiting = True
                if self.received:
                    return
                item = next(iterator)
            except (StopIteration, Stopped):
                return
            finally:
                self._waiting = False
            yield item

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
        with self.world.waiting("the exchange of signals"):
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
