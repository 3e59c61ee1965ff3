"""What a mixer is: attention that forms no N x N matrix, by name.

A mixer is built as `MIXERS.create("name(option=value)", dim, num_heads)` and called as
`mixer(x, grid)`: x (B, N, dim) -> (B, N, dim), where N = rows * columns tokens of `grid`, row by
row. There is no mask: a mixer sees all N tokens. It has

    flops(tokens)   multiply-accumulates for that many tokens
    has_heads       whether num_heads has an effect
    needs_places    whether every token must lie on the grid (no class token)

and may name parameters without weight decay in `no_weight_decay()`.
"""

from registry import Registry

MIXERS = Registry("attention mixer")
