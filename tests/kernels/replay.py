"""Runs a compiled kernel of any kind (CPU, CUDA, emulated CUDA) on a case of `cases.py` and judges
what it returns.
"""

import ctypes
import functools
from unittest import mock

import torch
import torch.nn.functional as F

from kernels.window_attention import OffsetTerms, reference, window_layout
from tests.kernels.cases import Call, Case, Drawn, by_part, rounding, specification


class KernelError(RuntimeError):
    """The kernel returned a code other than 0, or wrote where it should not."""


def move(call: Call, device: str) -> Call:
    """Puts the tensors of a call on another device, in place."""
    for name, buffer in call.buffers.items():
        shape, margin = buffer.tensor.shape, (buffer.whole.numel() - buffer.tensor.numel()) // 2
        buffer.whole, buffer.before = buffer.whole.to(device), buffer.before.to(device)
        buffer.tensor = buffer.whole[margin : margin + shape.numel()].view(shape)
        setattr(call.args, name, buffer.tensor.data_ptr())
    return call


class Kernel:
    """forward and backward of a library that follows csrc/args.h. prefix: "wa_cpu", "wa_cuda" or
    "wa_emu".
    """

    def __init__(self, library: ctypes.CDLL, prefix: str):
        self.prefix, self.device = prefix, "cuda" if prefix == "wa_cuda" else "cpu"
        self.functions = {
            name: getattr(library, f"{prefix}_{name}")
            for name in ("forward", "backward", "workspace", "supports")
        }
        self.functions["workspace"].restype = ctypes.c_int64
        self.functions["supports"].restype = ctypes.c_char_p
        self.fault = getattr(library, "wa_emu_fault", None)

    def launch(self, name: str, call: Call) -> None:
        """One forward or backward on the current stream, with scratch of the size the kernel asks
        for.
        """
        call.give_workspace(
            self.functions["workspace"](ctypes.byref(call.args), int(name == "backward"))
        )
        move(call, self.device)
        stream = (
            [ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)]
            if self.device == "cuda"
            else []
        )
        code = self.functions[name](ctypes.byref(call.args), *stream)
        if code:
            words = f": {self.fault().decode()}" if self.fault else ""
            raise KernelError(f"{self.prefix}_{name} returned {code}{words} ({call.case})")

    def why_not(self, case: Case) -> str | None:
        """The kernel's own words on why it cannot do the case, or None."""
        words = self.functions["supports"](ctypes.byref(Call(Drawn(case)).args))
        return None if words is None else words.decode()

    def run(
        self, drawn: Drawn, gradients: tuple[str, ...] = ("qkv", "weight", "bias", "post")
    ) -> dict[str, torch.Tensor]:
        """{"out", "qkv", "weight", "bias", "post", "lse"}: the output, the gradients, the log sum
        exp, on the CPU.
        """
        call = Call(drawn, gradients)
        self.launch("forward", call)
        self.launch("backward", call)
        if self.device == "cuda":
            torch.cuda.synchronize()
        call.check_margins()
        return {
            name: t.cpu().clone()
            for name, t in {**call.results(), "lse": call.buffers["lse"].tensor}.items()
        }


