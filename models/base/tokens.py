"""What the backbones of global attention share: patches, blocks run one after the other, a linear
head.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from kernels.window_attention.layout import Size
from models.attention import AttentionSpec, Geometry
from models.attention.build import global_attention
from models.layers.patch_embed import PatchEmbed

from .attention_block import run_blocks
from .backbone import Backbone, attention_spec
from .options import DEPTH, SOFTMAX, pixels
from .token_block import TokenBlock


class TokenTransformer(Backbone):
    """Base of ViT and its relatives; a subclass gives `forward_features`, `head` and `flops`.

    patch_embed: used instead of what `make_patch_embed` makes.
    Shapes: (B, in_chans, H, W) -> (B, num_classes).
    """

    optional_settings = DEPTH | SOFTMAX
    section: str  # of MODEL

    @classmethod
    def from_config(cls, config, num_classes: int, **own) -> "TokenTransformer":
        """See the base; `own` are the arguments of one family."""
        model, node = config.MODEL, config.MODEL[cls.section]
        return cls(
            img_size=pixels(config.DATA.IMG_SIZE),
            in_chans=node.IN_CHANS,
            num_classes=num_classes,
            embed_dim=node.EMBED_DIM,
            mlp_ratio=node.MLP_RATIO,
            qkv_bias=node.QKV_BIAS,
            norm_eps=node.NORM_EPS,
            drop_rate=model.DROP_RATE,
            drop_path_rate=model.DROP_PATH_RATE,
            drop_path_profile=model.DROP_PATH_PROFILE,
            use_checkpoint=config.TRAIN.USE_CHECKPOINT,
            attention=attention_spec(config),
            **own,
        )

    def __init__(
        self,
        img_size: int | Size,
        patch_size: int | Size,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        drop_rate: float,
        use_checkpoint: bool,
        patch_embed: nn.Module | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.num_features = embed_dim
        self.use_checkpoint = use_checkpoint
        self.patch_embed = patch_embed or self.make_patch_embed(
            img_size, patch_size, in_chans, embed_dim
        )
        self.pos_drop = nn.Dropout(drop_rate)

    def make_patch_embed(
        self, img_size: int | Size, patch_size: int | Size, in_chans: int, embed_dim: int
    ) -> nn.Module:
        """Image (B, in_chans, H, W) -> tokens (B, L, embed_dim); has patches_resolution,
        num_patches and flops().
        """
        return PatchEmbed(img_size, patch_size, in_chans, embed_dim, None)

    def run(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """(B, N, C) through the blocks, whose activations are computed again in the backward if
        `use_checkpoint`.
        """
        return run_blocks(blocks, x, again=self.use_checkpoint)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.head(self.forward_features(x))

    def layer_groups(self) -> list[list[str]]:
        """See the base: the embedding, then `blocks`."""
        blocks = [[f"blocks.{index}"] for index in range(len(self.blocks))]
        return [["patch_embed", *sorted(self.position_names())], *blocks]

    def embed_flops(self) -> int:
        """Multiply-accumulates of the patch embedding for one image."""
        return self.patch_embed.flops()

    def head_flops(self) -> int:
        """Multiply-accumulates of the last norm and the head."""
        return self.num_features + self.num_features * self.num_classes


def token_block(
    geometry: Geometry,
    spec: AttentionSpec,
    mlp_ratio: float,
    *,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    drop: float = 0.0,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    norm_eps: float = 1e-6,
) -> TokenBlock:
    """A block with global attention, or with the mixer that `spec` names, on the tokens of
    `geometry`.
    """
    attn = global_attention(geometry, spec, qkv_bias=qkv_bias, qk_scale=qk_scale, proj_drop=drop)
    return TokenBlock(
        geometry.dim,
        attn,
        int(geometry.dim * mlp_ratio),
        drop,
        drop_path,
        layer_scale,
        lambda dim: nn.LayerNorm(dim, norm_eps),
    )
