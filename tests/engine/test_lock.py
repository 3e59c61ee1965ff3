"""Two runs never write into one folder, and a run that died does not keep the next one out."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from engine.lock import FolderLock, _start_time
from utils import RunError


def write_lock(folder, **owner) -> None:
    (folder / ".lock").write_text(
        json.dumps({"host": socket.gethostname(), "started": None} | owner)
    )


def test_the_lock_is_there_inside_the_block_only(tmp_path):
    with FolderLock(tmp_path):
        owner = json.loads((tmp_path / ".lock").read_text())
        assert owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_is_refused_by_name_and_keeps_its_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        write_lock(tmp_path, pid=other.pid, started=_start_time(other.pid))
        words = f"in use by process {other.pid} on {socket.gethostname()}"
        with pytest.raises(RunError, match=words) as caught, FolderLock(tmp_path):
            pass
        assert "--output" in str(caught.value) and (tmp_path / ".lock").exists()
        other.stdin.close()


def test_the_lock_of_a_killed_process_is_taken_over_even_before_it_is_reaped(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lock(tmp_path, pid=other.pid, started=_start_time(other.pid))
    other.kill()
    for _ in range(100):
        if _start_time(other.pid) is None:
            break
        time.sleep(0.05)
    for _ in ("a zombie", "reaped"):
        with FolderLock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        write_lock(tmp_path, pid=other.pid, started="1")
        other.wait()
    other.stdin.close()


def test_a_later_process_with_the_same_number_does_not_count(tmp_path):
    write_lock(tmp_path, pid=os.getppid(), started="0")
    with FolderLock(tmp_path):
        pass
    # a container started again: the same number, another process
    write_lock(tmp_path, pid=os.getpid(), started="0")
    with FolderLock(tmp_path):
        pass


def test_a_lock_of_another_machine_holds_until_it_expires(tmp_path):
    write_lock(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(RunError, match="elsewhere"), FolderLock(tmp_path):
        pass
    os.utime(tmp_path / ".lock", (time.time() - 400,) * 2)
    with FolderLock(tmp_path):
        pass
