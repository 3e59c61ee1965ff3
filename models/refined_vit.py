"""Refined ViT (arXiv:2106.03714): a ViT whose attention maps are refined, and handed from block to
block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.window_attention.layout import Size
from models.attention import AttentionSpec, Geometry
from models.attention.build import global_attention
from models.attention.shared_map import MapAttention, SharedMapAttention
from models.base.backbone import BACKBONES
from models.base.options import pixels
from models.base.tokens import TokenTransformer
from models.layers.conv_stem import patch_embedding
from models.layers.drop_path import drop_path_rates
from models.layers.init import trunc_normal
from models.layers.map_block import MapBlock, run_map_blocks
from registry import check_choice


@BACKBONES.register("refined_vit")
class RefinedViT(TokenTransformer):
    """Blocks of attention, of which some take the map of an earlier one, refine it and project
    values only.

    Args:
        img_size, patch_size: an int or (rows, columns). stem: "conv", three convolutions in front
            of the patches, or "linear".
        share_every: of so many blocks in a row the first forms a map and the others share it; 1
            shares none, 2 is the released form. Or one bool per block, True where it shares.
        carry: a block that forms a map adds head_dim^-0.5 times the last one formed. refine: what a
            shared block does to its map.
        mlp_gain: initial factor, per channel, of the MLP's branch. aux_head: a second head on every
            patch; the logits are the class token's + half the largest over the patches. It is
            trained through these logits: the released weights were trained with dense labels per
                patch, which this project does not read.
        cos_reg, cos_pairs: while training, cos_reg / cos_pairs * sum over the first cos_pairs pairs
            of neighbouring blocks of the mean cosine, over the heads, of their maps is added to the
            loss; of a block that shares, with the one before, it is 1. cos_reg 0 computes and keeps
            nothing for it.
        attention: modifies the blocks that form a map; with share_every 1 and "refiner" each block
            refines its own, as in the paper.
    Shapes: (B, in_chans, H, W) -> (B, num_classes), or pooled features (B, embed_dim) where
        num_classes is 0; in training with cos_reg a dict, "logits" and the scalar "penalty".
    Raises: ValueError for what cannot be, with the reason.
    Source: Refiner, arXiv:2106.03714; the form with shared maps is that of
        github.com/zhoudaquan/Refiner_ViT.
    """

    section = "REFINED_VIT"
    head_names = ("head", "aux_head")

    @classmethod
    def from_config(cls, config, num_classes: int) -> "RefinedViT":
        """See the base."""
        node = config.MODEL.REFINED_VIT
        backend = config.MODEL.ATTENTION.BACKEND
        if backend != "auto" and (node.SHARE_EVERY > 1 or node.CARRY or node.COS_REG):
            raise ValueError(
                f"MODEL.ATTENTION.BACKEND {backend}: maps that are handed on are formed in the"
                " open; set it to auto, or SHARE_EVERY 1, CARRY False and COS_REG 0"
            )
        return super().from_config(
            config,
            num_classes,
            patch_size=pixels(node.PATCH_SIZE),
            depth=node.DEPTH,
            num_heads=node.NUM_HEADS,
            stem=node.STEM,
            share_every=node.SHARE_EVERY,
            carry=node.CARRY,
            refine=node.REFINE,
            mlp_gain=node.MLP_GAIN,
            aux_head=node.AUX_HEAD,
            cos_reg=node.COS_REG,
            cos_pairs=node.COS_PAIRS,
        )

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int | Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 12,
        *,
        stem: str = "conv",
        share_every: int | Sequence[bool] = 2,
        carry: bool = True,
        refine: str = "refiner(preset=release, rescale=True)",
        mlp_ratio: float = 3.0,
        mlp_gain: float = 1e-5,
        qkv_bias: bool = True,
        aux_head: bool = False,
        cos_reg: float = 0.0,
        cos_pairs: int = 12,
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_profile: str = "linear",
        use_checkpoint: bool = False,
        attention: AttentionSpec | None = None,
    ):
        check_choice("refined_vit: stem", stem, ("conv", "linear"))
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            embed_dim,
            drop_rate,
            use_checkpoint,
            patch_embedding(stem, img_size, patch_size, in_chans, embed_dim),
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.cos_reg, self.cos_pairs = cos_reg, min(cos_pairs, depth - 1)
        spec, shared = attention or AttentionSpec(), shared_blocks(share_every, depth)
        geometry = Geometry(embed_dim, num_heads, self.patch_embed.patches_resolution, prefix=1)
        hands_on = any(shared) or carry or cos_reg > 0

        def attend(shares: bool) -> nn.Module:
            if shares:
                return SharedMapAttention(geometry, refine, qkv_bias, drop_rate, spec.drop)
            return (
                MapAttention(geometry, spec, qkv_bias, drop_rate, carry)
                if hands_on
                else global_attention(geometry, spec, qkv_bias=qkv_bias, proj_drop=drop_rate)
            )

        self.blocks = nn.ModuleList(
            MapBlock(
                embed_dim,
                attend(shares),
                int(embed_dim * mlp_ratio),
                drop_rate,
                rate,
                mlp_gain,
                norm_eps,
                hands_on,
            )
            for shares, rate in zip(
                shared, drop_path_rates(drop_path_rate, depth, drop_path_profile), strict=True
            )
        )
        self.norm = nn.LayerNorm(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.aux_head = nn.Linear(embed_dim, num_classes) if num_classes and aux_head else None
        self.initialise()

    def initialise_weights(self) -> None:
        """The general rule; position embedding and class token alike."""
        super().initialise_weights()
        trunc_normal(self.pos_embed, 0.02)
        trunc_normal(self.cls_token, 0.02)

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, in_chans, H, W) -> tokens behind `norm`, (B, 1 + L, embed_dim), and the penalty, or
        None.
        """
        x = self.patch_embed(x)
        x = self.pos_drop(
            torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        )
        pairs = self.cos_pairs if self.training and self.cos_reg else 0
        x, similarities = run_map_blocks(self.blocks, x, self.use_checkpoint, pairs)
        return self.norm(x), sum(similarities) * (self.cos_reg / pairs) if pairs else None

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the class token behind `norm`, (B, embed_dim)."""
        return self.forward_tokens(x)[0][:, 0]

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """(B, in_chans, H, W) -> (B, num_classes), in training with cos_reg beside the penalty."""
        x, penalty = self.forward_tokens(x)
        logits = self.head(x[:, 0])
        if self.aux_head is not None:
            logits = logits + 0.5 * self.aux_head(x[:, 1:]).amax(1)
        return logits if penalty is None else {"logits": logits, "penalty": penalty}

    def flops(self) -> int:
        """Multiply-accumulates for one image, attention products and the refinement of shared maps
        included.
        """
        tokens = self.pos_embed.shape[1]
        heads = self.head_flops() + (
            0 if self.aux_head is None else (tokens - 1) * self.embed_dim * self.num_classes
        )
        return self.embed_flops() + sum(block.flops(tokens) for block in self.blocks) + heads

    def position_names(self) -> set[str]:
        """Position embedding and class token."""
        return {"pos_embed", "cls_token"}


def shared_blocks(share_every: int | Sequence[bool], depth: int) -> list[bool]:
    """Whether each of `depth` blocks shares the map of an earlier one. Raises: ValueError where
    that cannot be.
    """
    shared = (
        [index % share_every > 0 for index in range(depth)]
        if isinstance(share_every, int)
        else list(share_every)
    )
    if len(shared) != depth or shared[0]:
        raise ValueError(
            f"refined_vit: share_every {share_every} does not fit {depth} blocks: one bool per"
            " block, the first False, as there is no map to share yet; or a number, at least 1"
        )
    return shared
