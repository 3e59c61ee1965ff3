"""Attention that forms no N x N matrix, by name.

Every mixer is built as `MIXERS.create("name(option=value)", dim, num_heads)` and called as
`mixer(x, grid)`: x (B, N, dim) with N = rows * columns tokens of `grid`, row by row -> (B, N, dim).
`flops(tokens)` counts multiply-accumulates. There is no mask: a mixer sees all N tokens.
`has_heads` says whether num_heads acts, `needs_places` whether every token must lie on the grid (no
class token).
"""

from registry import Registry

from .additive import EfficientAdditiveAttention, SeparableAttention
from .local import LocalTokenAttention

MIXERS = Registry("attention mixer")
MIXERS.register("efficient_additive")(EfficientAdditiveAttention)
MIXERS.register("separable")(SeparableAttention)
MIXERS.register("local")(LocalTokenAttention)
