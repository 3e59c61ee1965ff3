"""What the others do where a process stops, ends, or cannot be reached any more; without a launcher
that would end them.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.engine.runs import arguments
from tests.helpers import ROOT

pytestmark = pytest.mark.slow
TIMEOUT = 6.0  # TRAIN.GROUP_TIMEOUT, seconds
ENDLESS = {"TRAIN__EPOCHS": 10000, "DATA__NUM_WORKERS": 0, "TRAIN__GROUP_TIMEOUT": TIMEOUT}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


def start(rank, words, output, port, host="127.0.0.1", before=(), **environment):
    """Process `rank` of two: killer.py with these words."""
    variables = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        **environment,
    }
    return subprocess.Popen(
        [*before, sys.executable, "tests/engine/killer.py", *words, *arguments(output, **ENDLESS)],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def end(*processes) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def error_of(process, seconds: float = 120.0) -> str:
    """What a process that ends by itself with status 1 says, and that it is one line."""
    _, errors = process.communicate(timeout=seconds)
    lines = [line for line in errors.splitlines() if line.startswith("main.py: error")]
    assert process.returncode == 1 and len(lines) == 1, errors
    assert "Traceback" not in errors, errors
    return lines[0]


@pytest.mark.parametrize("place", ["stop", "update"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped_or_killed_ends_the_other_in_time(place, rank, tmp_path):
    """Row 19, and row 1 without a launcher; process 0 also keeps the store."""
    port = free_port()
    pair = [start(number, (place, "4", str(rank)), tmp_path, port) for number in (0, 1)]
    try:
        line = error_of(pair[1 - rank])
        stopped = f"process {rank} of 2" if rank else "kept by process 0"
        words = {"stop": ["it was stopped", stopped], "update": ["connection"]}
        assert all(word in line for word in words[place]), line
    finally:
        end(*pair)


def namespaces(action: str) -> None:
    """Two machines, a0 and a1, with a cable between them."""
    if action == "add":
        commands = [f"netns add {name}" for name in ("ira0", "ira1")]
        commands += ["link add ira_a netns ira0 type veth peer name ira_b netns ira1"]
        for number, name in enumerate("ab"):
            inside = f"-n ira{number}"
            commands += [f"{inside} addr add 10.97.0.{number + 1}/24 dev ira_{name}"]
            commands += [f"{inside} link set ira_{name} up", f"{inside} link set lo up"]
    else:
        commands = [f"netns del {name}" for name in ("ira0", "ira1")]
    for command in commands:
        subprocess.run(["ip", *command.split()], check=action == "add", capture_output=True)


@pytest.fixture
def machines():
    try:
        namespaces("add")
    except (OSError, subprocess.CalledProcessError) as error:
        namespaces("del")
        pytest.skip(f"no network namespaces here: {error}")
    yield
    namespaces("del")


def test_two_machines_whose_link_goes_down_both_end_in_time(machines, tmp_path):
    """Row 22."""
    pair = [
        start(
            number,
            ("say", "3", str(number)),
            tmp_path,
            29500,
            host="10.97.0.1",
            before=["ip", "netns", "exec", f"ira{number}"],
            GLOO_SOCKET_IFNAME=f"ira_{'ab'[number]}",
        )
        for number in (0, 1)
    ]
    try:
        for process in pair:
            for line in process.stderr:
                if line == "REACHED\n":
                    break
        subprocess.run("ip -n ira0 link set ira_a down".split(), check=True)
        began = time.monotonic()
        lines = [error_of(process) for process in pair]
        assert time.monotonic() - began < 10 * TIMEOUT
        assert all("cannot be reached" in line for line in lines), lines
    finally:
        end(*pair)
