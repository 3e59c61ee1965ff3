"""The other processes of a run: waiting for them while they live, and saying so where one does not
answer.
"""

import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from registry import UserError

LOGGER = logging.getLogger(__name__)
BEAT = 5.0  # seconds between two signs of life, at most
PATIENCE = 300.0  # seconds of waiting, at most, after which all stacks are logged
POLL = 0.25  # seconds between two looks at the store while waiting, at most
GLOO = "gloo|pair closure|(closed|reset) by peer|broken pipe"  # in its errors, which have no type
REPEAT = "the same command, started again, goes on from the last checkpoint"


class PeerError(UserError, RuntimeError):
    """Another process does not answer, or has ended. The message is one line."""


class Peers:
    """The processes that share a store. A thread of each gives a sign of life every few seconds,
    also while its main thread is busy for long.

    Args:
        store: used by the thread alone from here on.
        timeout: seconds without a sign of life after which a process counts as lost.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.interval = min(BEAT, timeout / 5)
        self.patience = min(PATIENCE, timeout / 2)
        self._wake = threading.Condition()
        self._asked = 0  # meetings that this process has come to
        self._arrived = 0  # those of them that the store knows of
        self._opened = 0  # those to which all have come
        self._what: tuple[str, float] | None = None  # what is waited for, and since when
        self._shown = 0  # requests for stacks that have been followed
        self._told = False  # that this wait is long
        self._beats = 0
        self._signs: dict[int, tuple[bytes, float]] = {}  # the last sign of life of each, and when
        self._answered = time.monotonic()  # the store
        self._ended = ""  # what a process said that ends with an error
        self._lost = ""  # why the store cannot be used any more
        self._ask_for_stacks = False
        self._look_now = False
        self._last_words = ""
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="peers", daemon=True)
        self._thread.start()

    def meet(self, what: str) -> None:
        """Waits until every process is here, however long that takes, while all of them live.

        Raises: PeerError once one gives no sign of life for `timeout` seconds, or has ended.
        """
        with self.waiting(what):
            self._asked += 1
            with self._wake:
                self._wake.notify_all()
                while self._opened < self._asked:
                    self._wake.wait(1.0)
                    self._refuse_lost(what)

    def _refuse_lost(self, what: str) -> None:
        if self._ended:
            raise PeerError(self._ended)
        if self._lost:
            raise PeerError(f"the store of the processes is lost ({self._lost}) at: {what}")
        found = self.find_lost(self.timeout)
        if found:
            raise PeerError(f"{found}, at: {what}; {REPEAT}")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While this is open the process counts as waiting for others; after long all stacks of all
        processes are logged.
        """
        before = self._what
        self._what = before or (what, time.monotonic())
        try:
            yield
        finally:
            self._what = before
            self._told = self._told and before is not None

    def find_lost(self, seconds: float) -> str:
        """Which processes have given no sign of life for so long, as far as this one has watched,
        in words; "" for none.
        """
        now = time.monotonic()
        unanswered = now - self._answered
        if unanswered > seconds:
            return (
                "the store of the processes, kept by process 0 or its launcher, has not answered"
                f" for {unanswered:.0f} s: it was stopped, has ended or cannot be reached"
            )
        ages = {rank: now - when for rank, (_, when) in list(self._signs.items())}
        silent = {rank: age for rank, age in ages.items() if age > seconds}
        if not silent:
            return ""
        names = ", ".join(map(str, sorted(silent)))
        return (
            f"process {names} of {self.size} has given no sign of life for"
            f" {max(silent.values()):.0f} s: it was stopped, has ended or cannot be reached"
        )

    def explain(self, error: BaseException) -> PeerError | None:
        """What a failed collective means, in a line; None for any other error."""
        text = " ".join(str(error).split())
        plain = type(error) is RuntimeError and re.search(GLOO, text, re.IGNORECASE)
        if not isinstance(error, dist.DistError) and not plain:
            return None
        if not re.search("timed? ?out", text, re.IGNORECASE):
            self._look_for(0.2)
            return PeerError(
                self._ended
                or f"the connection to another process is lost ({text[-80:]}): it has ended, see"
                f" its own message, or cannot be reached; {REPEAT}"
            )
        self._ask_for_stacks = True
        self._look_for(3 * self.interval + 1)
        if self._ended:
            return PeerError(self._ended)
        reason = self.find_lost(1.5 * self.interval) or (
            "all of them live, so that one is busy or stuck: see the stacks in the logs"
        )
        return PeerError(
            f"another process did not come to an exchange within {self.timeout:g} s"
            f" (TRAIN.GROUP_TIMEOUT): {reason}; {REPEAT}"
        )

    def _look_for(self, seconds: float) -> None:
        """Gives the thread so long to look at the others."""
        deadline = time.monotonic() + seconds
        with self.waiting("signs of life"), self._wake:
            self._look_now = True
            self._wake.notify_all()
            while time.monotonic() < deadline and not self._lost:
                self._wake.wait(deadline - time.monotonic())

    def end(self, error: BaseException | None = None) -> None:
        """The thread ends; the others are told of the error, if there is one."""
        with self._wake:
            if error is not None:
                reason = " ".join(str(error).split())[:500] or type(error).__name__
                self._last_words = f"process {self.rank} has ended: {reason}"
            self._closed = True
            self._wake.notify_all()
        self._thread.join(2.0)

    # ---- the thread

    def _serve(self) -> None:
        beaten = float("-inf")
        pause = 0.0
        try:
            while not self._closed:
                if self._look_now or time.monotonic() - beaten >= self.interval:
                    self._look_now = False
                    beaten = time.monotonic()
                    self._beat()
                pause = min(POLL, 1.5 * pause + 0.001)
                if self._opened == self._asked or self._progress():
                    pause = 0.0
                with self._wake:
                    if not (self._closed or self._look_now) and self._arrived == self._asked:
                        self._wake.wait(min(pause or self.interval, self.interval))
            if self._last_words:
                self.store.set("ended", self._last_words)
        except RuntimeError as error:
            with self._wake:
                self._lost = " ".join(str(error).split())[:80]
                self._wake.notify_all()

    def _beat(self) -> None:
        self._beats += 1
        self.store.set(f"alive/{self.rank}", str(self._beats))
        if self._what is None:
            self._signs.clear()
        else:
            self._look(*self._what)
        if self.store.check(["stacks"]) and self.store.add("stacks", 0) > self._shown:
            self._shown = self.store.add("stacks", 0)
            LOGGER.warning("process %d, all stacks:\n%s", self.rank, stacks())
        self._answered = time.monotonic()

    def _look(self, what: str, since: float) -> None:
        """Reads the others' signs of life, and asks for stacks where the wait is long."""
        now = time.monotonic()
        for rank in [rank for rank in range(self.size) if rank != self.rank]:
            key = f"alive/{rank}"
            sign = self.store.get(key) if self.store.check([key]) else b""
            if self._signs.get(rank, (None, now))[0] != sign:
                self._signs[rank] = (sign, now)
        if self.store.check(["ended"]):
            self._ended = self.store.get("ended").decode(errors="replace")
        if now - since > self.patience and not self._told:
            self._told = True
            self._ask_for_stacks = True
            LOGGER.warning(
                "process %d has waited for the others for %.0f s, at: %s; all stacks follow",
                self.rank,
                now - since,
                what,
            )
        if self._ask_for_stacks:
            self._ask_for_stacks = False
            self.store.add("stacks", 1)

    def _progress(self) -> bool:
        """Brings this process to the meeting it waits for; whether all have come."""
        number = self._asked
        if self._arrived < number:
            self._arrived = number
            if self.store.add(f"meeting/{number}", 1) == self.size:
                self.store.set(f"open/{number}", "1")
                if number > 1:  # all have left the one before
                    self.store.delete_key(f"meeting/{number - 1}")
                    self.store.delete_key(f"open/{number - 1}")
        if not self.store.check([f"open/{number}"]):
            return False
        with self._wake:
            self._opened = number
            self._answered = time.monotonic()
            self._wake.notify_all()
        return True


def stacks() -> str:
    """What every thread of this process is at."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [f"pid {os.getpid()}"]
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}:")
        parts.append("".join(traceback.format_stack(frame)).rstrip())
    return "\n".join(parts)
