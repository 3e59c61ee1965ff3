"""Refined ViT (arXiv:2106.03714): a ViT whose attention maps are refined, and handed from block to
block.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.window_attention.layout import Size
from models.attention import AttentionSpec, Geometry
from models.attention.build import global_attention
from models.attention.shared_map import MapAttention, SharedMapAttention
from models.base.backbone import BACKBONES
from models.base.options import pixels
from models.base.token_block import LayerScale, TokenBlock
from models.base.tokens import TokenTransformer
from models.layers.drop_path import drop_path_rates
from models.layers.init import trunc_normal
from models.layers.patch_embed import PatchEmbed
from registry import check_choice

WIDTHS = (32, 64, 128)  # of the convolutions of the stem
Step = tuple[Tensor, Tensor | None]  # tokens and map


class ConvStem(PatchEmbed):
    """7 x 7 of stride 2, two 3 x 3 (each with a batch norm and a ReLU, without bias), then patches
    of half the side on what is left.

    patch_size: pixels of the image, even. Shapes: (B, in_chans, H, W) -> (B, L, embed_dim), as
        PatchEmbed.
    Raises: ValueError for an odd patch or image side.
    Source: the stem of github.com/zhoudaquan/Refiner_ViT; its widths are fixed.
    """

    def __init__(self, img_size: int | Size, patch_size: int | Size, in_chans: int, embed_dim: int):
        super().__init__(img_size, patch_size, in_chans, embed_dim, None)
        if any(side % 2 for side in (*self.img_size, *self.patch_size)):
            raise ValueError(
                f"stem conv halves the image: sides of image {self.img_size} and patch"
                f" {self.patch_size} must be even; change them, or take STEM linear"
            )
        first, second, last = WIDTHS
        half = (self.patch_size[0] // 2, self.patch_size[1] // 2)
        self.proj = nn.Sequential(
            *_unit(in_chans, first, 7, 2),
            *_unit(first, second, 3),
            *_unit(second, last, 3),
            nn.Conv2d(last, embed_dim, half, half),
        )

    def flops(self) -> int:
        """Multiply-accumulates of the convolutions for one image of `img_size`."""
        pixels = self.img_size[0] * self.img_size[1] // 4
        *stem, patches = (
            layer.weight.numel() for layer in self.proj if isinstance(layer, nn.Conv2d)
        )
        return pixels * sum(stem) + self.num_patches * patches


def _unit(dim: int, out_dim: int, kernel: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_dim),
        nn.ReLU(),
    )


def patch_embedding(
    stem: str, img_size: int | Size, patch_size: int | Size, in_chans: int, embed_dim: int
) -> PatchEmbed:
    """stem: "conv" or "linear", one convolution whose kernel is the patch."""
    if check_choice("refined_vit: stem", stem, ("conv", "linear")) == "conv":
        return ConvStem(img_size, patch_size, in_chans, embed_dim)
    return PatchEmbed(img_size, patch_size, in_chans, embed_dim, None)


class MapBlock(TokenBlock):
    """x + 2 drop_path(attn(norm1(x), A)), then x + 2 drop_path(gamma mlp(norm2(x))); the map of the
    attention is returned too. Branch modifiers edit the branch with its factor 2.

    Args:
        attn: (x, previous map) -> (y, map) where `hands_on`; else as in TokenBlock, and `previous`
            are the values that the first block hands down, if it does.
        gain: initial gamma, per channel.
        eps: of the norms.
    Shapes: x (B, N, C), previous (B, H, N, N) or None -> x, and the map (B, H, N, N) or None. State
        dict: as TokenBlock; gamma is ls2.gamma.
    Source: github.com/zhoudaquan/Refiner_ViT writes the branches as 2 f(norm(x / 2)). As norm(x /
        2) with eps is norm(x) with 4 eps, this is the same function.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        hidden: int,
        drop: float,
        drop_path: float,
        gain: float,
        eps: float,
        hands_on: bool,
    ):
        super().__init__(
            dim, attn, hidden, drop, drop_path, None, lambda width: nn.LayerNorm(width, 4 * eps)
        )
        del self.ls1
        self.ls2 = LayerScale(dim, gain)
        self.hands_on = hands_on

    @property
    def shared(self) -> bool:
        """Whether it uses the map of the block before and returns the same map."""
        return isinstance(self.attn, SharedMapAttention)

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Step:
        """x (B, N, C), previous (B, H, N, N) or None -> x and the map, or what else is handed
        down.
        """
        if self.hands_on:
            y, handed = self.attn(self.norm1(x), previous)
        else:
            y, handed = self.attended(self.norm1(x), first_v=previous)
            handed = previous if handed is None else handed
        x = x + self.drop_path(self.edited(2 * y, x))
        return x + 2 * self.drop_path(self.ls2(self.mlp(self.norm2(x)))), handed


