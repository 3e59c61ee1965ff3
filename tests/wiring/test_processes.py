"""What each of two processes does of the whole."""

import os
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch import nn

import utils
from tests.wiring.runs import PLACE, digest, metrics, payload, run

UNSCALED = {"TRAIN.BASE_LR": 0.1, "TRAIN.MIN_LR": 0.0, "TRAIN.WARMUP_LR": 0.0}


@contextmanager
def one_of_two(rank: int):
    """This process has that rank among two, of which the other one is not there: what they would
    add up or exchange is its own alone.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    environment = patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": "2"})
    try:
        with environment, patch.object(utils.World, "_join", lambda world: None):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def images_trained_on():
    """Digests of the images that convolutions see in training."""
    seen = []

    def look(module, inputs, _):
        if isinstance(module, nn.Conv2d) and module.training:
            seen.extend(digest(image) for image in inputs[0])

    hook = nn.modules.module.register_module_forward_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def test_two_processes_share_the_images_and_take_the_rate_of_both(tmp_path):
    with images_trained_on() as whole:
        run(tmp_path / "whole", UNSCALED | {"DATA.BATCH_SIZE": 16})
    parts = []
    for rank in (0, 1):
        with one_of_two(rank), images_trained_on() as seen:
            assert run(tmp_path / str(rank), UNSCALED)["status"] == [0]
        parts.append(seen)
    assert [len(part) for part in (whole, *parts)] == [16, 8, 8]
    assert sorted(whole) == sorted(parts[0] + parts[1])
    [update] = metrics(tmp_path / "0", "train")
    assert update["lr"] == pytest.approx(0.1 * 16 / 512)
    assert payload(tmp_path / "0")["layout"]["world_size"] == 2
    files = [path.name for path in (tmp_path / "1" / PLACE).iterdir()]
    assert files == ["log_rank1.txt"]


def test_a_process_takes_the_device_of_its_local_rank(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with patch("utils.choose_device", wraps=utils.choose_device) as chosen:
        run(tmp_path, {"DEVICE": "cpu"}, ("--throughput", "--local_rank", "2"))
    assert [call.args for call in chosen.call_args_list] == [("cpu", 2)]
