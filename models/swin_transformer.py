"""Swin Transformer (arXiv:2103.14030): pre-norm blocks, scaled dot product with a bias per relative
offset.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from kernels.window_attention import window_partition, window_reverse
from kernels.window_attention.layout import Size
from models.attention import AttentionSpec, WindowAttention
from models.attention.build import window_attention
from models.base.backbone import BACKBONES, attention_spec
from models.base.options import SOFTMAX
from models.base.pyramid import PyramidTransformer, pyramid_options
from models.base.window_block import AttentionBlock, block_geometry

__all__ = ["SwinTransformer", "SwinTransformerBlock", "window_partition", "window_reverse"]


class SwinTransformerBlock(AttentionBlock):
    """x + attention(norm1(x)), then x + mlp(norm2(x)).

    Shapes: (B, L, C) -> (B, L, C).
    """

    def __init__(
        self,
        *args,
        attention: AttentionSpec,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        **kwargs,
    ):
        self.attention_options = dict(
            spec=attention, qkv_bias=qkv_bias, qk_scale=qk_scale, proj_drop=drop
        )
        super().__init__(*args, drop=drop, **kwargs)

    def make_attention(self) -> nn.Module:
        """The attention of this block."""
        return window_attention(WindowAttention, block_geometry(self), **self.attention_options)

    def forward(
        self, x: Tensor, grid: Size | None = None, first_v: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, L, C) on `grid` (default: the resolution it was built for).

        first_v: what the first block of the stage hands down, beside its tokens, if it does.
        """
        grid = grid or self.input_resolution
        y, handed = self.attend(self.norm1(x), grid, first_v)
        x = x + self.drop_path(self.edited(y, x))
        x = x + self.drop_path(self.mix(self.norm2(x), grid))
        return x if handed is None else (x, handed)


@BACKBONES.register("swin")
class SwinTransformer(PyramidTransformer):
    """The arguments of the Swin repository in its order, then this project's.

    Args:
        img_size, patch_size, window_size: an int or (rows, columns).
        qk_scale: None is head_dim^-0.5.
        attn_drop_rate: the same as AttentionSpec.drop, for callers of Swin's class.
        fused_window_process: has no effect, and True is answered with a warning; window attention
            here includes shift and partition anyway.
        attention: what is modified.
        others: further `PyramidOptions` (pre_mlp, sw_mlp, dynamic_img_size ...).
    Shapes: (B, in_chans, H, W) -> (B, num_classes).
    """

    optional_settings = PyramidTransformer.optional_settings | SOFTMAX | {"MODEL.SW_MLP"}
    section = "SWIN"

    @classmethod
    def from_config(cls, config, num_classes: int) -> "SwinTransformer":
        """See the base."""
        node = config.MODEL.SWIN
        return super().from_config(
            config,
            num_classes,
            qkv_bias=node.QKV_BIAS,
            qk_scale=node.QK_SCALE,
            attention=attention_spec(config),
            sw_mlp=config.MODEL.SW_MLP,
        )

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int | Size = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Size = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        fused_window_process: bool = False,
        *,
        attention: AttentionSpec | None = None,
        **others,
    ):
        self.qkv_bias = qkv_bias
        self.qk_scale = qk_scale
        if fused_window_process:
            others = {**others, "fused_window_process": True}
        super().__init__(
            pyramid_options(
                attention,
                attn_drop_rate,
                others,
                img_size=img_size,
                patch_size=patch_size,
                in_chans=in_chans,
                num_classes=num_classes,
                embed_dim=embed_dim,
                depths=depths,
                num_heads=num_heads,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
                norm_layer=norm_layer,
                ape=ape,
                patch_norm=patch_norm,
                use_checkpoint=use_checkpoint,
            )
        )

    def make_block(self, *place) -> SwinTransformerBlock:
        """See the base."""
        return SwinTransformerBlock(
            **self.block_arguments(*place), qkv_bias=self.qkv_bias, qk_scale=self.qk_scale
        )
