"""Timing needs no data, runs in the asked dtype, and reports multiply-accumulates under their
definitions.
"""

import json

import pytest
import torch
from torch import nn

from engine.throughput import describe, throughput
from kernels.linear import kept_for
from models.counting import count_macs


class Net(nn.Module):
    """Counts its forward passes; 3 x 8 x 6 pixels, convolution to 5 channels at stride 2, then a
    linear map.
    """

    MACS = (4 * 3) * 5 * (3 * 2 * 2) + 5 * 7

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 2, 2), nn.Linear(5, 7)
        self.passes, self.dtypes = 0, set()

    def forward(self, x):
        assert not self.training and x.shape[1:] == (3, 8, 6)
        self.passes += 1
        self.prepared = kept_for(self.head) is not None
        y = self.head(self.conv(x).mean((2, 3)))
        self.dtypes.add(y.dtype)
        return y

    def flops(self):
        return 123.0


def test_counts_times_and_restores():
    model = Net().train()
    throughput(model, 4, (8, 6), 3, "cpu", iters=1)
    assert model.prepared  # weights, inside `evaluation`
    model.passes = 0
    result = throughput(model, 4, (8, 6), 3, "cpu", iters=3, warmup=2, count=count_macs)
    assert model.training and model.passes == 3 + 2 + 3  # three more to count
    assert result["macs_with_attention"] == result["macs_without_attention"] == Net.MACS
    assert result["macs"] == 123
    assert result["params"] == 5 * 12 + 5 + 35 + 7
    assert result["images_per_s"] == pytest.approx(4 * 1000 / result["ms"])
    assert result["peak_mib"] > 0
    assert result["dtype"] == "float32" and result["img_size"] == (8, 6)
    assert json.loads(json.dumps(result))["batch_size"] == 4


def test_dtype_is_the_configured_one():
    model = Net()
    result = throughput(
        model, 2, (8, 6), 3, "cpu", torch.autocast("cpu", torch.bfloat16), iters=1, warmup=0
    )
    assert result["dtype"] == "bfloat16" and torch.bfloat16 in model.dtypes


def test_line_names_every_number():
    line = describe(throughput(Net(), 2, (8, 6), 3, "cpu", iters=1, warmup=0, count=count_macs))
    assert all(
        word in line
        for word in (
            "batch_size 2",
            "images/s",
            "ms/batch",
            "8x6",
            "float32",
            "MiB",
            "params",
            "GMACs per image",
            "(formula)",
            "(linear + attention products)",
            "(linear + norms, no attention products)",
        )
    )
    assert "\n" not in line


def test_a_model_without_formula_has_counted_macs_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    result = throughput(model, 1, 2, 3, "cpu", iters=1, warmup=0, count=count_macs)
    assert result["macs"] is None
    assert result["macs_with_attention"] == 24
    assert "formula" not in describe(result)


def test_without_a_counter_the_line_says_the_formula_alone():
    line = describe(throughput(Net(), 2, (8, 6), 3, "cpu", iters=1, warmup=0))
    assert line.endswith("GMACs per image 0.0000 (formula)")


def test_the_processor_takes_two_passes_to_warm_up_and_five_that_count():
    net = Net()
    result = throughput(net, 2, (8, 6), 3, "cpu")
    assert (result["iters"], net.passes) == (5, 7)
