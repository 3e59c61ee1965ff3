"""Weights and outputs that are not finite get no score, and the first of them is named."""

import math

import pytest
import torch
from torch import nn

from engine.evaluate import evaluate
from engine.finite import NoScoreError, first_nonfinite
from engine.throughput import throughput
from tests.engine.small import Loader, Net
from tests.wiring.runs import payload, run


def score(model, **options):
    batches = list(Loader(2).epoch(0))
    return evaluate(model, batches, device="cpu", num_classes=5, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_get_no_score(value):
    model = Net()
    assert score(model).count == 8 and first_nonfinite(model) is None
    with torch.no_grad():
        model.head.weight[3, 2] = value
        model.head.bias[4] = math.nan
    with pytest.raises(NoScoreError, match="the model's head.weight has values that are not"):
        score(model)
    timing = dict(batch_size=2, img_size=8, in_chans=3, device="cpu", iters=1, warmup=1)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    assert throughput(flat, **timing)["iters"] == 1
    with torch.no_grad():
        flat[1].bias[0] = value
    with pytest.raises(NoScoreError, match=r"the model's 1\.bias"):
        throughput(flat, **timing)


def test_a_mask_may_hold_minus_infinity_and_a_buffer_no_nan():
    model = Net()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert first_nonfinite(model) is None
    model.register_buffer("statistic", torch.tensor([1.0, math.nan]))
    assert first_nonfinite(model) == "statistic"


def test_outputs_that_are_not_finite_are_counted():
    class Overflow(Net):
        def forward(self, x):
            logits = super().forward(x)
            return torch.where(x[:, :1, 0] > 0, logits * math.inf, logits)

    bad = sum(int((images[:, 0, 0] > 0).sum()) for images, _ in Loader(2).epoch(0))
    with pytest.raises(NoScoreError, match=f"for {bad} of 8 images although") as caught:
        score(Overflow())
    assert 0 < bad < 8 and not caught.value.by_weights and "float32" in str(caught.value)


def test_an_evaluation_of_damaged_weights_is_one_line(tmp_path):
    run(tmp_path)
    content = payload(tmp_path)
    name = next(name for name in content["model"] if name.endswith("mlp.fc1.bias"))
    content["model"][name][1] = math.nan
    torch.save({"model": content["model"], "metadata": content["metadata"]}, tmp_path / "bad.pth")
    left = run(tmp_path, words=("--eval", "--pretrained", str(tmp_path / "bad.pth")))
    assert left["status"] == [2] and name in left["errors"] and left["errors"].count("\n") == 1
    assert not any("Acc@" in line for line in left["log"])
