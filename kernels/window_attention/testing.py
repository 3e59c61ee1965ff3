"""Cases of window attention with their exact results, for tests and benchmarks of the kernels.

`Case` says what is computed, `Drawn` has its inputs, `specification` gives output and gradients in
any dtype. How a compiled kernel is called on a case: testing_call.py; how its results are judged:
testing_accuracy.py.
"""

import functools
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.window_attention import OffsetTerms, window_layout
from kernels.window_attention.plain import dropped_attention
from kernels.window_attention.reference import (
    masked_logits,
    merge_windows,
    softmax_attention,
    split_windows,
)

TABLES = ("scale", "bias", "post")
EPILOGUES = {"": (), "affine": ("alpha", "beta"), "exclusive": ("exclusion",)}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One call.

    window, windows: tokens of a window, and windows of the grid, down and across; `missing` tokens
        are cut off at the end of the grid.
    scale: "one" number a head, or a "table".
    magnitude: of q and k.
    ties: all q and k are equal.
    zero_rows: some tokens have q = k = 0.
    tiny_values: some tokens have |v|^2 < 1e-8, some v = 0.
    epilogue: "affine", "exclusive" or none (csrc/args.h).
    lse: a gradient of the log-sum-exp comes in beside that of the output.
    """

    window: tuple[int, int] = (7, 7)
    windows: tuple[int, int] = (2, 2)
    missing: tuple[int, int] = (0, 0)
    shift: tuple[int, int] = (0, 0)
    batch: int = 1
    heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    scale: str = "one"
    bias: bool = True
    post: bool = False
    cosine: bool = False
    dropout: float = 0.0
    mask_value: float = -100.0
    magnitude: float = 1.0
    ties: bool = False
    zero_rows: bool = False
    tiny_values: bool = False
    epilogue: str = ""
    lse: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (rows, columns)."""
        sides = zip(self.window, self.windows, self.missing, strict=True)
        return tuple(side * count - cut for side, count, cut in sides)

    @property
    def offsets(self) -> int:
        """Rows of a table, (2 Mh - 1)(2 Mw - 1)."""
        return (2 * self.window[0] - 1) * (2 * self.window[1] - 1)

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


