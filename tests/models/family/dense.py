"""Attention written down once more, for tests of modifiers: one float64 map over the whole grid,
from the definitions and not from the product's index code.

`Dense` gives what a formula is made of; `compare` and `compare_fused` judge a module by it.
Notation: L tokens of an image (class tokens first), H heads of D channels, N tokens of a window.
"""

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from kernels.window_attention import WindowLayout, window_layout
from models.attention import (
    AttentionSpec,
    Geometry,
    GlobalAttention,
    WindowAttention,
    WindowAttentionV2,
)

Size = tuple[int, int]
KINDS = {"swin": WindowAttention, "swinv2": WindowAttentionV2, "vit": GlobalAttention}
EXACT = 1e-10  # error of float64 arithmetic in another order, over the largest number


@dataclass(frozen=True)
class Place:
    """Where a module stands: `kind` of attention, the grid, its windows and what is in front."""

    kind: str
    grid: Size
    window: Size
    shift: Size = (0, 0)
    prefix: int = 0

    @property
    def layout(self) -> WindowLayout | None:
        """What the module is called with; None for global attention."""
        return None if self.kind == "vit" else window_layout(self.grid, self.window, self.shift)

    def attention(self, *modifiers: str, seed: int = 0, dim: int = 16, heads: int = 2) -> nn.Module:
        """A module with random parameters, biases and those of modifiers included."""
        geometry = Geometry(dim, heads, self.window, prefix=self.prefix)
        attention = KINDS[self.kind](geometry, AttentionSpec(modifiers))
        attention.initialise_modifiers("test")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in attention.named_parameters():
                start = parameter if name.endswith("logit_scale") else 0
                random = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(start + 0.3 * random)
        return attention

    def x(self, batch: int = 2, dim: int = 16, seed: int = 1) -> Tensor:
        """Random input in the module's shape, (B, H, W, C) or (B, L, C)."""
        shape = self.grid if self.layout else (self.prefix + math.prod(self.grid),)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *shape, dim, generator=generator)

    def __str__(self) -> str:
        words = [self.kind, "{}x{}".format(*self.grid)]
        if self.grid != self.window:
            words.append("window_{}x{}".format(*self.window))
        words += ["shifted"] * any(self.shift) + ["class_token"] * bool(self.prefix)
        padded = any(length % side for length, side in zip(self.grid, self.window, strict=True))
        return "-".join(words + ["padded"] * padded)


def cases(*kinds: str) -> list[Place]:
    """Plain, shifted, padded, padded and shifted, rectangular, with a class token; by default of
    all kinds.
    """
    windows = [
        Place("swin", (8, 8), (4, 4)),
        Place("swin", (8, 8), (4, 4), (2, 2)),
        Place("swin", (6, 6), (4, 4)),
        Place("swin", (6, 6), (4, 4), (2, 2)),
        Place("swin", (5, 7), (2, 3), (1, 1)),
    ]
    places = windows + [replace(place, kind="swinv2") for place in windows]
    places += [
        Place("vit", (3, 4), (3, 4)),
        Place("vit", (3, 4), (3, 4), prefix=1),
    ]
    return [place for place in places if not kinds or place.kind in kinds]


def lone_cases(*kinds: str) -> list[Place]:
    """A token alone in its window, beside padding; the same shifted; alone in its region, beside
    tokens that the mask forbids. By default Swin and SwinV2.
    """
    return [
        Place(kind, (8, 8), (side, side), (by, by))
        for kind in kinds or ("swin", "swinv2")
        for side, by in ((7, 0), (7, 1), (4, 1))
    ]


def in_tiers(places: list[Place]) -> list:
    """Places as parameters: SwinV2's are slow ones, but for the padded and shifted."""
    quick = [p for p in places if p.kind != "swinv2" or (p.grid, p.shift) == ((6, 6), (2, 2))]
    marks = [() if place in quick else pytest.mark.slow for place in places]
    return [pytest.param(p, marks=m, id=str(p)) for p, m in zip(places, marks, strict=True)]


