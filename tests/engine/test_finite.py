"""Weights and outputs that are not finite get no score, and the first of them is named."""

import math

import pytest
import torch
from torch import nn

import main as program
from engine.evaluate import evaluate
from engine.finite import NoScoreError, first_nonfinite
from engine.throughput import throughput
from tests.engine.runs import arguments, folder
from tests.engine.small import Loader, Net


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


def test_an_evaluation_of_damaged_weights_is_one_line(tmp_path, capsys):
    settings = {"TRAIN__MAX_STEPS": 1, "TRAIN__SAVE_STEPS": 0, "DATA__NUM_WORKERS": 0}
    assert program.main(arguments(tmp_path, **settings)) == 0
    content = torch.load(folder(tmp_path) / "last.pth", weights_only=True)
    name = next(name for name in content["model"] if name.endswith("mlp.fc1.bias"))
    content["model"][name][1] = math.nan
    torch.save({"model": content["model"], "metadata": content["metadata"]}, tmp_path / "bad.pth")
    capsys.readouterr()
    argv = [*arguments(tmp_path), "--eval", "--pretrained", str(tmp_path / "bad.pth")]
    assert program.main(argv) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and name in said.err and "Acc@1" not in said.out
