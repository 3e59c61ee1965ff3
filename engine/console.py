"""Standard output and error that may vanish: a closed pipe, a lost terminal or a full disk never
ends a run.
"""

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from utils import RunError

LOGGER = logging.getLogger(__name__)


class LastingStream:
    """A text stream whose failures are told once, in the log, and otherwise ignored.

    error: the last failure of a write; None: there was none. stream: None where the process was
    started without it.
    """

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self.stream = stream
        self.name = name
        self.error: Exception | None = None
        self.quiet = False  # a failure is told by others

    def write(self, text: str) -> int:
        """Writes what the stream takes; characters that its encoding lacks are escaped."""
        if self.stream is None:
            return len(text)
        try:
            try:
                return self.stream.write(text)
            except UnicodeEncodeError as error:
                raw = text.encode(error.encoding, "backslashreplace")
                return self.stream.write(raw.decode(error.encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """Hands on what has been written."""
        if self.stream is None:
            return
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def isatty(self) -> bool:
        """Whether a person may be watching."""
        try:
            return self.stream is not None and self.error is None and self.stream.isatty()
        except ValueError:
            return False

    def _failed(self, error: Exception) -> None:
        told = self.quiet or self.error is not None
        self.error = error
        if not told:
            LOGGER.warning("%s is gone, the run goes on: %s", self.name, error)

    def finish(self) -> None:
        """Makes sure that the interpreter's own flush at its end cannot fail."""
        self.flush()
        if self.stream is None or self.error is None:
            return
        try:
            number = self.stream.fileno()
        except (AttributeError, OSError, ValueError):
            return
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, number)
        os.close(nothing)
        self.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Standard output and error are `LastingStream`s inside."""
    for number in (0, 1, 2):  # a file of the run must not take the place of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    output, errors = (
        LastingStream(before[0], "standard output"),
        LastingStream(before[1], "standard error"),
    )
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        output.finish()
        errors.finish()


def print_all(text: str) -> None:
    """Text on standard output, whole. Raises: RunError where it cannot be; a reader that has seen
    enough (`| head`) is no error.
    """
    sys.stdout.quiet = True
    print(text, end="", flush=True)
    error = getattr(sys.stdout, "error", None)
    if error is not None and getattr(error, "errno", None) not in (errno.EPIPE, errno.ESHUTDOWN):
        raise RunError(f"standard output cannot be written: {error}")