def visible(grid: Size, window: Size, shift: Size = (0, 0)) -> Tensor:
    """(L, L) bool, L = rows * columns: pairs of tokens that attend to each other.

    Along each axis the padded grid is rolled back by `shift` and cut into windows. Two tokens must
    lie in the same window, and both or neither must have come round from the front.
    """
    pairs = torch.ones(1, 1, dtype=torch.bool)
    for length, side, by in zip(grid, window, shift, strict=True):
        padded = -(-length // side) * side
        place = torch.arange(length)
        number, round_it_came = (place - by) % padded // side, place < by
        same = number[:, None] == number
        pairs = torch.kron(pairs, same & (round_it_came[:, None] == round_it_came))
    return pairs


class Dense:
    """What the attention of a module is made of, in the dtype of its parameters (float64).

    Args:
        attention: WindowAttention, WindowAttentionV2 or GlobalAttention, best from `exact`. Its
            parameters are read, it is not called. Projection and token modifiers are not applied.
        x, layout: what the module is called with.
    Attributes, all differentiable in the module's parameters and in x:
        x (B, L, C), q, k, v (B, H, L, D); logits and A (B, H, L, L) of the plain module, A exactly
            0 where not visible; y = A v (B, H, L, D); lse (B, H, L), log of the sum of
            exp(logits).
        visible (L, L) bool; count (L, 1), how many a token sees, itself included; U (L, L) =
            visible / count.
        offset (L, L, 2), (row, column) of the query minus that of the key; on_grid (L, L) bool,
            pairs without a class token; own (L, L), 1 at a grid token's pair with itself.
    """

    def __init__(self, attention: nn.Module, x: Tensor, layout: WindowLayout | None = None):
        self.attention = attention
        self.shape = x.shape[:-1]
        self.heads = attention.num_heads
        self.x = x.flatten(1, -2)
        prefix = 0 if layout else attention.geometry.prefix
        self.grid = layout.grid if layout else attention.window_size
        seen = visible(layout.grid, layout.window, layout.shift) if layout else None
        length = self.x.shape[1]
        self.visible = torch.ones(length, length, dtype=torch.bool) if seen is None else seen
        self.count = self.visible.sum(1, keepdim=True).to(x.dtype)
        self.U = self.visible / self.count
        self._place(prefix, length)
        qkv = self.x @ attention.qkv.weight.T + self._bias()
        parts = qkv.unflatten(-1, (3, self.heads, -1)).movedim(1, -2)  # (B, 3, H, L, D)
        self.q, self.k, self.v = parts.unbind(1)
        self.logits = self.logits_of(self.q, self.k)

    def _place(self, prefix: int, length: int) -> None:
        rows, columns = torch.meshgrid(*map(torch.arange, self.grid), indexing="ij")
        place = torch.zeros(length, 2, dtype=torch.long)
        place[prefix:] = torch.stack([rows.flatten(), columns.flatten()], 1)
        self.offset = place[:, None] - place
        patch = torch.arange(length) >= prefix
        self.on_grid = patch[:, None] & patch
        self.own = (torch.eye(length, dtype=torch.bool) & self.on_grid).to(self.x.dtype)

    def _bias(self) -> Tensor:
        if isinstance(self.attention, WindowAttentionV2):
            q_bias, v_bias = self.attention.q_bias, self.attention.v_bias
            return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        return self.attention.qkv.bias

    @property
    def scale(self) -> Tensor:
        """What multiplies q kᵀ, (H, 1, 1)."""
        if isinstance(self.attention, WindowAttentionV2):
            return self.attention.logit_scale.clamp(max=math.log(100)).exp()
        return self.attention.uniform_scale.view(-1, 1, 1)

    @property
    def bias(self) -> Tensor:
        """What is added, (H, L, L), 0 at pairs of a class token."""
        attention = self.attention
        if isinstance(attention, GlobalAttention):
            return self.x.new_zeros(self.heads, *self.visible.shape)
        if isinstance(attention, WindowAttention):
            return self.by_offset(attention.relative_position_bias_table)
        side = torch.tensor(attention.window_size)
        ratio = self.offset.to(self.x.dtype) * 8 / (side - 1).clamp(min=1)
        coordinates = ratio.sign() * (1 + ratio.abs()).log2() / 3
        return (16 * torch.sigmoid(attention.cpb_mlp(coordinates))).movedim(-1, 0)

    def by_offset(self, table: Tensor, elsewhere: float = 0.0) -> Tensor:
        """A table over offsets (T, H) at each pair, (H, L, L); `elsewhere` at pairs that are not
        visible or have a class token.
        """
        rows, columns = self.attention.window_size
        there = self.visible & self.on_grid
        line = (self.offset[..., 0] + rows - 1) * (2 * columns - 1)
        line = line + self.offset[..., 1] + columns - 1
        values = table[torch.where(there, line, 0)]  # (L, L, H)
        return torch.where(there[..., None], values, elsewhere).movedim(-1, 0)

    def logits_of(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled and biased logits (B, H, L, L) of other q and k (B, H, L, D)."""
        if isinstance(self.attention, WindowAttentionV2):
            q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
        return q @ k.mT * self.scale + self.bias

    def softmax(self, logits: Tensor) -> Tensor:
        """Over the visible pairs; exactly 0 elsewhere."""
        return logits.masked_fill(~self.visible, -math.inf).softmax(-1)

    @property
    def A(self) -> Tensor:  # noqa: N802
        """The plain map."""
        return self.softmax(self.logits)

    @property
    def y(self) -> Tensor:
        """What the heads of the plain module give."""
        return self.A @ self.v

    @property
    def lse(self) -> Tensor:
        """log sum_j exp(logits_ij) over the visible j."""
        return self.logits.masked_fill(~self.visible, -math.inf).logsumexp(-1)

    def modifier(self, name: str) -> nn.Module:
        """The module's modifier of that name, whose parameters a formula reads."""
        return self.attention.modifiers[name]

    def merged(self, y: Tensor) -> Tensor:
        """Heads side by side: (B, H, L, D) -> (B, L, H D)."""
        return y.transpose(1, 2).flatten(2)

    def result(self, y: Tensor) -> Tensor:
        """The module's output for what its heads give, (B, H, L, D) or (B, L, H D)."""
        y = self.merged(y) if y.dim() == 4 else y
        proj = self.attention.proj
        return (y @ proj.weight.T + proj.bias).view(*self.shape, -1)


Formula = Callable[[Dense], Tensor]


def plain(dense: Dense) -> Tensor:
    """The formula without any modifier."""
    return dense.y


def exact(attention: nn.Module) -> nn.Module:
    """A float64 copy, with the constants that float32 rounded formed anew."""
    attention = copy.deepcopy(attention).double()
    if isinstance(attention, WindowAttentionV2):
        rows, columns = attention.window_size
        down = torch.arange(1 - rows, rows).double() / max(rows - 1, 1)
        across = torch.arange(1 - columns, columns).double() / max(columns - 1, 1)
        ratio = 8 * torch.stack(torch.meshgrid(down, across, indexing="ij"), -1)
        attention.relative_coords_table = (ratio.sign() * (1 + ratio.abs()).log2() / 3)[None]
    return attention


def compare(
    attention: nn.Module,
    x: Tensor,
    layout: WindowLayout | None,
    formula: Formula,
    tolerance: float = EXACT,
) -> None:
    """Asserts that the module's output and its gradients by all parameters and x are those of
    `formula` in float64.

    formula: Dense -> what the heads give, (B, H, L, D) or (B, L, H D).
    tolerance: of the largest difference over the largest number of each tensor.
    """
    attention = exact(attention)
    expected = _by_formula(attention, x, layout, formula)
    for name, found in _by_module(attention, x, layout).items():
        error = distance(found, expected[name])
        assert error <= tolerance, f"{name}: {error:.1e}"


def compare_fused(
    attention: nn.Module, x: Tensor, layout: WindowLayout | None, formula: Formula
) -> None:
    """Asserts that the fused kernel in float32 is at most twice as far from `formula` in float64 as
    the plain float32 operations are. The kernel takes no class token.
    """
    expected = _by_formula(exact(attention), x, layout, formula)
    eager = _by_module(_with_backend(attention, "reference"), x, layout)
    fused = _by_module(_with_backend(attention, "fused"), x, layout)
    slack = 4 * torch.finfo(torch.float32).eps
    for name, value in expected.items():
        error, allowed = distance(fused[name], value), distance(eager[name], value)
        assert error <= 2 * allowed + slack, f"{name}: {error:.1e}, eager {allowed:.1e}"


def compare_fused_over(places: list[Place], modifiers: list[str], formula: Formula) -> None:
    """Asserts the same of the median, over the places, of each tensor's error: one number alone,
    such as a gradient that cancels out, may be near by chance. No error may be large either.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for place in places:
        attention, x = place.attention(*modifiers), place.x()
        expected = _by_formula(exact(attention), x, place.layout, formula)
        eager = _by_module(_with_backend(attention, "reference"), x, place.layout)
        fused = _by_module(_with_backend(attention, "fused"), x, place.layout)
        for name, value in expected.items():
            pair = distance(fused[name], value), distance(eager[name], value)
            errors.setdefault(name, []).append(pair)
    slack = 4 * torch.finfo(torch.float32).eps
    for name, pairs in errors.items():
        ours, allowed = map(statistics.median, zip(*pairs, strict=True))
        assert ours <= 2 * allowed + slack, f"{name}: {pairs}"
        assert max(ours for ours, _ in pairs) < 1e-4, f"{name}: {pairs}"


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number expected, or over 1e-3 where that is less (the
    gradient of k's bias is 0).
    """
    scale = expected.abs().max().clamp(min=1e-3)
    difference = ((found.double() - expected).abs().max() / scale).item()
    return math.inf if math.isnan(difference) else difference


def _with_backend(attention: nn.Module, backend: str) -> nn.Module:
    attention = copy.deepcopy(attention).float()
    attention.spec = replace(attention.spec, backend=backend)
    return attention


def _by_module(attention: nn.Module, x: Tensor, layout: WindowLayout | None) -> dict[str, Tensor]:
    x = x.to(attention.qkv.weight.dtype).detach().requires_grad_()
    output = attention(x, layout) if layout else attention(x)
    return _with_gradients(attention, x, output)


def _by_formula(
    attention: nn.Module, x: Tensor, layout: WindowLayout | None, formula: Formula
) -> dict[str, Tensor]:
    x = x.double().detach().requires_grad_()
    dense = Dense(attention, x, layout)
    return _with_gradients(attention, x, dense.result(formula(dense)))


def _with_gradients(attention: nn.Module, x: Tensor, output: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    loss = (output * weights).sum()
    gradients = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    found = {"output": output.detach()}
    for name, source, gradient in zip(["x", *names], [x, *parameters], gradients, strict=True):
        found[name] = torch.zeros_like(source) if gradient is None else gradient
    return found
