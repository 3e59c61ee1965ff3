"""Distillation of a model with two heads: each learns from its own teacher, and evaluation takes
the mean.
"""

import pytest
import torch

import main as program
from checkpoint import read_checkpoint
from engine.losses import Distillation, make_criterion, with_distillation
from engine.trainer import BothHeads
from models import PiT, SwiftFormer
from tests.helpers import ROOT

SWIFTFORMER = dict(in_chans=1, num_classes=10, embed_dims=(8, 8), depths=(1, 1))


def two_headed(kind):
    torch.manual_seed(0)
    if kind == "swiftformer":
        return SwiftFormer(**SWIFTFORMER)
    return PiT(16, 4, 1, 10, 8, (1,), (2,), distilled=True)


@pytest.mark.parametrize("kind", ["swiftformer", "pit"])
@pytest.mark.parametrize(
    ("alpha", "learns", "rests"), [(0.0, "head", "head_dist"), (1.0, "head_dist", "head")]
)
def test_the_class_head_learns_the_labels_and_the_other_the_teacher(kind, alpha, learns, rests):
    model = two_headed(kind)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
    loss = with_distillation(make_criterion(False), Distillation(teacher, "hard", alpha))
    images = torch.randn(4, 1, 16, 16)
    loss(images, BothHeads(model)(images), torch.arange(4)).backward()
    assert getattr(model, learns).weight.grad.abs().max() > 0
    assert getattr(model, rests).weight.grad.abs().max() == 0


def test_a_model_says_whether_it_has_two_heads():
    assert two_headed("pit").has_two_heads()
    assert two_headed("swiftformer").has_two_heads()
    assert not SwiftFormer(**SWIFTFORMER, distillation=False).has_two_heads()


def test_a_run_with_a_teacher_trains_both_heads(tmp_path):
    common = [
        "--output",
        str(tmp_path),
        "--opts",
        "TRAIN.MAX_STEPS",
        "3",
        "LOG.TENSORBOARD",
        "False",
        "LOG.PLOT",
        "False",
        "DEVICE",
        "cpu",
    ]
    teacher = str(ROOT / "configs" / "digits" / "digits_swiftformer.yaml")
    assert program.main(["--cfg", teacher, *common]) == 0
    weights = tmp_path / "digits_swiftformer" / "default" / "last.pth"
    student = [
        *common,
        "MODEL.SWIFTFORMER.DISTILL_HEAD",
        "True",
        "TRAIN.DISTILL.KIND",
        "hard",
        "TRAIN.DISTILL.TEACHER",
        teacher,
        "TRAIN.DISTILL.TEACHER_WEIGHTS",
        str(weights),
        "TAG",
        "student",
        "TRAIN.CLIP_MODE",
        "agc",
        "TRAIN.CLIP_GRAD",
        "0.01",
    ]
    assert program.main(["--cfg", teacher, *student]) == 0
    state = read_checkpoint(tmp_path / "digits_swiftformer" / "student" / "last.pth").content
    for head in ("head", "head_dist"):
        assert state["model"][f"{head}.bias"].abs().max() > 0
