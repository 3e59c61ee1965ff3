"""T2T-ViT (arXiv:2101.11986) for small images: soft splits with token transformers, frozen
positions, blocks, the mean of the tokens.
"""

from functools import partial

import torch
from torch import Tensor, nn

from kernels.window_attention.layout import Size
from models.attention import AttentionSpec, Geometry
from models.attention.skip_attention import SkipAttention
from models.base.backbone import BACKBONES
from models.base.token_block import TokenBlock
from models.base.tokens import TokenTransformer
from models.layers.drop_path import drop_path_rates
from models.layers.tokens_to_token import TokensToToken, sinusoid
from registry import check_choice


@BACKBONES.register("t2t")
class T2TViT(TokenTransformer):
    """Tokens-to-token, then blocks of global attention at one resolution; the head sees the mean of
    the tokens.

    Args:
        img_size: an int or (rows, columns). token_transformers: their number; the tokens' grid is
            2^-(number + 1) of the image.
            token_dim: their channels. preset: "paper", or "release", what the code behind the
                published small-image results does:
            inside the attention of a block its own (normed) input is added once more (v, if it has
            one head), the logits of the token transformers are scaled by their input width, and a
            class token and a norm exist that nothing uses. These are frozen.
        modified: `attention` modifies "all" attention, or that of the "blocks" alone. The token
            transformers have one head each, and q and k of another width than their input.
    Shapes: (B, in_chans, H, W) -> (B, num_classes), or pooled features (B, embed_dim) where
        num_classes is 0.
    Raises: ValueError for another word, and for a modifier that does not fit the token
        transformers.
    Source: arXiv:2101.11986; the small-image form of
        github.com/CatworldLee/Gaussian-Mixture-Mask-Attention.
    """

    section = "T2T"

    @classmethod
    def from_config(cls, config, num_classes: int) -> "T2TViT":
        """See the base."""
        node = config.MODEL.T2T
        return super().from_config(
            config,
            num_classes,
            depth=node.DEPTH,
            num_heads=node.NUM_HEADS,
            token_transformers=node.TOKEN_TRANSFORMERS,
            token_dim=node.TOKEN_DIM,
            preset=node.PRESET,
            modified=node.MODIFIED,
        )

    def __init__(
        self,
        img_size: int | Size = 32,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 12,
        num_heads: int = 4,
        *,
        token_transformers: int = 1,
        token_dim: int = 64,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = False,
        preset: str = "paper",
        modified: str = "all",
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_profile: str = "linear",
        use_checkpoint: bool = False,
        attention: AttentionSpec | None = None,
    ):
        release = check_choice("t2t: preset", preset, ("paper", "release")) == "release"
        spec, plain = (
            attention or AttentionSpec(),
            check_choice("t2t: modified", modified, ("all", "blocks")) == "blocks",
        )
        try:
            embed = TokensToToken(
                img_size,
                in_chans,
                embed_dim,
                token_dim,
                token_transformers,
                AttentionSpec() if plain else spec,
                qkv_bias,
                release,
                release,
                norm_eps,
                drop_rate,
            )
        except ValueError as error:
            raise ValueError(
                f"t2t, token transformers: {error}. To leave them as they are: MODEL.T2T.MODIFIED"
                " blocks"
            ) from error
        super().__init__(
            img_size, 0, in_chans, num_classes, embed_dim, drop_rate, use_checkpoint, embed
        )
        if release:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim), requires_grad=False)
        self.register_buffer("pos_embed", sinusoid(embed.num_patches, embed_dim), persistent=False)
        geometry = Geometry(embed_dim, num_heads, embed.patches_resolution)
        skip = "none" if not release else "value" if num_heads == 1 else "input"
        self.blocks = nn.ModuleList(
            TokenBlock(
                embed_dim,
                SkipAttention(geometry, spec, qkv_bias, None, drop_rate, skip),
                int(embed_dim * mlp_ratio),
                drop_rate,
                rate,
                norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            )
            for rate in drop_path_rates(drop_path_rate, depth, drop_path_profile)
        )
        self.norm = nn.LayerNorm(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.initialise()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the mean of the tokens after the last block and `norm`, (B,
        embed_dim).
        """
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        return self.norm(self.run(self.blocks, x)).mean(1)

    def flops(self) -> int:
        """Multiply-accumulates for one image, attention products included."""
        tokens = self.patch_embed.num_patches
        return (
            self.embed_flops()
            + sum(block.flops(tokens) for block in self.blocks)
            + self.head_flops()
        )
