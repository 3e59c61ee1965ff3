"""Training losses, all formed in float32 or wider whatever the autocast dtype (trap T23)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import RunError

Logits = Tensor | tuple[Tensor, Tensor]


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class CrossEntropy(nn.Module):
    """Mean cross-entropy of logits (B, K).

    Args:
        soft_targets: targets are probabilities (B, K), as mixup makes them, instead of class
            numbers (B,).
        smoothing: label smoothing in [0, 1) of class numbers, s/K on every class; soft targets hold
            theirs already.
    Raises: ValueError when called with the other kind of targets.
    """

    def __init__(self, soft_targets: bool = False, smoothing: float = 0.0):
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"label smoothing {smoothing} is outside [0, 1)")
        self.soft_targets, self.smoothing = soft_targets, 0.0 if soft_targets else smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point() != self.soft_targets:
            expected = "probabilities (B, K)" if self.soft_targets else "class numbers (B,)"
            raise ValueError(
                f"the loss expects {expected}, got {targets.dtype} of shape {tuple(targets.shape)};"
                " build it with soft_targets = whether mixup or cutmix is on"
            )
        targets = targets.to(logits.device, wide(logits).dtype) if self.soft_targets else targets
        return F.cross_entropy(wide(logits), targets, label_smoothing=self.smoothing)


def make_criterion(soft_targets: bool, smoothing: float = 0.0) -> CrossEntropy:
    """The training loss. `soft_targets` says whether the mixing that really runs is on (any of
    mixup, cutmix and cutmix_minmax), not whether AUG.MIXUP is above 0, with which the reference
    crashes on CutMix alone (trap T7).
    """
    return CrossEntropy(soft_targets, smoothing)


class Distillation(nn.Module):
    """Adds a teacher's opinion to the loss. With class head z, distillation head d (z itself where
    there is one head), teacher t:

        none:  base(z, y)
        hard:  (1 - alpha) base(z, y) + alpha CE(d, argmax t)
        soft:  (1 - alpha) base(z, y) + alpha tau² KL(softmax(t / tau) || softmax(d / tau)), mean
            over the batch

    Args:
        teacher: images (B, 3, H, W) -> logits (B, K); frozen, always in eval mode, and in no state
            dict. None for kind "none".
        alpha: in [0, 1]. tau: temperature of `soft`, above 0.
    Shapes: logits (B, K) or the pair ((B, K), (B, K)) of a model with two heads; targets as `base`
        takes them.
    Raises: RunError for an unknown kind, values out of range, or a teacher with another number of
        classes.
    Source: Touvron et al. 2021, Training data-efficient image transformers, arXiv:2012.12877,
        equations 2 and 3. Its released code also divides the KL term by K; this is the paper's
        form.
    """

    KINDS = ("none", "hard", "soft")

    def __init__(self, teacher: nn.Module | None, kind: str, alpha: float = 0.5, tau: float = 1.0):
        super().__init__()
        if kind not in self.KINDS:
            raise RunError(
                f"TRAIN.DISTILL.KIND {kind!r} is not known; allowed: {', '.join(self.KINDS)}"
            )
        if teacher is None and kind != "none":
            raise RunError(
                f"TRAIN.DISTILL.KIND {kind!r} needs a teacher; set TRAIN.DISTILL.TEACHER"
            )
        if not 0 <= alpha <= 1 or tau <= 0:
            raise RunError(
                f"TRAIN.DISTILL.ALPHA {alpha} must lie in [0, 1] and TRAIN.DISTILL.TAU {tau}"
                " above 0"
            )
        self.kind, self.alpha, self.tau = kind, alpha, tau
        self._teacher = (
            (teacher.requires_grad_(False).eval(),) if teacher is not None else ()
        )  # a tuple, so that it is no submodule

    def forward(self, images: Tensor, logits: Logits, targets: Tensor, base: nn.Module) -> Tensor:
        head, distilled = logits if isinstance(logits, (tuple, list)) else (logits, logits)
        loss = base(head, targets)
        if self.kind == "none":
            return loss
        return (1 - self.alpha) * loss + self.alpha * self._distance(
            wide(distilled), self._opinion(images, distilled)
        )

    @torch.no_grad()
    def _opinion(self, images: Tensor, like: Tensor) -> Tensor:
        logits = self._teacher[0](images)
        if logits.shape != like.shape:
            raise RunError(
                f"the teacher's logits have shape {tuple(logits.shape)}, the model's"
                f" {tuple(like.shape)}; use a teacher of the same classes"
            )
        return wide(logits)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(1))
        ours, theirs = (F.log_softmax(z / self.tau, 1) for z in (student, teacher))
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.tau**2
