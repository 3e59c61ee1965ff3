"""Stand-alone local attention as a mixer of tokens."""

from torch import Tensor

from models.attention.local import LocalAttention

from .base import MIXERS


@MIXERS.register("local")
class LocalTokenAttention(LocalAttention):
    """`LocalAttention` on tokens instead of a map: no stride, and the width stays.

    Shapes: (B, N, dim) with N = rows * columns of `grid` -> (B, N, dim). Class tokens have no
        neighbours and are refused.
    """

    has_heads, needs_places = True, True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        kernel_size: int = 7,
        rel: str = "shared",
        pad: str = "mask",
        scale: str = "none",
        grouped: bool = False,
        content: bool = True,
    ):
        super().__init__(
            dim,
            num_heads,
            kernel_size=kernel_size,
            rel=rel,
            pad=pad,
            scale=scale,
            grouped=grouped,
            content=content,
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x: (B, N, dim), token by token along the rows of `grid`. Raises ValueError where N is not
        rows * columns.
        """
        if x.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"local attention: {x.shape[1]} tokens are not a grid of {grid[0]}x{grid[1]};"
                " tokens without a place, such as a class token, have no neighbourhood"
            )
        return super().forward(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
