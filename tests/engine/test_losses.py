"""The training losses against their formulas written out."""

import pytest
import torch
from torch import nn

from engine.losses import Distillation, describe_loss, make_criterion
from utils import RunError


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    shapes = {"images": (4, 3, 2, 2), "logits": (4, 5), "dist": (4, 5), "teacher": (4, 5)}
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return {**drawn, "targets": torch.tensor([0, 3, 3, 1])}


class Teacher(nn.Module):
    """Gives the same logits whatever it sees; its dropout would change them in train mode."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.drop = nn.Dropout(0.9)

    def forward(self, images):
        assert len(images) == len(self.logits)
        return self.drop(self.logits)


def log_softmax(z):
    return z - z.exp().sum(1, keepdim=True).log()


def nll(z, targets):
    return -log_softmax(z)[range(len(z)), targets].mean()


def test_hard_targets_give_the_negative_log_likelihood(batch):
    torch.testing.assert_close(
        make_criterion(False, 0.0)(batch["logits"], batch["targets"]),
        nll(batch["logits"], batch["targets"]),
    )


def test_smoothing_spreads_its_share_over_all_classes(batch):
    logits, targets = batch["logits"], batch["targets"]
    expected = 0.9 * nll(logits, targets) - 0.1 * log_softmax(logits).mean()
    torch.testing.assert_close(make_criterion(False, 0.1)(logits, targets), expected)


def test_soft_targets_are_taken_as_they_are(batch):
    soft = batch["dist"].softmax(1)
    expected = -(soft * log_softmax(batch["logits"])).sum(1).mean()
    torch.testing.assert_close(make_criterion(True, 0.1)(batch["logits"], soft), expected)


@pytest.mark.parametrize("soft", [True, False])
def test_the_other_kind_of_targets_is_refused(batch, soft):
    wrong = batch["targets"] if soft else batch["dist"].softmax(1)
    with pytest.raises(ValueError, match="probabilities" if soft else "class numbers"):
        make_criterion(soft)(batch["logits"], wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_logits_is_formed_in_float32(batch, dtype):
    half = batch["logits"].to(dtype)
    loss = make_criterion(False, 0.1)(half, batch["targets"])
    assert loss.dtype == torch.float32
    assert loss == make_criterion(False, 0.1)(half.float(), batch["targets"])


def test_hard_distillation_is_the_weighted_sum_of_two_cross_entropies(batch):
    loss = Distillation(Teacher(batch["teacher"]), "hard", alpha=0.3)
    got = loss(
        batch["images"], (batch["logits"], batch["dist"]), batch["targets"], make_criterion(False)
    )
    expected = 0.7 * nll(batch["logits"], batch["targets"]) + 0.3 * nll(
        batch["dist"], batch["teacher"].argmax(1)
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_the_tempered_divergence_times_tau_squared(batch, tau):
    loss = Distillation(Teacher(batch["teacher"]), "soft", alpha=0.3, tau=tau)
    got = loss(
        batch["images"], (batch["logits"], batch["dist"]), batch["targets"], make_criterion(False)
    )
    p, q = log_softmax(batch["teacher"] / tau), log_softmax(batch["dist"] / tau)
    divergence = (p.exp() * (p - q)).sum(1).mean()
    torch.testing.assert_close(
        got, 0.7 * nll(batch["logits"], batch["targets"]) + 0.3 * tau**2 * divergence
    )


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_one_head_serves_as_both(batch, kind):
    loss = Distillation(Teacher(batch["teacher"]), kind, alpha=0.3, tau=2.0)
    criterion = make_criterion(False)
    pair = batch["logits"], batch["logits"]
    one = loss(batch["images"], batch["logits"], batch["targets"], criterion)
    assert one == loss(batch["images"], pair, batch["targets"], criterion)


def test_alpha_zero_and_no_distillation_are_the_base_loss(batch):
    criterion, heads = make_criterion(False, 0.1), (batch["logits"], batch["dist"])
    base = criterion(batch["logits"], batch["targets"])
    for loss in (Distillation(Teacher(batch["teacher"]), "hard", 0.0), Distillation(None, "none")):
        assert loss(batch["images"], heads, batch["targets"], criterion) == base


def test_a_student_that_agrees_with_the_teacher_pays_nothing_for_it(batch):
    loss = Distillation(Teacher(batch["teacher"]), "soft", alpha=1.0, tau=2.0)
    agreed = loss(batch["images"], batch["teacher"], batch["targets"], make_criterion(False))
    assert agreed.abs() < 1e-15


def test_the_teacher_stays_in_eval_mode_frozen_and_out_of_the_state_dict(batch):
    teacher = Teacher(batch["teacher"])
    loss = Distillation(teacher, "soft").train()
    student = batch["logits"].clone().requires_grad_()
    loss(batch["images"], student, batch["targets"], make_criterion(False)).backward()
    assert not teacher.training and teacher.logits.grad is None and student.grad is not None
    assert not loss.state_dict() and not list(loss.parameters())


def test_distillation_gradient_reaches_both_heads(batch):
    heads = [batch[name].clone().requires_grad_() for name in ("logits", "dist")]
    loss = Distillation(Teacher(batch["teacher"]), "soft", 0.5)
    loss(batch["images"], tuple(heads), batch["targets"], make_criterion(False)).backward()
    assert all(head.grad.abs().sum() > 0 for head in heads)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"kind": "warm"}, "allowed: none, hard, soft"),
        ({"kind": "hard", "teacher": None}, "TRAIN.DISTILL.TEACHER"),
        ({"kind": "soft", "tau": 0.0}, "TRAIN.DISTILL.TAU 0.0"),
        ({"kind": "hard", "alpha": 1.5}, "TRAIN.DISTILL.ALPHA 1.5"),
    ],
)
def test_impossible_distillation_is_refused(batch, arguments, words):
    with pytest.raises(RunError, match=words):
        Distillation(**{"teacher": Teacher(batch["teacher"]), **arguments})


def test_a_teacher_of_other_classes_is_refused(batch):
    with pytest.raises(RunError, match="the teacher's logits have shape"):
        Distillation(Teacher(batch["teacher"][:, :4]), "hard")(
            batch["images"], batch["logits"], batch["targets"], make_criterion(False)
        )


@pytest.mark.parametrize(
    "mixing, smoothing, distillation, words",
    [
        (False, 0.0, "none", ""),
        (False, 0.1, "none", "with label smoothing"),
        (True, 0.1, "none", "with mixup/cutmix and label smoothing"),
        (True, 0.1, "soft", "with mixup/cutmix, label smoothing and distillation"),
        (False, 0.0, "hard", "with distillation"),
    ],
)
def test_what_sets_the_training_loss_apart_is_said(mixing, smoothing, distillation, words):
    assert describe_loss(mixing, smoothing, distillation) == words
