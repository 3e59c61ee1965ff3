"""One training run per output folder: a lock file that a killed run does not leave closed for
ever.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path

from utils import RunError

NAME = ".lock"
BEAT = 30.0  # seconds between two signs of life
EXPIRES = 300.0  # seconds without one after which a lock of another machine counts as abandoned


class FolderLock:
    """Holds `folder/.lock` (host, process, its start time) from `with` to the end of the block.

    A lock whose process is gone is taken over: on the same machine by asking the system for the
    process, on another one when its file has not been touched for five minutes (the holder touches
    it every 30 s).
    Raises: RunError on entering where a living run holds the folder.
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
        while not self._done.wait(BEAT):
            if self.path.exists():
                os.utime(self.path)

    def _remove_if_stale(self) -> None:
        try:
            age = time.time() - self.path.stat().st_mtime
            holder = json.loads(self.path.read_text() or "{}")
        except FileNotFoundError:
            return  # released just now
        except ValueError:
            holder = {}
        if _alive(holder, age):
            raise RunError(
                f"output folder {self.path.parent} is in use by process {holder.get('pid', '?')} on"
                f" {holder.get('host', '?')}: wait for that run, choose another --output or --tag,"
                f" or, if it is surely gone, delete {self.path}"
            )
        self.path.unlink(missing_ok=True)


def _alive(holder: dict, age: float) -> bool:
    """Whether the process that wrote this lock still runs; `age` in seconds since its last sign of
    life.
    """
    if holder.get("host") != socket.gethostname():
        return age < (
            EXPIRES if holder else 2.0
        )  # an empty file: written this moment, or its writer was killed in between
    pid = holder["pid"]
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return holder.get("started") == _start_time(pid)


def _start_time(pid: int) -> str | None:
    """When a process began, in the system's ticks: tells it from a later one of the same number.
    None: unknown here, or dead.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
