"""Random states, whole files, the log, devices: what every run needs."""

import logging
import random
import re

import numpy as np
import pytest
import torch

import utils
from utils import (
    RunError,
    World,
    atomic_write,
    capture_rng,
    choose_device,
    choose_precision,
    create_logger,
    one_line,
    prepare_folder,
    restore_rng,
)

CPU = torch.device("cpu")


def draw():
    return (
        random.gauss(0, 1),
        np.random.standard_normal(),
        np.random.beta(0.8, 0.8),
        torch.rand(3).tolist(),
    )


def test_random_states_survive_a_file_read_with_weights_only(tmp_path):
    utils.seed_everything(5)
    draw()  # leaves half of a Gaussian pair in Python's and NumPy's generators
    torch.save(capture_rng(CPU), tmp_path / "state.pth")
    expected = [draw() for _ in range(3)]
    utils.seed_everything(6)
    restore_rng(torch.load(tmp_path / "state.pth", weights_only=True), CPU)
    assert [draw() for _ in range(3)] == expected


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"


def test_an_unusable_output_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--output"):
        prepare_folder(tmp_path / "file" / "below")
    assert prepare_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_the_log_has_the_references_lines_and_every_librarys_warnings(tmp_path, capsys):
    logger = create_logger(tmp_path, "swin_tiny", rank=1)
    logger.info("hello %d", 3)
    logging.getLogger("some.library").warning("careful")
    logging.getLogger("some.library").info("chatter")
    create_logger(None, "other")
    lines = (tmp_path / "log_rank1.txt").read_text().splitlines()
    assert re.fullmatch(
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d swin_tiny\] \(test_utils\.py \d+\): INFO hello 3",
        lines[0],
    )
    assert lines[1].endswith("WARNING careful") and len(lines) == 2
    assert capsys.readouterr().out == ""  # rank 0 alone prints


def test_devices_and_dtypes_that_do_not_exist_are_named():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="available: .*cpu"):
            choose_device("cuda")
    assert (
        choose_precision(CPU) == torch.float32 == choose_precision(CPU, "bfloat16", enabled=False)
    )
    assert choose_precision(CPU, "bfloat16") == torch.bfloat16


def test_float32_on_the_cpu_neither_casts_nor_scales():
    with utils.autocast_factory(CPU, torch.float32)():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with utils.autocast_factory(CPU, torch.bfloat16)():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_lone_process_needs_no_group():
    with World("cpu") as world:
        assert (world.rank, world.size, world.is_main, world.control) == (0, 1, True, None)
        assert world.gather("x") == ["x"] and world.broadcast(3) == 3 and world.mean(2.5) == 2.5
        world.barrier()


def test_errors_become_one_line_and_those_of_data_workers_lose_their_traceback():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyError()) == "KeyError"
    worker = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback:\n  File"
        " x\ndata.errors.DataError: image 'a: b' is bad"
    )
    assert one_line(RuntimeError(worker)) == "image 'a: b' is bad"
