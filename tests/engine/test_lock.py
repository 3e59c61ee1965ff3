"""Two runs never write into one folder, and a run that died does not keep the next one out."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from engine import lock
from engine.lock import FolderLock, Seen, _start_time, fingerprint, here, look
from engine.state import CheckpointFolder
from tests.checkpoint.states import training_state
from utils import RunError

DEAD = {"pid": 1, "started": "0"}  # the first process of a system began at another time


def write_lock(folder, name: str = ".lock", **owner) -> None:
    (folder / name).write_text(json.dumps({"host": socket.gethostname(), "started": None} | owner))


def aged(path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def refused(folder) -> str:
    """What a run is told that finds the folder taken."""
    before = (folder / ".lock").read_bytes()
    with pytest.raises(RunError) as caught, FolderLock(folder):
        pass
    assert (folder / ".lock").read_bytes() == before and len(list(folder.iterdir())) == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def taken(folder) -> None:
    """A run can have the folder, and leaves nothing there."""
    with FolderLock(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert list(folder.iterdir()) == []


@pytest.fixture
def quick(monkeypatch):
    """Time runs a thousand times as fast for the lock."""
    monkeypatch.setattr(lock, "WATCH", 0.04)


def test_the_lock_is_there_inside_the_block_only(tmp_path):
    with FolderLock(tmp_path):
        owner = json.loads((tmp_path / ".lock").read_text())
        assert owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_is_refused_by_name_and_keeps_its_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        write_lock(tmp_path, pid=other.pid, started=_start_time(other.pid))
        said = refused(tmp_path)
        assert f"in use by process {other.pid} on {socket.gethostname()}" in said
        assert "--output" in said
        other.stdin.close()


def test_a_second_run_of_this_very_process_is_refused_too(tmp_path):
    with FolderLock(tmp_path):
        assert f"process {os.getpid()}" in refused(tmp_path)
    taken(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over_even_before_it_is_reaped(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lock(tmp_path, pid=other.pid, started=_start_time(other.pid))
    other.kill()
    for _ in range(100):
        if _start_time(other.pid) is None:
            break
        time.sleep(0.05)
    for _ in ("a zombie", "reaped"):
        taken(tmp_path)
        write_lock(tmp_path, pid=other.pid, started="1")
        other.wait()
    other.stdin.close()


def test_a_later_process_with_the_same_number_does_not_count(tmp_path):
    write_lock(tmp_path, pid=os.getppid(), started="0")
    taken(tmp_path)
    # a container started again: the same number, another process
    write_lock(tmp_path, pid=os.getpid(), started="0")
    taken(tmp_path)


OUT_OF_SIGHT = {
    "another machine": {"host": "elsewhere"},
    "a container of the same name": {"space": "pid:[1]"},
    "a machine of the same name, or before a restart": {"boot": "another"},
}


@pytest.mark.parametrize("place", OUT_OF_SIGHT.values(), ids=OUT_OF_SIGHT)
def test_a_lock_out_of_sight_holds_until_it_expires(tmp_path, quick, place):
    write_lock(tmp_path, **(here() | DEAD | place))
    assert f"on {place.get('host', socket.gethostname())}" in refused(tmp_path)
    aged(tmp_path / ".lock", lock.EXPIRES + 1)
    taken(tmp_path)


@pytest.mark.parametrize("age", [lock.EXPIRES + 1, -86400], ids=["forward", "backward"])
def test_a_clock_that_jumps_does_not_end_a_lock_that_is_touched(tmp_path, monkeypatch, age):
    write_lock(tmp_path, host="elsewhere", pid=1)
    aged(tmp_path / ".lock", age)
    monkeypatch.setattr(lock, "WATCH", 5.0)
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 2:  # the owner's heartbeat
            aged(tmp_path / ".lock", age - 1)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    assert "elsewhere" in refused(tmp_path) and len(naps) == 2


def test_one_that_is_released_while_it_is_watched_is_free(tmp_path, monkeypatch):
    write_lock(tmp_path, host="elsewhere", pid=1)
    aged(tmp_path / ".lock", 400)
    monkeypatch.setattr(lock.time, "sleep", lambda _: (tmp_path / ".lock").unlink())
    taken(tmp_path)


def test_the_heartbeat_touches_its_own_lock_alone_and_puts_it_back(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 3600)
    with FolderLock(tmp_path) as mine:
        aged(tmp_path / ".lock", 1000)
        mine._touch()
        assert time.time() - (tmp_path / ".lock").stat().st_mtime < 100
        (tmp_path / ".lock").unlink()
        mine._touch()
        assert json.loads((tmp_path / ".lock").read_text())["token"] == mine.token
        mine.check()
        write_lock(tmp_path, host="elsewhere", pid=1)
        with pytest.raises(RunError, match="was taken over by another run"):
            mine.check()  # before the next heartbeat
        mine.lost = False
        aged(tmp_path / ".lock", 1000)
        mine._touch()
        assert mine.lost and time.time() - (tmp_path / ".lock").stat().st_mtime > 900
        with pytest.raises(RunError, match="was taken over by another run"):
            CheckpointFolder(tmp_path, check=mine.check).save(training_state())
    # it is another run's, and stays
    assert "elsewhere" in (tmp_path / ".lock").read_text() and len(list(tmp_path.iterdir())) == 1


ODD = {
    "empty": b"",
    "zeros, after a power cut": b"\0" * 100,
    "text": b"locked by hand",
    "another program's": b'{"owner": "x"}',
    "a list": b"[1, 2]",
    "half of one": b'{"host": "elsewhere", "pid',
    "no number": b'{"host": "elsewhere", "pid": "12"}',
    "all processes": b'{"host": "elsewhere", "pid": -1}',
    "a group": b'{"host": "elsewhere", "pid": 0}',
    "too large": b'{"host": "elsewhere", "pid": %d}' % 10**30,
    "a truth": b'{"host": "elsewhere", "pid": true}',
    "no host": b'{"host": 3, "pid": 1}',
    "bytes": bytes(range(256)),
    "deep": b"[" * 100000,
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_lock_of_odd_content_holds_like_one_out_of_sight(tmp_path, quick, content):
    (tmp_path / ".lock").write_bytes(content)
    assert "in use by a process unknown here" in refused(tmp_path)
    aged(tmp_path / ".lock", lock.EXPIRES + 1)
    taken(tmp_path)


def test_what_is_no_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / ".lock"
    makers = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "broken link": lambda: path.symlink_to("nowhere"),
    }
    for kind, make in makers.items():
        make()
        with pytest.raises(RunError, match="delete it"), FolderLock(tmp_path):
            pass
        assert [found.name for found in tmp_path.iterdir()] == [".lock"]
        path.rmdir() if kind == "folder" else path.unlink()


def test_without_links_and_with_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: os.mkfifo(tmp_path / "no" / "such"))
    taken(tmp_path)
    write_lock(tmp_path, **DEAD)
    taken(tmp_path)
    with FolderLock(tmp_path):
        refused(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(RunError, match="cannot be locked: No such file"), FolderLock(tmp_path):
        pass


def test_what_killed_processes_left_is_swept_away_once_it_is_old(tmp_path):
    for name, age in ((".lock.over-1", 4000), (".lock.abc", 4000), (".lock.def", 10)):
        write_lock(tmp_path, name)
        aged(tmp_path / name, age)
    with FolderLock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock.def"]


def compete(root, tries, barrier, winners):
    """One of several processes that want each folder at the same moment."""
    for number in range(tries):
        barrier.wait()
        mine = FolderLock(root / str(number))
        try:
            mine.__enter__()
        except RunError:
            mine = None
        if mine is not None:
            with winners.get_lock():
                winners[number] += 1
        barrier.wait()
        if mine is not None:
            mine.__exit__()


def won(root, tries: int, processes: int = 6) -> list[int]:
    """How many of the processes got each folder, where an expired lock was lying. In every third
    one a process was killed while it took it over.
    """
    for number in range(tries):
        folder = root / str(number)
        folder.mkdir()
        write_lock(folder, token=str(number), **DEAD)
        if number % 3 == 0:
            claim = f".lock.over-{fingerprint(look(folder / '.lock'))}"
            write_lock(folder, claim, token=f"claim {number}", **DEAD)
    fork = multiprocessing.get_context("fork")
    barrier, winners = fork.Barrier(processes), fork.Array("i", tries)
    work = (root, tries, barrier, winners)
    running = [fork.Process(target=compete, args=work) for _ in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert all(list((root / str(number)).iterdir()) == [] for number in range(tries))
    return list(winners)


def test_of_six_processes_one_takes_an_expired_lock_over(tmp_path):
    assert won(tmp_path, 30) == [1] * 30


@pytest.mark.slow
def test_of_six_processes_one_takes_an_expired_lock_over_in_thousands_of_tries(tmp_path):
    assert won(tmp_path, 3000) == [1] * 3000


def test_a_claim_keeps_the_others_out_and_one_that_comes_late_looks_again(tmp_path, monkeypatch):
    """Two processes have judged the same lock; one takes it over before the other acts."""
    write_lock(tmp_path, token="old", **DEAD)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    obtain = FolderLock._obtain

    def late(self, path):
        if self is second and path.name != ".lock":
            first.__enter__()
        obtain(self, path)

    monkeypatch.setattr(FolderLock, "_obtain", late)
    with pytest.raises(RunError, match="in use"):
        second.__enter__()
    assert json.loads((tmp_path / ".lock").read_text())["token"] == first.token
    monkeypatch.setattr(lock, "PATIENCE", 0.01)
    seen = look(tmp_path / ".lock")
    claim = tmp_path / f".lock.over-{fingerprint(seen)}"
    claim.write_text(json.dumps(here() | {"token": first.token}))  # a claim that lives
    first.__exit__()
    assert (tmp_path / ".lock").exists()  # not removed while another process takes it over
    monkeypatch.setattr(FolderLock, "_obtain", obtain)
    lock._MINE.add(first.token)
    monkeypatch.setattr(lock, "runs", lambda owner: claim.exists() and owner == look_at(claim))
    with pytest.raises(RunError, match="in use"):
        second.__enter__()
    lock._MINE.discard(first.token)


def look_at(path) -> dict:
    """The owner of a lock file."""
    return look(path).owner if path.exists() else {}


def test_a_lock_that_changes_hands_has_another_fingerprint():
    one = Seen(b"x", 1, 0)
    assert fingerprint(one) == fingerprint(Seen(b"x", 1, 99))  # a heartbeat changes nothing
    assert len({fingerprint(seen) for seen in (one, Seen(b"y", 1, 0), Seen(b"x", 2, 0))}) == 3
    assert SimpleNamespace(**here()).pid == os.getpid()
