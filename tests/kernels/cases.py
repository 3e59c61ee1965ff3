"""Cases of window attention, their exact result, and the C structure with which a compiled kernel
is called on them.

`Case` says what is computed, `Drawn` holds its inputs, `specification` gives output and gradients
in any dtype, `Call` lays the tensors out for the C interface (csrc/args.h): each between margins of
NaN, so that what is read out of place shows in the result, and what is written out of place in the
margins.
"""

import ctypes
import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.window_attention import OffsetTerms, window_layout
from kernels.window_attention.reference import merge_windows, softmax_attention, split_windows

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MARGIN = 64  # elements before and after each tensor


@dataclass(frozen=True)
class Case:
    """One call. weight: "one" number a head, or a "table". scale: of q and k. zero_rows: some
    tokens have q = k = 0.
    """

    window: tuple[int, int] = (7, 7)
    windows: tuple[int, int] = (2, 2)  # down and across, the last cut short by `missing`
    missing: tuple[int, int] = (0, 0)
    shift: tuple[int, int] = (0, 0)
    batch: int = 1
    heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    weight: str = "one"
    bias: bool = True
    post: bool = False
    cosine: bool = False
    dropout: float = 0.0
    mask_value: float = -100.0
    scale: float = 1.0
    ties: bool = False
    zero_rows: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (rows, columns)."""
        return tuple(
            side * count - cut
            for side, count, cut in zip(self.window, self.windows, self.missing, strict=True)
        )

    def __str__(self) -> str:
        default = Case()
        words = [f"{self.window[0]}x{self.window[1]}"]
        for name, value in vars(self).items():
            if name != "window" and value != getattr(default, name):
                words.append(f"{name}={str(value).replace('torch.', '').replace(' ', '')}")
        return "-".join(words)

    def but(self, **changes) -> "Case":
        """A copy with some fields exchanged."""
        return replace(self, **changes)


def keep_mask(seed: int, rows: int, keys: int, dropout: float) -> Tensor:
    """(rows, keys) float64 in {0, 1 / (1 - dropout)}: wa_keep of csrc/args.h for rows 0 .. rows -
    1.
    """
    wrap = 1 << 64

    def signed(x: int) -> int:
        return (x % wrap + wrap // 2) % wrap - wrap // 2

    def shifted(x: Tensor, by: int) -> Tensor:  # logical shift of int64
        return (x >> by) & ((1 << (64 - by)) - 1)

    row, key = torch.arange(rows)[:, None], torch.arange(keys)
    x = (row * signed(0x9E3779B97F4A7C15) + key * signed(0xD1B54A32D192ED03)) ^ seed
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ shifted(x, 33)) * signed(factor)
    x = shifted(x ^ shifted(x, 33), 32)
    threshold = int(float(torch.tensor(dropout)) * 2**32)  # float32, as in the structure
    return (x >= threshold).double() / (1 - dropout)


class Drawn:
    """The inputs of a case: qkv (B, H, W, 3C), grad_out (B, H, W, C), tables, seed."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(
            1000 * case.window[0] + 100 * case.heads + case.batch
        )

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        c, (mh, mw) = case, case.window
        offsets, width = (2 * mh - 1) * (2 * mw - 1), case.heads * case.head_dim
        self.case = case
        qkv = normal(c.batch, *c.grid, 3, c.heads, c.head_dim)
        qkv[:, :, :, :2] *= c.scale
        if (
            c.ties
        ):  # equal keys and equal queries: every logit of a row is exactly the same before the bias
            qkv[:, :, :, :2] = qkv[:, :1, :1, :2]
        if c.zero_rows:
            qkv[:, ::3, ::2, :2] = 0
        self.qkv = qkv.flatten(3).to(c.dtype)
        self.grad_out = normal(c.batch, *c.grid, width).to(c.dtype)
        factor = 8.0 if c.cosine else c.head_dim**-0.5
        self.weight = factor * (1 + 0.3 * normal(offsets if c.weight == "table" else 1, c.heads))
        self.bias = 0.5 * normal(offsets, c.heads) if c.bias else None
        self.post = 1 + 0.3 * normal(offsets, c.heads) if c.post else None
        self.seed = torch.tensor([0x123456789ABCDEF])

    @functools.cached_property
    def expected(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the specification gives in float64, and what it gives in the case's own dtype; by
        part.
        """
        return tuple(
            by_part(specification(self, dtype), self.case)
            for dtype in (torch.float64, self.case.dtype)
        )


def specification(drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients by the reference in `dtype`, tables in float32 or wider: {"out", "qkv",
    "weight", "bias", "post"}.
    """
    c = drawn.case
    wide = torch.promote_types(dtype, torch.float32)
    layout = window_layout(c.grid, c.window, c.shift, c.mask_value)
    qkv = drawn.qkv.to(dtype, copy=True).requires_grad_()
    tables = {name: getattr(drawn, name) for name in ("weight", "bias", "post")}
    tables = {
        name: None if t is None else t.to(wide, copy=True).requires_grad_()
        for name, t in tables.items()
    }
    area = c.window[0] * c.window[1]
    normalize = F.normalize
    if dtype == torch.float16:  # its floor of 1e-12 is 0 there, and padding would be 0 / 0
        F.normalize = functools.partial(normalize, eps=6e-8)
    if not c.dropout:
        q, k, v = split_windows(qkv, layout, c.heads)
        y = softmax_attention(q, k, v, OffsetTerms(c.window, **tables), layout.mask, c.cosine)
    else:
        rows = c.batch * layout.num_windows * c.heads * area
        keep = keep_mask(int(drawn.seed), rows, area, c.dropout).view(-1, c.heads, area, area)
        # dropout of a map is a weight after the softmax: the identity as v gives the map
        q, k, v = split_windows(qkv, layout, c.heads)
        eye = torch.eye(area, dtype=dtype).expand(*q.shape[:2], area, area)
        attn = softmax_attention(q, k, eye, OffsetTerms(c.window, **tables), layout.mask, c.cosine)
        y = (attn * keep.to(dtype)) @ v
    F.normalize = normalize
    out = merge_windows(y, layout)
    out.backward(drawn.grad_out.to(dtype))
    found = {"out": out.detach(), "qkv": qkv.grad}
    found.update({name: t.grad for name, t in tables.items() if t is not None})
    return found


def by_part(found: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """The gradient of qkv split into those of q, k and v, everything else as it is."""
    parts = dict(found)
    q, k, v = parts.pop("qkv").unflatten(-1, (3, case.heads, case.head_dim)).unbind(-3)
    return {**parts, "q": q, "k": k, "v": v}


class Arguments(ctypes.Structure):
    """WindowAttentionArgs of csrc/args.h."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                "qkv weight bias post seed out lse"
                " grad_out grad_qkv grad_weight grad_bias grad_post workspace"
            ).split()
        ]
        + [(name, ctypes.c_int32) for name in "batch height width heads head_dim".split()]
        + [("window", ctypes.c_int32 * 2), ("shift", ctypes.c_int32 * 2)]
        + [(name, ctypes.c_int32) for name in "weight_rows cosine dtype threads".split()]
        + [("mask_value", ctypes.c_float), ("dropout", ctypes.c_float)]
    )


class Guarded:
    """A tensor in the middle of a larger one of NaN (integers: of the smallest number)."""

    def __init__(self, shape, dtype: torch.dtype, content: Tensor | None = None):
        count = torch.Size(shape).numel()
        self.whole = torch.full(
            (count + 2 * MARGIN,),
            torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min,
            dtype=dtype,
        )
        self.tensor = self.whole[MARGIN : MARGIN + count].view(shape)
        if content is not None:
            self.tensor.copy_(content)
        self.before = self.whole.clone()

    def intact(self) -> bool:
        """Whether the margins still hold what they held."""
        margins = [(t[:MARGIN], t[-MARGIN:]) for t in (self.whole, self.before)]
        return all(
            torch.equal(
                a.nan_to_num(-7) if a.is_floating_point() else a,
                b.nan_to_num(-7) if b.is_floating_point() else b,
            )
            for a, b in zip(*margins, strict=True)
        )


class Call:
    """The tensors of a case laid out for the C interface. gradients: names among qkv, weight, bias,
    post that the backward is to give.
    """

    def __init__(
        self,
        drawn: Drawn,
        gradients: tuple[str, ...] = ("qkv", "weight", "bias", "post"),
        lse: bool = True,
    ):
        c = drawn.case
        self.case = c
        layout = window_layout(c.grid, c.window, c.shift, c.mask_value)
        area = c.window[0] * c.window[1]
        self.buffers = {
            "qkv": Guarded(drawn.qkv.shape, c.dtype, drawn.qkv),
            "out": Guarded(drawn.grad_out.shape, c.dtype),
            "grad_out": Guarded(drawn.grad_out.shape, c.dtype, drawn.grad_out),
        }
        for name in ("weight", "bias", "post"):
            if (table := getattr(drawn, name)) is not None:
                self.buffers[name] = Guarded(table.shape, torch.float32, table)
        if c.dropout:
            self.buffers["seed"] = Guarded((1,), torch.int64, drawn.seed)
        if lse:
            self.buffers["lse"] = Guarded(
                (c.batch, layout.num_windows, c.heads, area), torch.float32
            )
        for name in gradients:
            if name in self.buffers:
                held = self.buffers[name].tensor
                self.buffers["grad_" + name] = Guarded(held.shape, held.dtype)
        self.args = Arguments(
            batch=c.batch,
            height=c.grid[0],
            width=c.grid[1],
            heads=c.heads,
            head_dim=c.head_dim,
            window=c.window,
            shift=c.shift,
            weight_rows=len(drawn.weight),
            cosine=int(c.cosine),
            dtype=DTYPES[c.dtype],
            threads=1,
            mask_value=c.mask_value,
            dropout=c.dropout,
        )
        for name, buffer in self.buffers.items():
            setattr(self.args, name, buffer.tensor.data_ptr())

    def give_workspace(self, size: int) -> None:
        """Scratch of `size` bytes, filled with NaN."""
        if size:
            self.buffers["workspace"] = Guarded((-(-size // 4),), torch.float32)
            self.args.workspace = self.buffers["workspace"].tensor.data_ptr()

    def results(self) -> dict[str, Tensor]:
        """{"out", "qkv", "weight", "bias", "post"} as far as they were asked for: the output and
        the gradients.
        """
        named = {
            "out": "out",
            "grad_qkv": "qkv",
            "grad_weight": "weight",
            "grad_bias": "bias",
            "grad_post": "post",
        }
        return {named[k]: b.tensor for k, b in self.buffers.items() if k in named}

    def check_margins(self) -> None:
        """Fails where something was written around a tensor, or an input was changed."""
        for name, buffer in self.buffers.items():
            assert buffer.intact(), f"written out of bounds around {name}"
            if name in ("qkv", "weight", "bias", "post", "seed", "grad_out"):
                assert torch.equal(buffer.whole[MARGIN:-MARGIN], buffer.before[MARGIN:-MARGIN]), (
                    f"input {name} was changed"
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


def check_accuracy(
    found: dict[str, Tensor], drawn: Drawn, factor: float = 2.0, only: str = ""
) -> None:
    """Each result errs at most `factor` times as much as the specification run in the case's own
    dtype, in norm and in the worst element.

    Storing the exact result in that dtype may cost half a unit in the last place of the largest
    element; where the specification's worst element is closer, it was lucky, and that half unit is
    the yardstick. only: names of results, separated by spaces.
    """
    c = drawn.case
    exact, plain = drawn.expected
    ours = by_part(found, c)
    for name in only.split() or ours:
        assert torch.isfinite(ours[name]).all(), f"{name} is not finite ({c})"
        assert torch.isfinite(plain[name]).all(), f"{name} is no yardstick ({c})"
        size, norm = exact[name].abs().max().item(), exact[name].norm().item()
        error, worst = distances(ours[name], exact[name])
        error_plain, worst_plain = distances(plain[name], exact[name])
        assert error <= factor * error_plain + 1e-6 * norm, (
            f"{name}: error {error:.2e} in norm, PyTorch's is {error_plain:.2e} ({c})"
        )
        worst_plain = max(worst_plain, rounding(size, ours[name].dtype))
        assert worst <= factor * worst_plain + 1e-6 * size, (
            f"{name}: worst element {worst:.2e} off, PyTorch's {worst_plain:.2e} ({c})"
        )
