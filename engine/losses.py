"""Training losses, all formed in float32 or wider: under float16 autocast a loss formed in the
autocast dtype overflows.
"""

import reprlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from registry import Interval, did_you_mean
from utils import RunError

Logits = Tensor | tuple[Tensor, Tensor]
SMOOTHING = Interval(0, 1, "[)")


def upcast(logits: Tensor) -> Tensor:
    """Logits in float32; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class CrossEntropy(nn.Module):
    """Mean cross-entropy of logits (B, K).

    Args:
        soft_targets: targets are probabilities (B, K), as mixup makes them, instead of class
            numbers (B,).
        smoothing: label smoothing in [0, 1) of class numbers, s/K on every class; not applied to
            soft targets, which are smoothed where they are made.
    Raises: ValueError when called with the other kind of targets.
    """

    def __init__(self, soft_targets: bool = False, smoothing: float = 0.0):
        super().__init__()
        if not SMOOTHING.holds(smoothing):
            raise ValueError(f"label smoothing {smoothing} is outside {SMOOTHING}")
        self.soft_targets = soft_targets
        self.smoothing = 0.0 if soft_targets else smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point() != self.soft_targets:
            expected = "probabilities (B, K)" if self.soft_targets else "class numbers (B,)"
            raise ValueError(
                f"the loss expects {expected}, got {targets.dtype} of shape {tuple(targets.shape)};"
                " build it with soft_targets = whether mixup or cutmix is on"
            )
        logits = upcast(logits)
        if self.soft_targets:
            targets = targets.to(logits.device, logits.dtype)
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)


def make_criterion(soft_targets: bool, smoothing: float = 0.0) -> CrossEntropy:
    """The training loss. soft_targets: whether any of mixup, cutmix and cutmix_minmax is on;
    AUG.MIXUP alone does not tell, since CutMix without Mixup makes soft targets too.
    """
    return CrossEntropy(soft_targets, smoothing)


class Distillation(nn.Module):
    """Adds the distance from a teacher to the loss. With class head z, distillation head d (z
    itself where there is one head), teacher t:

        none:  base(z, y)
        hard:  (1 - alpha) base(z, y) + alpha CE(d, argmax t)
        soft:  (1 - alpha) base(z, y) + alpha tau² KL(softmax(t / tau) || softmax(d / tau)), mean
            over the batch

    Args:
        teacher: images (B, 3, H, W) -> logits (B, K); frozen, always in eval mode, and in no state
            dict. None for kind "none".
        alpha: in [0, 1].
        tau: temperature of `soft`, above 0.
    Shapes: logits (B, K) or the pair ((B, K), (B, K)) of a model with two heads; targets as `base`
        takes them.
    Raises: RunError for an unknown kind, values out of range, or a teacher with another number of
        classes.
    Source: Touvron et al. 2021, Training data-efficient image transformers, arXiv:2012.12877,
        equations 2 and 3. Its released code also divides the KL term by K; this is the paper's
        form.
    """

    KINDS = ("none", "hard", "soft")
    ALPHA = Interval(0, 1)
    TAU = Interval(0, ends="(]")

    def __init__(self, teacher: nn.Module | None, kind: str, alpha: float = 0.5, tau: float = 1.0):
        super().__init__()
        given = "" if teacher is None else type(teacher).__name__
        check_distillation(kind, given)
        for key, value, allowed in (("ALPHA", alpha, self.ALPHA), ("TAU", tau, self.TAU)):
            if not allowed.holds(value):
                raise RunError(f"TRAIN.DISTILL.{key} {value} is outside {allowed}")
        self.kind = kind
        self.alpha = alpha
        self.tau = tau
        self._teacher = ()  # a tuple, so that the teacher is no submodule
        if teacher is not None:
            self._teacher = (teacher.requires_grad_(False).eval(),)

    def forward(self, images: Tensor, logits: Logits, targets: Tensor, base: nn.Module) -> Tensor:
        head, distilled = logits if isinstance(logits, (tuple, list)) else (logits, logits)
        loss = base(head, targets)
        if self.kind == "none":
            return loss
        distance = self._distance(upcast(distilled), self._teacher_logits(images, distilled))
        return (1 - self.alpha) * loss + self.alpha * distance

    @torch.no_grad()
    def _teacher_logits(self, images: Tensor, like: Tensor) -> Tensor:
        logits = self._teacher[0](images)
        if logits.shape != like.shape:
            raise RunError(
                f"the teacher's logits have shape {tuple(logits.shape)}, the model's"
                f" {tuple(like.shape)}; use a teacher of the same classes"
            )
        return upcast(logits)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(1))
        student = F.log_softmax(student / self.tau, 1)
        teacher = F.log_softmax(teacher / self.tau, 1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.tau**2


def check_distillation(kind: str, teacher: str) -> None:
    """Refuses a kind of distillation without a teacher's name, and a teacher without a kind.

    Raises: RunError.
    """
    if kind not in Distillation.KINDS:
        hint = did_you_mean(kind, Distillation.KINDS)
        raise RunError(
            f"TRAIN.DISTILL.KIND {kind!r} is not known; allowed: {', '.join(Distillation.KINDS)}"
            f"{hint}"
        )
    if not teacher and kind != "none":
        raise RunError(
            f"TRAIN.DISTILL.KIND {kind!r} needs a teacher: set TRAIN.DISTILL.TEACHER to a timm"
            " model's name or a YAML of this repository"
        )
    if teacher and kind == "none":
        raise RunError(
            f"TRAIN.DISTILL.KIND 'none' leaves the teacher {reprlib.repr(teacher)} unused;"
            " allowed with a teacher: hard, soft"
        )


def with_distillation(
    criterion: Callable[[Tensor, Tensor], Tensor],
    distillation: Callable[..., Tensor] | None,
) -> Callable[..., Tensor]:
    """The loss of a `Trainer`, (images, output, targets) -> scalar, from a criterion (logits,
    targets) and a `Distillation` or None.
    """
    if distillation is None:
        return with_penalty(lambda images, logits, targets: criterion(logits, targets))
    return with_penalty(
        lambda images, logits, targets: distillation(images, logits, targets, criterion)
    )


def with_penalty(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss, for a model that may return {"logits": ..., "penalty": a scalar to be added} in
    training instead of its logits.
    """

    def total(images: Tensor, output: Any, targets: Tensor) -> Tensor:
        if isinstance(output, dict):
            return loss(images, output["logits"], targets) + output["penalty"]
        return loss(images, output, targets)

    return total


def describe_loss(mixing: bool, smoothing: float, distillation: str = "none") -> str:
    """What sets the training loss apart from the validation's cross-entropy, such as "with
    mixup/cutmix and label smoothing"; "" for nothing.
    """
    parts = []
    if mixing:
        parts.append("mixup/cutmix")
    if smoothing > 0:
        parts.append("label smoothing")
    if distillation != "none":
        parts.append("distillation")
    if not parts:
        return ""
    *first, last = parts
    return f"with {', '.join(first)} and {last}" if first else f"with {last}"
