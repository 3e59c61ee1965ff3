"""What a launcher says, and memory that is full: told in one line."""

import os
import signal
import socket
import subprocess
import sys
import time
from unittest.mock import patch

import pytest
import torch

import main as program
import utils
from tests.fuzz import call_main
from tests.helpers import ROOT
from utils import RunError, World

DIGITS = ("--cfg", "configs/digits/digits_tiny.yaml")


@pytest.mark.parametrize(
    "said, words",
    [
        ({"RANK": "abc"}, "RANK is 'abc'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1"}, "RANK is 1 of 1 processes"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 of 2"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "٣"}, "WORLD_SIZE is"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cannot meet"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "cannot meet"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
            "cannot meet",
        ),
    ],
    ids=str,
)
def test_what_no_launcher_says_is_one_line(said, words, monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    status, _, error = call_main(*DIGITS, "--device", "cpu", "--output", tmp_path)
    assert status == 2 and words in error
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_one_line_that_says_what_to_do(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        said = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        for name, value in said.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunError, match="set MASTER_PORT") as caught:
            World("cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_processes_that_do_not_come(number):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    said = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    code = (
        "from engine.signals import stopped_at_once\n"
        "from utils import World\n"
        "with stopped_at_once():\n"
        "    print(flush=True)\n"
        "    World('cpu')\n"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **said}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(1)
        process.send_signal(number)
        try:
            assert process.wait(10) == -number
        finally:
            process.kill()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmany"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate"
            " memory)"
        ),
        RuntimeError("CUDA error: out of memory\nmore lines"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError("Unable to allocate 3.41 TiB for an array"),
        MemoryError(),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_full_memory_names_the_batch_size(error, tmp_path):
    with patch.object(program.Program, "run", side_effect=error):
        status, _, said = call_main(*DIGITS, "--device", "cpu", "--output", tmp_path)
    assert status == 2 and "lower DATA.BATCH_SIZE" in said and "many" not in said


def test_the_allocator_of_the_cpu_speaks_as_expected():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert utils.out_of_memory(caught.value)


def test_another_runtime_error_is_not_taken_for_full_memory(tmp_path):
    with patch.object(program.Program, "run", side_effect=RuntimeError("a bug")):
        with pytest.raises(RuntimeError, match="a bug"):
            call_main(*DIGITS, "--device", "cpu", "--output", tmp_path)
