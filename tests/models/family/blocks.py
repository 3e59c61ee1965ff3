"""Stages of blocks for tests of what acts around attention, and the same written down once more."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models.attention import AttentionSpec, WindowAttentionV2
from tests.models.builders import randomise, small

from .dense import EXACT, Dense, distance, exact

# (a block's attention written down, those of all blocks so far) -> what its heads give
Heads = Callable[[Dense, list[Dense]], Tensor]
Branch = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (attention, o, stream) -> o

WINDOWS = {
    "windows": dict(img_size=16),  # 8 x 8 tokens, windows of 4; the second block is shifted
    "padded": dict(img_size=12),
    "rectangular": dict(img_size=(10, 14), window_size=(2, 3)),
}
# The shortest that have a shift, padding, another order of norms, and a class token; all by
# `make test-slow`.
QUICK = ("swin-padded", "swinv2-padded", "vit-class_token", "vit-layer_scale")
CASES = {
    **{f"swin-{name}": ("swin", options) for name, options in WINDOWS.items()},
    **{f"swinv2-{name}": ("swinv2", options) for name, options in WINDOWS.items()},
    "vit-class_token": ("vit", {}),
    "vit-layer_scale": ("vit", dict(class_token=False, pool="mean", layer_scale=0.5)),
}


each_case = pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)


class Stage(NamedTuple):
    """The blocks of a float64 model, how they run, and where their tokens lie."""

    blocks: nn.ModuleList
    run: Callable[[Tensor], Tensor]
    grid: tuple[int, int] | None  # None: global attention
    tokens: int


def stage(case: str, *modifiers: str) -> Stage:
    """Two blocks with random parameters."""
    family, options = CASES[case]
    own = {} if family == "vit" else dict(depths=(2,), num_heads=(2,))
    if family == "swinv2":
        own["pretrained_window_sizes"] = (0,)
    attention = AttentionSpec(modifiers)
    model = randomise(small(family, **own, **options, attention=attention)).double()
    if family == "vit":
        tokens = model.pos_embed.shape[1]
        return Stage(model.blocks, lambda x: model.run(model.blocks, x), None, tokens)
    layer, grid = model.layers[0], model.patches_resolution
    for block in layer.blocks:
        block.attn = exact(block.attn)
    run = lambda x: layer.forward_blocks(x, grid)  # noqa: E731
    return Stage(layer.blocks, run, grid, grid[0] * grid[1])


def plain_heads(dense: Dense, before: list[Dense]) -> Tensor:
    """What the heads of plain attention give."""
    return dense.y


def same_branch(attention: nn.Module, o: Tensor, stream: Tensor) -> Tensor:
    """The branch as it is."""
    return o


def by_formula(
    part: Stage, x: Tensor, heads: Heads = plain_heads, branch: Branch = same_branch
) -> Tensor:
    """The blocks with attention from its definition and the branch edited by `branch`."""
    seen: list[Dense] = []
    for block in part.blocks:
        post_norm = isinstance(block.attn, WindowAttentionV2)
        inside = x if post_norm else block.norm1(x)
        if part.grid is None:
            seen.append(Dense(block.attn, inside))
        else:
            layout = block.layout(part.grid, None)
            seen.append(Dense(block.attn, inside.unflatten(1, part.grid), layout))
        o = seen[-1].result(heads(seen[-1], seen)).reshape(x.shape)
        o = block.norm1(o) if post_norm else o
        o = o * block.ls1.gamma if hasattr(getattr(block, "ls1", None), "gamma") else o
        x = x + branch(block.attn, o, x)
        if post_norm:
            x = x + block.norm2(block.mlp(x))
        else:
            y = block.mlp(block.norm2(x))
            x = x + (block.ls2(y) if hasattr(block, "ls2") else y)
    return x


def compare_stage(
    case: str, *modifiers: str, heads: Heads = plain_heads, branch: Branch = same_branch
) -> None:
    """Asserts that the blocks' output and all gradients are those of the formula in float64."""
    part = stage(case, *modifiers)
    names, parameters = zip(*part.blocks.named_parameters(), strict=True)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, part.tokens, 8, generator=generator).double().requires_grad_()
    weights = torch.randn(2, part.tokens, 8, generator=generator).double()
    found = []
    for y in (part.run(x), by_formula(part, x, heads, branch)):
        gradients = torch.autograd.grad((y * weights).sum(), [x, *parameters], allow_unused=True)
        found.append([y.detach(), *gradients])
    for name, ours, expected in zip(["output", "x", *names], *found, strict=True):
        assert (ours is None) == (expected is None), name
        if ours is not None:
            error = distance(ours, expected)
            assert error <= EXACT, f"{name}: {error:.1e}"
