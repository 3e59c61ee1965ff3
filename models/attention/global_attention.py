"""Softmax attention of all tokens of an image to each other, as in ViT."""

import torch
from torch import Tensor

from kernels.window_attention import OffsetTerms, WindowLayout, window_layout

from .geometry import Geometry
from .softmax import SoftmaxAttention
from .spec import AttentionSpec


class GlobalAttention(SoftmaxAttention):
    """Logits (q kᵀ) * scale over one window that is the whole grid, class tokens in front.

    Args:
        geometry: `window` is the grid, `prefix` the number of class tokens.
        qk_scale: the scale; None is head_dim^-0.5.
        out_dim: channels of the result; 0 is C.
    Shapes: x (B, N, C) with N = prefix + rows * columns, row by row -> (B, N, C). Raises ValueError
        for another N.
    State dict: qkv, proj, as in timm's and the released ViT.
    Source: An Image is Worth 16x16 Words, arXiv:2010.11929, eq. 2.
    """

    def __init__(
        self,
        geometry: Geometry,
        spec: AttentionSpec,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        out_dim: int = 0,
    ):
        super().__init__(geometry, spec)
        scale = qk_scale or geometry.head_channels**-0.5
        self.register_buffer(
            "uniform_scale", torch.full((1, geometry.num_heads), scale), persistent=False
        )
        self._finish(qkv_bias, proj_drop, out_dim)

    def term_parameters(self) -> list[Tensor]:
        """None: the scale is fixed."""
        return []

    def base_terms(self) -> OffsetTerms:
        """scale (1, heads); no bias."""
        return OffsetTerms(self.window_size, self.uniform_scale, prefix=self.geometry.prefix)

    def forward(self, x: Tensor, first_v: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, C) -> (B, N, C); with the values of a chain's first block see the base."""
        x, layout = self.as_window(x)
        y = super().forward(x, layout, first_v)
        return (y[0].flatten(1, 2), y[1]) if isinstance(y, tuple) else y.flatten(1, 2)

    def as_window(self, x: Tensor) -> tuple[Tensor, WindowLayout]:
        """(B, N, C) as one window (B, rows, columns, C), and its layout."""
        rows, columns = self.window_size
        prefix = self.geometry.prefix
        if x.shape[1] != prefix + rows * columns:
            raise ValueError(
                f"attention: {x.shape[1]} tokens, but it was built for {prefix} class tokens and a"
                f" grid of {rows}x{columns}"
            )
        grid = (
            (1, x.shape[1]) if prefix else self.window_size
        )  # class tokens have no place: one row of all tokens
        return x.unflatten(1, grid), window_layout(grid, grid, device=x.device)
