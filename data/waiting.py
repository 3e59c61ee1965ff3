"""Waiting for batches: told when it is long, bounded, and disturbed by nothing else.

A batch comes from loading processes (`FromWorkers`) or from a thread of this process
(`FromThread`); either is asked with a limit, so that the main thread waits in Python, where
signals are heard, and never inside a read of a storage that does not answer.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data._utils.signal_handling import _remove_worker_pids

from data.errors import DataError
from data.randomness import restore_rng, rng_states

logger = logging.getLogger(__name__)
STALL = 300.0  # seconds after which a wait is told, with the stacks of all threads
SLICE = 5.0  # seconds between two looks at the clock while waiting
# Meant for the main process, which ends its loading processes itself after the last update.
_NOT_FOR_WORKERS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
_STACKS = getattr(signal, "SIGUSR2", None)  # asks a loading process for the stacks of its threads


class NotYet(Exception):
    """No batch within the time that was given; ask again."""


class FromWorkers:
    """torch's iterator over loading processes. It must have been built with a timeout."""

    def __init__(self, iterator: Iterator):
        self.iterator = iterator

    def get(self) -> Any:
        """The next batch, None at the end. Raises: NotYet; whatever a dead process leads to."""
        try:
            with reports_wanted():
                return next(self.iterator, None)
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
        thread = getattr(self.iterator, "_pin_memory_thread", None)
        if thread is not None and not thread.is_alive():
            raise RuntimeError("DataLoader worker or its pin memory thread exited unexpectedly")
        raise NotYet

    def close(self) -> None:
        """The processes stay for the next epoch."""


class FromMemory:
    """An iterator that never stalls, advanced where it is asked."""

    def __init__(self, iterator: Iterator):
        self.iterator = iterator

    def get(self) -> Any:
        """The next item, None at the end."""
        return next(self.iterator, None)

    def close(self) -> None:
        """Nothing runs."""


class FromThread:
    """An iterator that a thread advances, one item at a time. Nothing runs between two calls.

    The thread seeds the global generators for each sample and puts them back itself; they are left
    alone while it is waited for.
    """

    def __init__(self, iterator: Iterator, wait: float):
        self._wait = wait
        self._asked, self._answers = queue.SimpleQueue(), queue.SimpleQueue()
        self._pending = False
        self._before: tuple = ()
        arguments = (iterator, self._asked, self._answers)
        self._thread = threading.Thread(target=_advance, args=arguments, name="images", daemon=True)

    def get(self) -> Any:
        """The next item, None at the end. Raises: NotYet; what the iterator raises."""
        if not self._pending:
            if self._thread.ident is None:
                self._thread.start()
            self._before = rng_states()
            self._asked.put(True)
            self._pending = True
        try:
            item, error = self._answers.get(timeout=self._wait)
        except queue.Empty:
            raise NotYet from None
        self._pending = False
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Lets the thread end. One that does not come back leaves the generators as they were."""
        if self._pending:
            restore_rng(self._before)
        self._asked.put(False)


def _advance(iterator: Iterator, asked: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    while asked.get():
        try:
            answers.put((next(iterator, None), None))
        except BaseException as error:
            answers.put((None, error))


class Patience:
    """How long one batch may take.

    Args:
        limit: seconds, 0 for ever.
        begun: when the wait began, by time.monotonic().
        reading: what is being read, in words.
        processes: the loading processes.
    """

    def __init__(self, limit: float, begun: float, reading: Callable[[], str], processes: list):
        self.limit = limit
        self.begun = begun
        self.reading = reading
        self.processes = processes
        self.told = False

    def check(self) -> None:
        """Told once after STALL seconds. Raises: DataError after the limit."""
        waited = time.monotonic() - self.begun
        if 0 < self.limit <= waited:
            raise DataError(
                f"no batch arrived within DATA.TIMEOUT seconds{self.reading()} ({self.limit:g} s);"
                " check the storage, or raise DATA.TIMEOUT (0 waits for ever)"
            )
        if waited >= STALL and not self.told:
            self.told = True
            tell_stall(waited, self.limit, self.reading(), self.processes)


def tell_stall(waited: float, limit: float, reading: str, processes: list) -> None:
    """Logs what every thread of this process does; the loading processes print theirs."""
    end = f"given up after {limit:.0f} s (DATA.TIMEOUT)" if limit else "waiting on"
    logger.warning(
        "no batch for %.0f s%s; %s. Threads of this process%s:\n%s",
        waited,
        reading,
        end,
        " (loading processes write theirs to stderr)" if processes and _STACKS else "",
        stacks(),
    )
    for process in processes:
        if _STACKS and process.is_alive():
            os.kill(process.pid, _STACKS)


def stacks() -> str:
    """Where each thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in sys._current_frames().items()
    )


def prepare_worker(_: int) -> None:
    """In a loading process: the stacks of its threads can be asked for."""
    if _STACKS is None:
        return
    try:
        faulthandler.register(_STACKS, file=sys.__stderr__, all_threads=True)
    except (AttributeError, OSError, RuntimeError, ValueError):  # stderr is closed
        signal.signal(_STACKS, signal.SIG_IGN)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Processes started inside never see the signals that stop a run: they must live until the last
    update is done. The main process hears of a signal that comes meanwhile afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    numbers = {getattr(signal, name) for name in _NOT_FOR_WORKERS if hasattr(signal, name)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _defer_reports()


# ---- reports of dead loading processes


class _DeferredReport:
    """torch's handler of SIGCHLD, which raises wherever the program happens to be, such as inside
    an update; here it does so only while a batch is waited for.
    """

    def __init__(self, report: Callable[[int, Any], None]):
        self.report = report
        self.wanted = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.wanted:
            self.report(number, frame)


def _defer_reports() -> None:
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "").endswith("signal_handling"):  # torch's
        signal.signal(signal.SIGCHLD, _DeferredReport(handler))


@contextmanager
def reports_wanted() -> Iterator[None]:
    """Inside, a loading process that dies, or has died, is an error."""
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if not isinstance(handler, _DeferredReport):
        yield
        return
    handler.wanted = True
    try:
        handler.report(signal.SIGCHLD, None)
        yield
    finally:
        handler.wanted = False


def end_processes(iterator: Any, owner: int) -> None:
    """Ends the loading processes of torch's iterator at once, without the exchange of messages by
    which it does that itself: they are joined there for seconds each, and a dead one may have left
    a lock taken. owner: the process they belong to; a copy in another one leaves them alone.
    """
    if os.getpid() != owner or not hasattr(iterator, "_workers"):
        return
    for process in iterator._workers:
        process.kill()
    iterator._shutdown = True  # its own way of ending does nothing from here on
    _remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    pinning = getattr(iterator, "_pin_memory_thread", None)
    if pinning is not None:
        iterator._pin_memory_thread_done_event.set()
        iterator._worker_result_queue.put((None, None))
        pinning.join(timeout=1)
    idle = pinning is None or not pinning.is_alive()
    for pipe in (*iterator._index_queues, iterator._worker_result_queue):
        pipe.cancel_join_thread()
        if idle:
            pipe.close()
