"""One training run per output folder: a lock file that outlives a killed run only for a while.

How a lock is taken over without a race: only who holds the claim on a lock, a file named after the
lock's content, may replace or remove that lock, and looks at the content again first. Claims are
locks themselves, so one whose owner was killed is taken over in the same way. Creating a file that
must not exist, linking and renaming are the only operations this rests on; they are atomic on local
file systems and on NFS from version 3 on.
"""

import errno
import hashlib
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from utils import RunError

LOGGER = logging.getLogger(__name__)
NAME = ".lock"
HEARTBEAT = 30.0  # seconds between two touches of the file
EXPIRES = 300.0  # seconds without a touch after which a lock whose process is out of sight expires
WATCH = 40.0  # seconds for which such a lock is watched first: clocks may jump, or differ
PATIENCE = 10.0  # seconds for which another process may take to take a lock over
WRITING = 2.0  # seconds until an empty file, whose owner may be writing it, has expired
LONGEST = 4096  # bytes of a lock's content
_MINE: set[str] = set()  # tokens of the locks that this process holds


class Taken(RunError):
    """The folder belongs to a run that goes on."""


@dataclass(frozen=True)
class Seen:
    """A lock as it was read: content, inode and time of the last touch."""

    content: bytes
    inode: int
    touched: int

    @property
    def owner(self) -> dict:
        """What the content says; {} where it is not that of a lock of this program."""
        try:
            owner = json.loads(self.content)
        except (ValueError, RecursionError):
            return {}
        fits = (
            isinstance(owner, dict)
            and isinstance(owner.get("host"), str)
            and type(owner.get("pid")) is int
            and 0 < owner["pid"] < 2**31
        )
        return owner if fits else {}


