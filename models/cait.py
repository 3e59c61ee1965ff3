"""CaiT (arXiv:2103.17239): deep blocks of talking heads over the patches, then blocks in which a
class token asks them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from kernels.window_attention.layout import Size
from models.attention import AttentionSpec, Geometry
from models.attention.talking_attention import ClassAttention, TalkingHeadsAttention
from models.base.backbone import BACKBONES
from models.base.options import pixels
from models.base.token_block import TokenBlock
from models.base.tokens import TokenTransformer
from models.layers.drop_path import drop_path_rates
from models.layers.init import trunc_normal
from registry import check_choice

BY_DEPTH = ((18, 0.1), (24, 1e-5), (float("inf"), 1e-6))  # up to which block, counted from 1: gamma
CONTEXTS = ("all", "patches")


class ScaledBlock(TokenBlock):
    """x + drop_path(gamma_1 attn(norm1(x))), then x + drop_path(gamma_2 mlp(norm2(x))).

    layer_scale: initial value of gamma_1 and gamma_2 (C,). Else as TokenBlock; state-dict keys are
        those of timm's CaiT.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        hidden: int,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float = 1e-5,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__(dim, attn, hidden, drop, drop_path, None, norm_layer)
        del self.ls1, self.ls2
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((dim,), float(layer_scale))) for _ in range(2)
        )

    def forward(self, x: Tensor, first_v: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, C) -> (B, N, C)."""
        y, handed = self.attended(self.norm1(x), first_v=first_v)
        x = self.feed(x + self.drop_path(self.edited(self.gamma_1 * y, x)))
        return x if handed is None else (x, handed)

    def feed(self, x: Tensor) -> Tensor:
        """The branch of the MLP: (B, N, C) -> (B, N, C)."""
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class ClassBlock(ScaledBlock):
    """The same for the class token alone, which attends to the patches.

    context: "all": token and patches are normed together, and the token attends to itself as well
        (CaiT's). "patches": the token alone is normed; it attends to the patches as they are (the
        small-image form of the Gaussian mixture mask's code).
    Shapes: token (B, 1, C), patches (B, N, C) -> token (B, 1, C).
    """

    def __init__(self, *args, context: str = "all", **options):
        super().__init__(*args, **options)
        self.context = check_choice("cait: class_context", context, CONTEXTS)

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """token (B, 1, C), patches (B, N, C) -> (B, 1, C)."""
        if self.context == "all":
            patches = self.norm1(torch.cat([token, patches], dim=1))
            query = patches[:, :1]
        else:
            query = self.norm1(token)
        return self.feed(token + self.drop_path(self.gamma_1 * self.attn(query, patches)))

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for `tokens` patches."""
        context = tokens + (self.context == "all")
        return (
            self.attn.flops(context)
            + 2 * self.dim * self.hidden
            + (context + 1 if self.context == "all" else 2) * self.dim
        )


@BACKBONES.register("cait")
class CaiT(TokenTransformer):
    """Patch blocks, then class blocks; the head sees the class token.

    Args:
        img_size, patch_size: an int or (rows, columns).
        depth, class_depth: blocks of each kind.
        head_dim: channels of a head; None is embed_dim / num_heads.
        layer_scale: initial gamma of all branches, or "depth": 0.1 up to block 18, 1e-5 up to 24,
            then 1e-6.
        mixing: initial values of the head mixings, "small" as released, "normal" (N(0, 1)) or
            "identity".
        mixing_bias: they have one.
        class_context: what the class token attends to, see ClassBlock.
        class_mixing: heads mix in the class blocks as well.
        drop_path_rate: of the patch blocks, drop_path_profile constant or linear; the class blocks
            have none.
        attention: modifies the patch blocks; the class blocks have a single query without a place
            on the grid and stay as they are.
    Shapes: (B, in_chans, H, W) -> (B, num_classes), or pooled features (B, embed_dim) where
        num_classes is 0. State-dict keys are timm's.
    Raises: ValueError for what cannot be, with the reason.
    Source: CaiT, arXiv:2103.17239. The small-image form is that of
        github.com/CatworldLee/Gaussian-Mixture-Mask-Attention.
    """

    optional_settings = TokenTransformer.optional_settings - {"MODEL.ATTENTION.BACKEND"}
    section = "CAIT"

    @classmethod
    def from_config(cls, config, num_classes: int) -> "CaiT":
        """See the base."""
        node = config.MODEL.CAIT
        return super().from_config(
            config,
            num_classes,
            patch_size=pixels(node.PATCH_SIZE),
            depth=node.DEPTH,
            num_heads=node.NUM_HEADS,
            head_dim=node.HEAD_DIM,
            class_depth=node.CLASS_DEPTH,
            mixing=node.MIXING,
            mixing_bias=node.MIXING_BIAS,
            class_context=node.CLASS_CONTEXT,
            class_mixing=node.CLASS_MIXING,
            layer_scale=node.LAYER_SCALE,
        )

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int | Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        num_heads: int = 4,
        *,
        head_dim: int | None = None,
        class_depth: int = 2,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mixing: str = "small",
        mixing_bias: bool = True,
        class_context: str = "all",
        class_mixing: bool = False,
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_profile: str = "linear",
        layer_scale: float | str = 1e-5,
        use_checkpoint: bool = False,
        attention: AttentionSpec | None = None,
    ):
        super().__init__(
            img_size, patch_size, in_chans, num_classes, embed_dim, drop_rate, use_checkpoint
        )
        spec = attention or AttentionSpec()
        hidden = int(embed_dim * mlp_ratio)
        norm = partial(nn.LayerNorm, eps=norm_eps)
        geometry = Geometry(
            embed_dim, num_heads, self.patch_embed.patches_resolution, head_dim=head_dim or 0
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
        self.blocks = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, depth, drop_path_profile)
        for number, rate in enumerate(rates, 1):
            place = replace(geometry, block=number - 1)
            attn = TalkingHeadsAttention(
                place, spec, qkv_bias, None, drop_rate, mixing, mixing_bias
            )
            gamma = gamma_at(layer_scale, number)
            self.blocks.append(ScaledBlock(embed_dim, attn, hidden, drop_rate, rate, gamma, norm))
        self.blocks_token_only = nn.ModuleList()
        class_mixing = mixing if class_mixing else None
        for number in range(1, class_depth + 1):
            attn = ClassAttention(
                geometry, qkv_bias, drop_rate, spec.drop, class_mixing, mixing_bias
            )
            gamma = gamma_at(layer_scale, number)
            self.blocks_token_only.append(
                ClassBlock(
                    embed_dim, attn, hidden, drop_rate, 0.0, gamma, norm, context=class_context
                )
            )
        self.norm = norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.initialise()

    def initialise_weights(self) -> None:
        """The general rule; position embedding and class token as timm's."""
        super().initialise_weights()
        trunc_normal(self.pos_embed, 0.02)
        trunc_normal(self.cls_token, 0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the class token after its last block and `norm`, (B,
        embed_dim).
        """
        x = self.run(self.blocks, self.pos_drop(self.patch_embed(x) + self.pos_embed))
        token = self.cls_token.expand(len(x), -1, -1)
        for block in self.blocks_token_only:
            token = block(token, x)
        return self.norm(token[:, 0])

    def flops(self) -> int:
        """Multiply-accumulates for one image, attention products and head mixings included."""
        tokens = self.patch_embed.num_patches
        blocks = sum(block.flops(tokens) for block in (*self.blocks, *self.blocks_token_only))
        return self.embed_flops() + blocks + self.head_flops()

    def layer_groups(self) -> list[list[str]]:
        """See the base; the class blocks come last."""
        last = [[f"blocks_token_only.{index}"] for index in range(len(self.blocks_token_only))]
        return super().layer_groups() + last

    def position_names(self) -> set[str]:
        """Position embedding and class token."""
        return {"pos_embed", "cls_token"}


def gamma_at(layer_scale: float | str, number: int) -> float:
    """The initial gamma of block `number`, counted from 1."""
    if layer_scale != "depth":
        return layer_scale
    return next(gamma for last, gamma in BY_DEPTH if number <= last)