def by_pytorch(drawn: Drawn, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The specification run in `dtype`. 1e-12, the bound of the norms, is 0 in half precision,
    where zeros (padding) would become NaN.
    """
    bounded = functools.partial(F.normalize, eps=6e-8 if dtype == torch.float16 else 1e-12)
    with mock.patch.object(reference.F, "normalize", bounded):
        return by_part(specification(drawn, dtype), drawn.case)


def exact_lse(drawn: Drawn) -> torch.Tensor:
    """(B, nW, heads, N) float64; NaN at padding."""
    case = drawn.case
    layout = window_layout(case.grid, case.window, case.shift, case.mask_value)
    q, k, _ = reference.split_windows(drawn.qkv.double(), layout, case.heads)
    if case.cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    terms = OffsetTerms(
        case.window, drawn.weight.double(), None if drawn.bias is None else drawn.bias.double()
    )
    logits = q @ k.mT * terms.dense("scale") + (0 if drawn.bias is None else terms.dense("bias"))
    lse = reference.add_mask(logits, layout.mask).logsumexp(-1).unflatten(0, (case.batch, -1))
    inside = (
        reference.split_windows(torch.ones(1, *case.grid, 3), layout, 1)[0][:, 0, :, 0] > 0
    )  # (nW, N)
    return lse.masked_fill(~inside[:, None], torch.nan)


def cancelling(drawn: Drawn) -> float:
    """Largest sum of magnitudes, per head, in the gradient of a weight that is one number: what
    cancels in it.
    """
    spread = Drawn(drawn.case)
    spread.weight = drawn.weight.expand(
        (2 * drawn.case.window[0] - 1) * (2 * drawn.case.window[1] - 1), -1
    )
    return specification(spread, torch.float64)["weight"].abs().sum(0).max().item()


def remainder(drawn: Drawn) -> float:
    """What float32 may leave of a gradient that cancels to 0, as where each row has one key: a
    rounding of the longest rows' products.
    """
    rows = (
        drawn.qkv.double().unflatten(-1, (3, drawn.case.heads, -1)).norm(dim=-1).amax((0, 1, 2, 4))
    )
    grads = drawn.grad_out.double().unflatten(-1, (drawn.case.heads, -1)).norm(dim=-1).max()
    q, k, v = (1.0, 1.0, rows[2]) if drawn.case.cosine else rows
    largest = max(1.0, drawn.weight.abs().max().item()) * max(1.0, q * k)
    return float(torch.finfo(torch.float32).eps * grads * v * largest)


def distances(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(Euclidean norm of the error, largest error); infinite where something is not a number."""
    if not torch.isfinite(found).all():
        return float("inf"), float("inf")
    difference = found.double() - exact.double()
    return difference.norm().item(), difference.abs().max().item()


def problems(results: dict[str, torch.Tensor], drawn: Drawn) -> list[str]:
    """What errs by more than twice what PyTorch errs in the case's dtype (style.md's rule), in norm
    or at the worst element.

    A weight that is one number per head has a gradient of as few numbers, where PyTorch's error can
    be small by luck: it may also err by a tenth of the dtype's rounding (half of float32's) of what
    cancels in it. PyTorch's worst error counts as half a unit in the last place of the largest
    element at least.
    """
    case = drawn.case
    exact, plain, ours = (
        by_part(specification(drawn, torch.float64), case),
        by_pytorch(drawn, case.dtype),
        by_part(dict(results), case),
    )
    found = []
    for name, want in exact.items():
        if name not in ours:
            continue
        norm_slack, worst_slack = 1e-6 * want.norm().item(), 1e-6 * want.abs().max().item()
        if not want.any():
            norm_slack, worst_slack = want.numel() ** 0.5 * remainder(drawn), remainder(drawn)
        if name == "weight" and case.weight == "one":
            luck = (
                (0.5 if case.dtype == torch.float32 else 0.1)
                * torch.finfo(case.dtype).eps
                * cancelling(drawn)
            )
            norm_slack, worst_slack = norm_slack + luck * case.heads**0.5, worst_slack + luck
        (norm, worst), (norm_plain, worst_plain) = (
            distances(ours[name], want),
            distances(plain[name], want),
        )
        worst_plain = max(worst_plain, rounding(want.abs().max().item(), ours[name].dtype))
        if not norm <= 2 * norm_plain + norm_slack:
            found.append(f"{name}: {norm:.2e} in norm, PyTorch {norm_plain:.2e}")
        if not worst <= 2 * worst_plain + worst_slack:
            found.append(f"{name}: {worst:.2e} at worst, PyTorch {worst_plain:.2e}")
    lse = exact_lse(drawn)
    inside = ~lse.isnan()
    error = (results["lse"].double() - lse)[inside].abs().max().item()
    bound = 1e-5 * max(1.0, lse[inside].abs().max().item())
    if (
        case.cosine and case.dtype != torch.float32
    ):  # q and k are rounded once more, after the division by their norms
        bound += 2 * torch.finfo(case.dtype).eps * drawn.weight.abs().max().item()
    if not error <= bound:
        found.append(f"lse: off by {error:.2e}, allowed {bound:.1e}")
    if not results["lse"][~inside].isnan().all():
        found.append("lse: written at padding")
    return found