class Drawn:
    """The inputs of a case: qkv (B, H, W, 3C), grad_out (B, H, W, C), tables, seed; alpha, beta and
    exclusion, (heads,) or None; grad_lse (B, nW, heads, N), NaN at padding, or None.
    """

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(
            1000 * case.window[0] + 100 * case.heads + case.batch
        )

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        c = case
        self.case = case
        qkv = normal(c.batch, *c.grid, 3, c.heads, c.head_dim)
        qkv[:, :, :, :2] *= c.magnitude
        if c.ties:  # every logit of a row is exactly the same before the bias
            qkv[:, :, :, :2] = qkv[:, :1, :1, :2]
        if c.zero_rows:
            qkv[:, ::3, ::2, :2] = 0
        if c.tiny_values:
            qkv[:, ::2, ::3, 2] *= 1e-5
            qkv[:, ::3, ::2, 2] = 0
        self.qkv = qkv.flatten(3).to(c.dtype)
        self.grad_out = normal(c.batch, *c.grid, c.heads * c.head_dim).to(c.dtype)
        usual = 8.0 if c.cosine else c.head_dim**-0.5
        rows = c.offsets if c.scale == "table" else 1
        self.scale = usual * (1 + 0.3 * normal(rows, c.heads))
        self.bias = 0.5 * normal(c.offsets, c.heads) if c.bias else None
        self.post = 1 + 0.3 * normal(c.offsets, c.heads) if c.post else None
        self.seed = torch.tensor([0x123456789ABCDEF])
        named = EPILOGUES[c.epilogue]
        self.alpha = 0.5 * normal(c.heads) if "alpha" in named else None
        self.beta = 1 + 0.3 * normal(c.heads) if "beta" in named else None
        self.exclusion = 1 + 0.3 * normal(c.heads) if "exclusion" in named else None
        self.grad_lse = None
        if c.lse:
            real = real_rows(c)
            rows = normal(c.batch, len(real), c.heads, real.shape[1])
            self.grad_lse = rows.masked_fill(~real[:, None], torch.nan)

    @functools.cached_property
    def expected(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the specification gives in float64, and what it gives in the case's own dtype; by
        part.
        """
        return tuple(by_pytorch(self, dtype) for dtype in (torch.float64, self.case.dtype))


def real_rows(case: Case) -> Tensor:
    """(nW, N) bool: which queries of each window are tokens of the grid, not padding."""
    layout = window_layout(case.grid, case.window, case.shift, case.mask_value)
    return split_windows(torch.ones(1, *case.grid, 3), layout, 1)[0][:, 0, :, 0] > 0


def epilogue_result(y: Tensor, v: Tensor, given: dict[str, Tensor], heads: int) -> Tensor:
    """The epilogue of csrc/args.h in float32 or wider: y and v (B, H, W, C) -> like y.

    given: alpha and beta, or exclusion: (heads,), or a value for each element.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    own, out = (x.to(wide).unflatten(-1, (heads, -1)) for x in (v, y))
    factor = {name: x[:, None] if x.dim() == 1 else x for name, x in given.items()}
    if "alpha" in given:
        out = factor["alpha"] * own + factor["beta"] * out
    else:
        ratio = (out * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp(1e-8)
        out = out - factor["exclusion"] * ratio * own
    return out.flatten(3).to(y.dtype)


def specification(drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients by the specification in `dtype`, tables in float32 or wider: {"out",
    "qkv", "scale", "bias", "post"} and the factors of the epilogue.
    """
    c = drawn.case
    wide = torch.promote_types(dtype, torch.float32)
    layout = window_layout(c.grid, c.window, c.shift, c.mask_value)
    qkv = drawn.qkv.to(dtype, copy=True).requires_grad_()
    given = {}
    for name in (*TABLES, *EPILOGUES[c.epilogue]):
        table = getattr(drawn, name)
        given[name] = None if table is None else table.to(wide, copy=True).requires_grad_()
    terms = OffsetTerms(c.window, *(given[name] for name in TABLES))
    q, k, v = split_windows(qkv, layout, c.heads)
    if not c.dropout:
        y = softmax_attention(q, k, v, terms, layout.mask, c.cosine)
    else:
        y = dropped_attention(q, k, v, terms, layout.mask, c.cosine, drawn.seed, c.dropout)
    out = merge_windows(y, layout)
    if c.epilogue:
        factors = {name: given[name] for name in EPILOGUES[c.epilogue]}
        out = epilogue_result(out, qkv.chunk(3, -1)[2], factors, c.heads)
    results, grads = [out], [drawn.grad_out.to(dtype)]
    if c.lse:
        results.append(masked_logits(q, k, terms, layout.mask, c.cosine).logsumexp(-1))
        grads.append(drawn.grad_lse.nan_to_num(0).flatten(0, 1).to(wide))
    torch.autograd.backward(results, grads)
    found = {"out": out.detach(), "qkv": qkv.grad}
    found.update({name: t.grad for name, t in given.items() if t is not None})
    return found


def by_part(found: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """The gradient of qkv split into those of q, k and v, everything else as it is."""
    parts = dict(found)
    q, k, v = parts.pop("qkv").unflatten(-1, (3, case.heads, case.head_dim)).unbind(-3)
    return {**parts, "q": q, "k": k, "v": v}


def by_pytorch(drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    """The specification run in `dtype`, by part."""
    return by_part(specification(drawn, dtype), drawn.case)


TABLE, V2 = {"scale": "table"}, {"cosine": True}
CRPW_V2 = {**TABLE, **V2}

# Windows of up to 64 tokens in 16 bits: csrc/cuda/small*.
SMALL_CASES = [
    # the shapes of Swin (7 x 7) and SwinV2 (8 x 8), lean kernels
    Case(),
    Case(dtype=F16),
    Case(shift=(3, 3)),
    Case(**TABLE, shift=(3, 3)),
    Case(**TABLE, dtype=F16),
    Case(**V2),
    Case(**CRPW_V2, shift=(3, 3)),
    Case(**V2, dtype=F16, **TABLE),
    Case(window=(8, 8)),
    Case(window=(8, 8), **TABLE, shift=(4, 4)),
    Case(window=(8, 8), **V2, shift=(4, 4)),
    Case(window=(8, 8), **CRPW_V2, dtype=F16, shift=(4, 4)),
    Case(bias=False),
    Case(bias=False, **TABLE, **V2),
    # rectangular windows and grids, padding, edges and corners, other mask values
    Case(window=(7, 8), windows=(1, 3), shift=(3, 4)),
    Case(window=(8, 7), windows=(3, 1), shift=(0, 2), **TABLE),
    Case(missing=(3, 2), shift=(3, 3)),
    Case(missing=(6, 0), shift=(0, 3), **V2),
    Case(window=(8, 8), missing=(1, 7), shift=(4, 1)),
    Case(missing=(4, 4), mask_value=-5.0, shift=(2, 5), **TABLE),
    Case(windows=(1, 1), shift=(3, 3)),
    Case(windows=(1, 1), missing=(2, 3)),
    # other areas and head dims, general kernels
    Case(window=(4, 4), shift=(1, 2)),
    Case(window=(2, 3), dtype=F16, **V2),
    Case(window=(4, 8), **TABLE),
    Case(window=(3, 11), missing=(1, 4), shift=(2, 5)),
    Case(window=(6, 6), **CRPW_V2),
    Case(window=(2, 24), shift=(1, 12)),
    Case(window=(24, 2), windows=(1, 2), **TABLE),
    Case(window=(1, 17), shift=(0, 4)),
    Case(window=(6, 8), shift=(3, 4)),
    Case(head_dim=16, **TABLE, shift=(3, 3)),
    Case(head_dim=64, dtype=F16),
    Case(head_dim=64, **CRPW_V2, missing=(2, 2)),
    Case(head_dim=16, window=(4, 4), **V2),
    Case(head_dim=64, window=(5, 6), **TABLE),
    # factors after the softmax, and dropout
    Case(post=True),
    Case(post=True, shift=(3, 3), **TABLE, **V2),
    Case(dropout=0.1),
    Case(dropout=0.5, window=(8, 8), shift=(4, 4)),
    Case(window=(3, 5), dtype=F16, **TABLE, post=True, dropout=0.2, missing=(1, 2), shift=(1, 2)),
    Case(head_dim=16, post=True, dropout=0.3, **V2),
    Case(head_dim=64, post=True, dropout=0.9, batch=2),
    # heads and batch
    Case(heads=1, batch=3),
    Case(heads=3, **TABLE, windows=(1, 2)),
    Case(heads=48, windows=(1, 1), window=(4, 4)),
    # large logits
    Case(magnitude=4.0),
    Case(magnitude=10.0, dtype=F16),
    Case(**V2, magnitude=100.0),
    Case(magnitude=6.0, **TABLE, shift=(3, 3)),
]

# Larger windows, and float32: csrc/cuda/tiled*.
TILED_CASES = [
    Case((8, 12), heads=3, scale="table"),
    Case((12, 12), (1, 2), missing=(0, 5), shift=(6, 6), scale="table", dtype=F16),
    Case((12, 12), (2, 1), shift=(6, 0), cosine=True, batch=2),
    Case((9, 11), missing=(3, 4), shift=(4, 5), scale="table", post=True, dropout=0.2),
    Case((9, 11), (1, 1), missing=(2, 0), bias=False, dtype=F16, zero_rows=True, cosine=True),
    Case((16, 16), (1, 1), heads=1, scale="table", head_dim=64, dtype=F16),
    Case((16, 16), (1, 2), heads=1, shift=(8, 8), head_dim=16, magnitude=3.0),
    Case((5, 24), (1, 1), heads=2, post=True, cosine=True, head_dim=64),
    Case((24, 24), (1, 1), heads=1, scale="table"),
    Case((7, 7), missing=(0, 2), shift=(3, 3), scale="table", dtype=F32),
    Case((8, 8), cosine=True, shift=(4, 4), dropout=0.1, dtype=F32, head_dim=16),
    Case((12, 12), (1, 1), scale="table", post=True, dtype=F32, ties=True),
    Case((16, 16), (1, 1), heads=1, dtype=F32, head_dim=64),
    Case((1, 70), (2, 1), heads=1, scale="table", dtype=F32),
]

WINDOWS = [
    (3, 3), (7, 7), (8, 8), (8, 12), (9, 11), (10, 13), (12, 12), (5, 24), (1, 70), (16, 16),
    (20, 20), (24, 24),
]  # fmt: skip
SEVERAL = [(1, 1), (1, 2), (2, 2), (3, 1)]


def draw_case(source: random.Random) -> Case:
    """A case of no particular regularity."""
    window = source.choice(WINDOWS)
    windows = (1, 1) if window[0] * window[1] > 300 else source.choice(SEVERAL)
    return Case(
        window,
        windows,
        missing=tuple(min(side - 1, source.choice([0, 0, 1, side - 1])) for side in window),
        shift=tuple(source.choice([0, side // 2, side - 1]) for side in window),
        batch=source.choice([1, 2]),
        heads=source.choice([1, 2, 3]),
        head_dim=source.choice([16, 32, 64]),
        dtype=source.choice([F32, F16, BF16]),
        scale=source.choice(["one", "table"]),
        bias=source.random() < 0.7,
        post=source.random() < 0.3,
        cosine=source.random() < 0.4,
        dropout=source.choice([0.0, 0.0, 0.2]),
        magnitude=source.choice([0.5, 1.0, 2.0]),
        zero_rows=source.random() < 0.2,
    )
