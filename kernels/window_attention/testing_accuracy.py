"""Judges what a kernel returned for a case: it may err at most twice as much as PyTorch does in the
case's own dtype.
"""

import copy
import math

import torch
from torch import Tensor

from .layout import window_layout
from .reference import masked_logits, split_windows
from .terms import OffsetTerms
from .testing import (
    EPILOGUES,
    Case,
    Drawn,
    by_part,
    by_pytorch,
    real_rows,
    specification,
)


def distances(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """(Euclidean norm of the error, largest error); infinite where something is not a number."""
    if not torch.isfinite(found).all():
        return float("inf"), float("inf")
    difference = found.double() - exact.double()
    return difference.norm().item(), difference.abs().max().item()


def rounding(size: float, dtype: torch.dtype) -> float:
    """Half a unit in the last place of a number of this size: what rounding it correctly may
    cost.
    """
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(size)) / 2 if size else 0.0


def exact_lse(drawn: Drawn) -> Tensor:
    """(B, nW, heads, N) float64: the log-sum-exp of each row of logits; NaN at padding."""
    case = drawn.case
    layout = window_layout(case.grid, case.window, case.shift, case.mask_value)
    q, k, _ = split_windows(drawn.qkv.double(), layout, case.heads)
    bias = None if drawn.bias is None else drawn.bias.double()
    terms = OffsetTerms(case.window, drawn.scale.double(), bias)
    lse = masked_logits(q, k, terms, layout.mask, case.cosine).logsumexp(-1)
    lse = lse.unflatten(0, (case.batch, -1))
    return lse.masked_fill(~real_rows(case)[:, None], torch.nan)


def cancelling(name: str, drawn: Drawn) -> float:
    """Largest sum of magnitudes, per head, in the gradient of what is one number per head: what
    cancels in it.

    name: "scale", or a factor of the epilogue.
    """
    case, spread = drawn.case, copy.copy(drawn)
    if name == "scale":
        spread.scale = drawn.scale.expand(case.offsets, -1)
        return specification(spread, torch.float64)["scale"].abs().sum(0).max().item()
    factor = getattr(drawn, name)[:, None]
    setattr(spread, name, factor.expand(case.batch, *case.grid, -1, case.head_dim))
    grads = specification(spread, torch.float64)[name]
    return grads.abs().sum((0, 1, 2, 4)).max().item()


def remainder(drawn: Drawn) -> float:
    """What float32 may leave of a gradient that cancels to 0, as where each row has one key: a
    rounding of the longest rows' products.
    """
    case = drawn.case
    qkv = drawn.qkv.double().unflatten(-1, (3, case.heads, -1))
    rows = qkv.norm(dim=-1).amax((0, 1, 2, 4))
    grads = drawn.grad_out.double().unflatten(-1, (case.heads, -1)).norm(dim=-1).max()
    q, k, v = (1.0, 1.0, rows[2]) if case.cosine else rows
    largest = max(1.0, drawn.scale.abs().max().item()) * max(1.0, q * k)
    return float(torch.finfo(torch.float32).eps * grads * v * largest)


def problems(results: dict[str, Tensor], drawn: Drawn) -> list[str]:
    """What errs by more than twice what PyTorch errs in the case's dtype, in norm or at the worst
    element.

    A scale that is one number per head has a gradient of as few numbers, where PyTorch's error can
    be small by luck: it may also err by a tenth of the dtype's rounding (half of float32's) of what
    cancels in it; so may the factors of an epilogue. PyTorch's worst error counts as half a unit in
    the last place of the largest element at least.
    """
    case = drawn.case
    exact = by_pytorch(drawn, torch.float64)
    plain = by_pytorch(drawn, case.dtype)
    ours = by_part(dict(results), case)
    found = []
    for name, want in exact.items():
        if name not in ours:
            continue
        norm_slack, worst_slack = _slack(name, want, drawn)
        norm, worst = distances(ours[name], want)
        norm_plain, worst_plain = distances(plain[name], want)
        worst_plain = max(worst_plain, rounding(want.abs().max().item(), ours[name].dtype))
        if not norm <= 2 * norm_plain + norm_slack:
            found.append(f"{name}: {norm:.2e} in norm, PyTorch {norm_plain:.2e}")
        if not worst <= 2 * worst_plain + worst_slack:
            found.append(f"{name}: {worst:.2e} at worst, PyTorch {worst_plain:.2e}")
    return found + _lse_problems(results["lse"], drawn)


def _slack(name: str, want: Tensor, drawn: Drawn) -> tuple[float, float]:
    """What a result may err beside PyTorch's own error, in norm and at the worst element."""
    case = drawn.case
    norm, worst = 1e-6 * want.norm().item(), 1e-6 * want.abs().max().item()
    if not want.any():
        norm, worst = want.numel() ** 0.5 * remainder(drawn), remainder(drawn)
    if (name == "scale" and case.scale == "one") or name in EPILOGUES[case.epilogue]:
        share = 0.5 if case.dtype == torch.float32 else 0.1
        luck = share * torch.finfo(case.dtype).eps * cancelling(name, drawn)
        norm, worst = norm + luck * case.heads**0.5, worst + luck
    return norm, worst


def _lse_problems(found: Tensor, drawn: Drawn) -> list[str]:
    lse = exact_lse(drawn)
    inside = ~lse.isnan()
    error = (found.double() - lse)[inside].abs().max().item()
    bound = 1e-5 * max(1.0, lse[inside].abs().max().item()) + cosine_slack(drawn)
    wrong = []
    if not error <= bound:
        wrong.append(f"lse: off by {error:.2e}, allowed {bound:.1e}")
    if not found[~inside].isnan().all():
        wrong.append("lse: written at padding")
    return wrong


def cosine_slack(drawn: Drawn) -> float:
    """What a log-sum-exp may err where q and k in 16 bits are rounded once more, after the division
    by their norms.
    """
    case: Case = drawn.case
    if not case.cosine or case.dtype == torch.float32:
        return 0.0
    return 2 * torch.finfo(case.dtype).eps * drawn.scale.abs().max().item()
