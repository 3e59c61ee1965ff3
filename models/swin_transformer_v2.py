"""Swin Transformer V2 (arXiv:2111.09883): norms after the branches, cosine attention, a bias from
log-spaced offsets.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from kernels.window_attention import window_partition, window_reverse
from kernels.window_attention.layout import Size, to_pair
from models.attention import AttentionSpec, WindowAttentionV2
from models.attention.build import window_attention
from models.base.backbone import BACKBONES, attention_spec
from models.base.options import COSINE, SOFTMAX
from models.base.pyramid import PyramidOptions, PyramidTransformer, pyramid_options
from models.base.window_block import AttentionBlock, block_geometry

__all__ = ["SwinTransformerBlockV2", "SwinTransformerV2", "window_partition", "window_reverse"]


class SwinTransformerBlockV2(AttentionBlock):
    """x + norm1(attention(x)), then x + norm2(mlp(x)); both norms start at 0, so that the block
    starts as the identity.

    Shapes: (B, L, C) -> (B, L, C).
    """

    def __init__(
        self,
        *args,
        attention: AttentionSpec,
        qkv_bias: bool,
        pretrained_window: Size,
        drop: float,
        **kwargs,
    ):
        self.attention_options = dict(spec=attention, qkv_bias=qkv_bias, proj_drop=drop)
        self.pretrained_window = pretrained_window
        super().__init__(*args, drop=drop, **kwargs)

    def make_attention(self) -> nn.Module:
        """The attention of this block."""
        return window_attention(
            WindowAttentionV2,
            block_geometry(self, self.pretrained_window),
            **self.attention_options,
        )

    def forward(
        self, x: Tensor, grid: Size | None = None, first_v: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, L, C) on `grid` (default: the resolution it was built for).

        first_v: what the first block of the stage hands down, beside its tokens, if it does.
        """
        grid = grid or self.input_resolution
        y, handed = self.attend(x, grid, first_v)
        x = x + self.drop_path(self.edited(self.norm1(y), x))
        x = x + self.drop_path(self.norm2(self.mix(x, grid)))
        return x if handed is None else (x, handed)


@BACKBONES.register("swinv2")
class SwinTransformerV2(PyramidTransformer):
    """The arguments of the Swin repository in its order, then this project's; see
    `SwinTransformer` for those both share.

    Args:
        pretrained_window_sizes: per stage, the window the weights were trained with, where it
            differs; 0 where it does not.
    Shapes: (B, in_chans, H, W) -> (B, num_classes).
    """

    norm_first = False
    optional_settings = PyramidTransformer.optional_settings | SOFTMAX | COSINE | {"MODEL.SW_MLP"}
    section = "SWINV2"

    @classmethod
    def from_config(cls, config, num_classes: int) -> "SwinTransformerV2":
        """See the base."""
        node = config.MODEL.SWINV2
        return super().from_config(
            config,
            num_classes,
            qkv_bias=node.QKV_BIAS,
            attention=attention_spec(config),
            pretrained_window_sizes=list(node.PRETRAINED_WINDOW_SIZES),
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
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        pretrained_window_sizes: Sequence[int | Size] = (0, 0, 0, 0),
        *,
        attention: AttentionSpec | None = None,
        **others,
    ):
        if len(pretrained_window_sizes) < len(depths):
            raise ValueError(
                f"pretrained_window_sizes {list(pretrained_window_sizes)} must have an entry for"
                f" each of {len(depths)} stages"
            )
        self.qkv_bias = qkv_bias
        self.pretrained_window_sizes = pretrained_window_sizes
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

    def make_block(
        self, options: PyramidOptions, dim: int, resolution: Size, stage: int, *place
    ) -> SwinTransformerBlockV2:
        """See the base; the pretrained window is the stage's own."""
        arguments = self.block_arguments(options, dim, resolution, stage, *place)
        return SwinTransformerBlockV2(
            **arguments,
            qkv_bias=self.qkv_bias,
            pretrained_window=to_pair(self.pretrained_window_sizes[stage]),
        )

    def initialise_weights(self) -> None:
        """The general rule; then the norms after the branches start at 0, weight and bias."""
        super().initialise_weights()
        for layer in self.layers:
            for block in layer.blocks:
                for norm in (block.norm1, block.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names without weight decay."""
        return {"cpb_mlp", "logit_scale", "relative_position_bias_table"}
