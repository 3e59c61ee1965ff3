"""The attention of Swin and of SwinV2: softmax attention with their scales and biases."""

import math

import torch
from torch import Tensor, nn

from kernels.window_attention import OffsetTerms, relative_position_index
from models.layers.init import trunc_normal

from .geometry import Geometry, relative_coords_table
from .softmax import SoftmaxAttention
from .spec import AttentionSpec

MAX_LOGIT_SCALE = 100.0


class WindowAttention(SoftmaxAttention):
    """Swin's attention: logits (q kᵀ) * scale plus a learned bias per relative offset.

    Args:
        qk_scale: the scale; None is head_dim^-0.5.
    State dict: relative_position_bias_table (T, heads), relative_position_index (N, N), qkv, proj.
    Source: Swin Transformer, arXiv:2103.14030, eq. 4.
    """

    def __init__(
        self,
        geometry: Geometry,
        spec: AttentionSpec,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__(geometry, spec)
        self.scale = qk_scale or geometry.head_channels**-0.5
        self.relative_position_bias_table = nn.Parameter(
            trunc_normal(torch.empty(geometry.num_offsets, geometry.num_heads), 0.02)
        )
        self.register_buffer("relative_position_index", relative_position_index(geometry.window))
        self.register_buffer(
            "uniform_scale", torch.full((1, geometry.num_heads), self.scale), persistent=False
        )
        self._finish(qkv_bias, proj_drop)

    def term_parameters(self) -> list[Tensor]:
        """The bias table."""
        return [self.relative_position_bias_table]

    def base_terms(self) -> OffsetTerms:
        """scale (1, heads), bias (T, heads)."""
        return OffsetTerms(self.window_size, self.uniform_scale, self.relative_position_bias_table)


class WindowAttentionV2(SoftmaxAttention):
    """SwinV2's attention: cosine of q and k times a learned scale, plus a bias that an MLP reads
    off log-spaced offsets.

    State dict: logit_scale (heads, 1, 1), q_bias and v_bias (C,), relative_coords_table,
        relative_position_index, cpb_mlp, qkv, proj.
    Source: Swin Transformer V2, arXiv:2111.09883, eq. 2 to 4; the scale is at most 100, the bias 16
        sigmoid(mlp).
    """

    cosine = True

    def __init__(
        self, geometry: Geometry, spec: AttentionSpec, qkv_bias: bool = True, proj_drop: float = 0.0
    ):
        super().__init__(geometry, spec)
        if not 0 < spec.logit_scale_init <= MAX_LOGIT_SCALE:
            raise ValueError(
                f"logit_scale_init is {spec.logit_scale_init}; it must be above 0 and at most"
                f" {MAX_LOGIT_SCALE:g}"
            )
        self.logit_scale = nn.Parameter(
            torch.full((geometry.num_heads, 1, 1), math.log(spec.logit_scale_init))
        )
        self.q_bias = nn.Parameter(torch.zeros(geometry.dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(geometry.dim)) if qkv_bias else None
        self.register_buffer(
            "relative_coords_table",
            relative_coords_table(geometry.window, geometry.pretrained_window),
        )
        self.register_buffer("relative_position_index", relative_position_index(geometry.window))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, geometry.num_heads, bias=False)
        )
        self._finish(False, proj_drop)

    def term_parameters(self) -> list[Tensor]:
        """The scale."""
        return [self.logit_scale]

    def base_terms(self) -> OffsetTerms:
        """scale (1, heads) in (0, 100], bias (T, heads) in (0, 16), or unbounded without the
        sigmoid.
        """
        scale = self.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp().view(1, -1)
        bias = self.cpb_mlp(self.relative_coords_table.flatten(0, 2))
        if self.spec.bias_sigmoid:
            bias = 16 * torch.sigmoid(bias)
        return OffsetTerms(self.window_size, scale, bias)

    def term_modules(self) -> list[nn.Module]:
        """The bias MLP."""
        return [self.cpb_mlp]

    def extra_bias_parameters(self) -> list[Tensor | None]:
        """The biases of q and of v."""
        return [self.q_bias, self.v_bias]

    def extra_bias(self) -> Tensor | None:
        """(3C,): k has no bias."""
        if self.q_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
