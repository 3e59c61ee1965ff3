"""The one exception of this package that a user is meant to read, and the text of its commonest
forms.
"""

from __future__ import annotations

import os
from multiprocessing.connection import wait
from pathlib import Path

from registry import UserError

_SHOWN = 6


class DataError(UserError, RuntimeError):
    """Missing, wrong or unreadable data. The message is one line: what was given, what is expected,
    how to fix it.
    """


def printable(name: str | os.PathLike) -> str:
    """A file's name as one line of valid text: bytes that are not UTF-8 and control characters are
    written as escapes, such as \\xff.
    """
    text = os.fspath(name)
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return ascii(character)[1:-1]


def describe(path: str | os.PathLike) -> str:
    """What lies at `path`, in a few words: 'no such folder', 'an empty folder' or its first entries
    (folders end in '/').
    """
    path = Path(path)
    if not path.exists():
        return "no such folder"
    if not path.is_dir():
        return "a file"
    with os.scandir(path) as entries:
        names = sorted(printable(entry.name) + ("/" if entry.is_dir() else "") for entry in entries)
    if not names:
        return "an empty folder"
    more = f", ... ({len(names)} entries)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def layout_error(
    dataset: str,
    root: str | os.PathLike,
    expected: str,
    looked: str | os.PathLike | None = None,
    hint: str = "",
) -> DataError:
    """The error of a wrong layout. `looked` is the place whose content is shown (default:
    `root`).
    """
    looked = root if looked is None else looked
    place = "" if looked == root else f" in '{looked}'"
    end = f"; {hint}" if hint else ""
    return DataError(
        f"DATA.DATASET {dataset}: DATA.DATA_PATH '{root}' must hold {expected}; found{place}:"
        f" {describe(looked)}{end}"
    )


def worker_failure(error: Exception, reading: str = "", processes: list = ()) -> DataError | None:
    """A DataError for what a dead or silent loading process leads to; None if `error` is something
    else: torch's own report, or an exchange of messages that breaks off.
    """
    text = str(error)
    if "DataLoader timed out" in text:
        return DataError(
            f"no batch arrived within DATA.TIMEOUT seconds{reading}; check the storage, or raise"
            " DATA.TIMEOUT (0 waits for ever)"
        )
    reported = "DataLoader worker" in text and (
        "killed by signal" in text or "exited unexpectedly" in text
    )
    if reported and ("shared memory" in text or "Bus error" in text):
        return DataError(
            "a data worker died for lack of shared memory; enlarge /dev/shm (docker:"
            " --shm-size) or set DATA.NUM_WORKERS 0"
        )
    how = text.splitlines()[0].rstrip(". ") if reported else _death(error, processes)
    if not how:
        return None
    return DataError(
        f"a data worker died ({how}){reading}; often the machine ran out of memory: lower"
        " DATA.NUM_WORKERS or DATA.BATCH_SIZE, or set DATA.CACHE_MODE no"
    )


def _death(error: Exception, processes: list) -> str:
    """How a loading process ended, if one did: its messages break off a moment earlier."""
    if isinstance(error, UserError) or not processes:
        return ""
    patience = 1 if isinstance(error, (OSError, EOFError)) else 0
    ended = wait([process.sentinel for process in processes], timeout=patience)
    for process in processes:
        if process.sentinel in ended:
            process.join(timeout=1)
    dead = [process for process in processes if process.exitcode]
    return f"pid {dead[0].pid}, exit status {dead[0].exitcode}" if dead else ""
