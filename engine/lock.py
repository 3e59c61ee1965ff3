"""One training run per output folder: a lock file that outlives a killed run only for a while."""

import json
import os
import socket
import threading
import time
from pathlib import Path

from utils import RunError

NAME = ".lock"
HEARTBEAT = 30.0  # seconds between two touches of the file
EXPIRES = 300.0  # seconds without a touch after which a lock of another machine has expired
WRITING = 2.0  # seconds until an empty file, whose owner may be writing it, has expired


class FolderLock:
    """A context manager that owns `folder/.lock` (host, process, its start time).

    A lock whose process has ended is replaced: on the same machine the system is asked for the
    process, on another one the lock has expired when its file has not been touched for five minutes
    (the owner touches it every 30 s).
    Raises: RunError on entering where a running process owns the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / NAME
        self._done = threading.Event()

    def __enter__(self) -> "FolderLock":
        mine = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid())}
        )
        while True:
            try:
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(mine)
                break
            except FileExistsError:
                self._remove_if_stale()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            if self.path.exists():
                os.utime(self.path)

    def _remove_if_stale(self) -> None:
        try:
            age = time.time() - self.path.stat().st_mtime
            owner = json.loads(self.path.read_text() or "{}")
        except FileNotFoundError:
            return  # released just now
        except ValueError:
            owner = {}
        if _alive(owner, age):
            raise RunError(
                f"output folder {self.path.parent} is in use by process {owner.get('pid', '?')} on"
                f" {owner.get('host', '?')}: wait for that run, choose another --output or --tag,"
                f" or, if that run has certainly ended, delete {self.path}"
            )
        self.path.unlink(missing_ok=True)


def _alive(owner: dict, age: float) -> bool:
    """Whether the process that wrote this lock still runs; age: seconds since its last touch."""
    if not owner:
        return age < WRITING
    if owner.get("host") != socket.gethostname():
        return age < EXPIRES
    pid = owner["pid"]
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return owner.get("started") == _start_time(pid)


def _start_time(pid: int) -> str | None:
    """When a process began, in the system's ticks: tells it from a later one of the same number.
    None: unknown here, or dead.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