class FolderLock:
    """A context manager that owns `folder/.lock`, which says who the owner is: host, process, its
    start time, and the kernel and PID namespace in which that number means it.

    A lock whose process has ended is taken over by exactly one of those that want it. Where the
    system can be asked for the process, it is; otherwise (another machine or container) the lock
    has expired when its file was not touched for five minutes, by the clock of the file system, and
    is not while it is watched (the owner touches it every 30 s). A lock that is not this one is
    never touched or removed.
    Raises: RunError on entering where a running process owns the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / NAME
        self.token = uuid.uuid4().hex
        self.lost = False
        self._mine = json.dumps(here() | {"token": self.token}).encode()
        self._draft = self.path.with_name(f"{NAME}.{self.token[:12]}")
        self._done = threading.Event()
        self._turn = threading.Lock()  # of the heartbeat and the release

    def __enter__(self) -> "FolderLock":
        try:
            self._draft.write_bytes(self._mine)
            self._obtain(self.path)
            self._sweep()
        except OSError as error:
            raise RunError(
                f"output folder {self.path.parent} cannot be locked: {error.strerror or error}"
            ) from error
        finally:
            self._draft.unlink(missing_ok=True)
        _MINE.add(self.token)
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        _MINE.discard(self.token)
        try:
            with self._turn:
                self._release()
        except OSError:  # the folder is gone, or its disk: the lock expires
            return

    def check(self) -> None:
        """Raises RunError where another run has taken the folder over: two must not write there."""
        seen = look(self.path)
        if seen is not None and seen.content != self._mine:
            self.lost = True
        if self.lost:
            raise RunError(
                f"output folder {self.path.parent} was taken over by another run while this one"
                " could not be seen: this one ends, the other goes on"
            )

    def _obtain(self, path: Path) -> None:
        """Makes `path` this lock, whether it is free, expired or being taken over."""
        until = time.monotonic() + PATIENCE
        while True:
            if self._create(path):
                return
            seen = look(path)
            if seen is None:
                continue  # released just now
            if self._lives(path, seen):
                if path == self.path or time.monotonic() > until:
                    raise Taken(in_use(self.path, seen.owner))
                time.sleep(0.005)  # the holder of a claim needs a moment
                continue
            claim = path.with_name(f"{NAME}.over-{fingerprint(seen)}")
            self._obtain(claim)
            try:
                now = look(path)
                if now is not None and fingerprint(now) == fingerprint(seen):
                    self._replace(path)
                    return
            finally:
                claim.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Makes a file that is not there, with all of its content at once; False where it is."""
        try:
            os.link(self._draft, path)
            return True
        except FileExistsError:
            return self._is_draft(path)
        except OSError:  # a file system without links
            pass
        try:
            with open(path, "xb", buffering=0) as file:
                if file.write(self._mine) == len(self._mine):
                    return True
        except FileExistsError:
            return False
        except OSError:
            path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_draft(self, path: Path) -> bool:
        """Whether the link was made after all: NFS may answer a repeated request so."""
        try:
            return os.path.samefile(self._draft, path)
        except FileNotFoundError:
            return False

    def _replace(self, path: Path) -> None:
        mine = path.with_name(f"{self._draft.name}.new")
        try:
            mine.write_bytes(self._mine)
            os.replace(mine, path)
        finally:
            mine.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Removes drafts and claims that killed processes have left behind."""
        now = os.stat(self._draft).st_mtime
        for path in self.path.parent.glob(f"{NAME}.*"):
            try:
                if now - path.stat().st_mtime > 12 * EXPIRES:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue

    def _release(self) -> None:
        seen = look(self.path)
        if seen is None or seen.content != self._mine:
            return
        claim = self.path.with_name(f"{NAME}.over-{fingerprint(seen)}")
        self._draft.write_bytes(self._mine)
        try:
            if not self._create(claim):
                return  # it is being taken over
            seen = look(self.path)
            if seen is not None and seen.content == self._mine:
                self.path.unlink(missing_ok=True)
            claim.unlink(missing_ok=True)
        finally:
            self._draft.unlink(missing_ok=True)

    def _lives(self, path: Path, seen: Seen) -> bool:
        """Whether the owner of a lock still runs."""
        owner = seen.owner
        if owner and in_sight(owner):
            return runs(owner)
        os.utime(self._draft)
        age = (os.stat(self._draft).st_mtime_ns - seen.touched) / 1e9  # by one clock, the disk's
        if not seen.content.strip(b"\0 \n"):  # of a process that was killed while it wrote it
            return 0 <= age < WRITING
        if path != self.path:
            return age < EXPIRES
        if 0 <= age < EXPIRES:
            return True
        LOGGER.warning("%s seems to have expired: it is watched for %.0f s", path, WATCH)
        until = time.monotonic() + WATCH
        while time.monotonic() < until:
            time.sleep(min(1.0, WATCH / 4))
            now = look(path)
            if now != seen:
                return now is not None
        return False

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            try:
                with self._turn:
                    if not self._done.is_set():
                        self._touch()
            except (OSError, RunError):  # the disk may come back
                continue

    def _touch(self) -> None:
        seen = look(self.path)
        if seen is None:  # deleted although this run goes on
            self._draft.write_bytes(self._mine)
            self._create(self.path)
            self._draft.unlink(missing_ok=True)
        elif seen.content == self._mine:
            os.utime(self.path)
        else:
            self.lost = True


def look(path: Path) -> Seen | None:
    """A lock as it is now; None where there is none. Raises: RunError where it is no regular
    file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        if os.path.islink(path):
            raise RunError(f"{path} is a broken link, not a lock: delete it") from None
        return None
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise RunError(f"{path} is no regular file, so no lock: delete it")
        return Seen(os.read(handle, LONGEST), about.st_ino, about.st_mtime_ns)
    finally:
        os.close(handle)


def fingerprint(seen: Seen) -> str:
    """Tells one lock from every other one."""
    return hashlib.sha256(seen.content + str(seen.inode).encode()).hexdigest()[:16]


def in_use(path: Path, owner: dict) -> str:
    """What a user is told of a living lock."""
    who = f"process {owner['pid']} on {owner['host']}" if owner else "a process unknown here"
    return (
        f"output folder {path.parent} is in use by {who}: wait for that run, choose another"
        f" --output or --tag, or, if that run has certainly ended, delete {path}"
    )


def here() -> dict:
    """What identifies this process, and where its number means it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "boot": _boot(),
        "space": _space(),
    }


def in_sight(owner: dict) -> bool:
    """Whether the system here can be asked for the process: the same machine since its start, and
    the same numbering of processes. Locks of earlier versions say the machine alone.
    """
    return owner["host"] == socket.gethostname() and all(
        owner.get(name) in (None, value) for name, value in (("boot", _boot()), ("space", _space()))
    )


def runs(owner: dict) -> bool:
    """Whether a process of this system that wrote a lock still runs."""
    pid = owner["pid"]
    if pid == os.getpid():
        return owner.get("token") in _MINE
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


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _space() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