def run_map_blocks(
    blocks: Iterable[MapBlock], x: Tensor, again: bool, pairs: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Tokens through the blocks, each handed the map of the one before.

    again: activations are computed again in the backward.
    pairs: neighbouring blocks, from the first on, whose maps are compared.
    Returns: tokens (B, N, C), and the `map_similarity` of each pair.
    """
    attn = None
    similarities = []
    again = again and torch.is_grad_enabled()
    for index, block in enumerate(blocks):
        previous = attn
        if again:
            x, made = checkpoint(block, x, attn, use_reentrant=False)
        else:
            x, made = block(x, attn)
        if not block.shared:
            attn = made
        if 0 < index <= pairs:
            similarities.append(map_similarity(previous, attn))
    return x, similarities


def map_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Mean over images and pairs of tokens of the cosine, over the heads, of two maps (B, H, N, N);
    1 if they are one object.
    """
    if first is second:
        return first.new_ones(())
    return F.cosine_similarity(first, second, dim=1).mean()


@BACKBONES.register("refined_vit")
class RefinedViT(TokenTransformer):
    """Blocks of attention, of which some take the map of an earlier one, refine it and project
    values only.

    Args:
        img_size, patch_size: an int or (rows, columns).
        stem: "conv", three convolutions in front of the patches, or "linear".
        share_every: blocks in a row that share a map, which the first forms; 1 shares none, 2 is
            the released form. Or one bool per block, True where it shares.
        carry: a block that forms a map adds head_dim^-0.5 times the last one formed.
        refine: what a shared block does to its map.
        mlp_gain: initial factor, per channel, of the MLP's branch.
        aux_head: a second head on every patch; the logits are the class token's + half the largest
            over the patches. It is trained through these logits: the released weights were trained
            with dense labels per patch, which this project does not read.
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
                f"MODEL.ATTENTION.BACKEND {backend}: shared maps are formed in the open;"
                " set it to auto, or SHARE_EVERY 1, CARRY False and COS_REG 0"
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
        drop_path_rate: float = 0.1,
        drop_path_profile: str = "linear",
        use_checkpoint: bool = False,
        attention: AttentionSpec | None = None,
    ):
        embed = patch_embedding(stem, img_size, patch_size, in_chans, embed_dim)
        super().__init__(
            img_size, patch_size, in_chans, num_classes, embed_dim, drop_rate, use_checkpoint, embed
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.cos_reg = cos_reg
        self.cos_pairs = min(cos_pairs, depth - 1)
        spec = attention or AttentionSpec()
        shared = shared_blocks(share_every, depth)
        geometry = Geometry(embed_dim, num_heads, self.patch_embed.patches_resolution, prefix=1)
        hands_on = any(shared) or carry or cos_reg > 0

        def attend(shares: bool, number: int) -> nn.Module:
            if shares:
                return SharedMapAttention(geometry, refine, qkv_bias, drop_rate, spec.drop)
            if hands_on:
                return MapAttention(geometry, spec, qkv_bias, drop_rate, carry, any(shared))
            place = replace(geometry, block=number)
            return global_attention(place, spec, qkv_bias=qkv_bias, proj_drop=drop_rate)

        hidden = int(embed_dim * mlp_ratio)
        rates = drop_path_rates(drop_path_rate, depth, drop_path_profile)
        self.blocks = nn.ModuleList()
        for number, (shares, rate) in enumerate(zip(shared, rates, strict=True)):
            attn = attend(shares, number)
            self.blocks.append(
                MapBlock(embed_dim, attn, hidden, drop_rate, rate, mlp_gain, norm_eps, hands_on)
            )
        if any(shared) and self.blocks[0].edits:
            raise ValueError(
                f"refined_vit: {', '.join(self.blocks[0].edits)} edits the attention branch of"
                " every block, and blocks that share a map take no modifiers; set"
                " MODEL.REFINED_VIT.SHARE_EVERY 1"
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
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        pairs = self.cos_pairs if self.training and self.cos_reg else 0
        x, similarities = run_map_blocks(self.blocks, x, self.use_checkpoint, pairs)
        penalty = sum(similarities) * (self.cos_reg / pairs) if pairs else None
        return self.norm(x), penalty

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
        blocks = sum(block.flops(tokens) for block in self.blocks)
        heads = self.head_flops()
        if self.aux_head is not None:
            heads += (tokens - 1) * self.embed_dim * self.num_classes
        return self.embed_flops() + blocks + heads

    def position_names(self) -> set[str]:
        """Position embedding and class token."""
        return {"pos_embed", "cls_token"}


def shared_blocks(share_every: int | Sequence[bool], depth: int) -> list[bool]:
    """Whether each of `depth` blocks shares the map of an earlier one. Raises: ValueError where
    that cannot be.
    """
    if isinstance(share_every, int):
        shared = [index % share_every > 0 for index in range(depth)]
    else:
        shared = list(share_every)
    if len(shared) != depth or shared[0]:
        raise ValueError(
            f"refined_vit: share_every {share_every} does not fit {depth} blocks: one bool per"
            " block, the first False, as there is no map to share yet; or a number, at least 1"
        )
    return shared
