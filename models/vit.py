"""Vision Transformer (arXiv:2010.11929): patches, a position embedding, blocks of global attention,
a head.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.window_attention.layout import Size
from models.attention import AttentionSpec, Geometry
from models.base.backbone import BACKBONES
from models.base.options import pixels
from models.base.tokens import TokenTransformer, token_block
from models.layers.drop_path import drop_path_rates
from models.layers.init import own_random_numbers, trunc_normal
from registry import check_choice


@BACKBONES.register("vit")
class VisionTransformer(TokenTransformer):
    """Blocks of global attention at one resolution.

    Args:
        img_size, patch_size: an int or (rows, columns).
        head_dim: channels of a head; None is embed_dim / num_heads.
        class_token: a learned token in front of the patches.
        pool: token (the class token after `norm`) or mean (over the patches, then `fc_norm`).
        drop_path_profile: linear from 0 to drop_path_rate, or constant.
        layer_scale: initial gamma of both branches of every block; None leaves it out.
        registers: learned tokens behind the class token, without a position; they attend and are
            attended to as it is, and are dropped at the end.
        attention: what is modified or used instead.
    Shapes: (B, in_chans, H, W) -> (B, num_classes), or pooled features (B, embed_dim) where
        num_classes is 0. State-dict keys are timm's; pos_embed is (1, class token + patches,
        embed_dim), reg_token (1, registers, embed_dim).
    Source: arXiv:2010.11929; registers: Vision Transformers Need Registers, arXiv:2309.16588.
    """

    section = "VIT"

    @classmethod
    def from_config(cls, config, num_classes: int) -> "VisionTransformer":
        """See the base."""
        node = config.MODEL.VIT
        return super().from_config(
            config,
            num_classes,
            patch_size=pixels(node.PATCH_SIZE),
            depth=node.DEPTH,
            num_heads=node.NUM_HEADS,
            head_dim=node.HEAD_DIM,
            class_token=node.CLASS_TOKEN,
            pool=node.POOL,
            layer_scale=node.LAYER_SCALE,
            registers=node.REGISTERS,
        )

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int | Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        *,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = True,
        pool: str = "token",
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_profile: str = "linear",
        layer_scale: float | None = None,
        registers: int = 0,
        use_checkpoint: bool = False,
        attention: AttentionSpec | None = None,
    ):
        super().__init__(
            img_size, patch_size, in_chans, num_classes, embed_dim, drop_rate, use_checkpoint
        )
        if check_choice("vit: pool", pool, ("token", "mean")) == "token" and not class_token:
            raise ValueError(
                "vit: pool=token needs class_token=True; without a class token use pool=mean"
            )
        self.pool = pool
        if registers < 0:
            raise ValueError(f"vit: registers is {registers}; it must be at least 0")
        self.prefix = class_token + registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        tokens = class_token + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        geometry = Geometry(
            embed_dim,
            num_heads,
            self.patch_embed.patches_resolution,
            prefix=self.prefix,
            head_dim=head_dim or 0,
        )
        rates = drop_path_rates(drop_path_rate, depth, drop_path_profile)
        self.blocks = nn.ModuleList(
            token_block(
                replace(geometry, block=number),
                attention or AttentionSpec(),
                mlp_ratio,
                qkv_bias=qkv_bias,
                drop=drop_rate,
                drop_path=rate,
                layer_scale=layer_scale,
                norm_eps=norm_eps,
            )
            for number, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(embed_dim, norm_eps) if pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, norm_eps) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.initialise()

    def initialise_weights(self) -> None:
        """The general rule; position embedding, class token and registers as timm's."""
        super().initialise_weights()
        trunc_normal(self.pos_embed, 0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            with own_random_numbers("registers"):  # those of other parts stay the same
                nn.init.normal_(self.reg_token, std=1e-6)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> tokens after the last block and `norm`, (B, prefix + L,
        embed_dim).
        """
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self._with_registers(x + self.pos_embed)
        return self.norm(self.run(self.blocks, self.pos_drop(x)))

    def _with_registers(self, x: Tensor) -> Tensor:
        """The registers behind the class token: (B, class token + L, C) -> (B, prefix + L, C)."""
        if self.reg_token is None:
            return x
        registers = self.reg_token.expand(len(x), -1, -1)
        front = self.prefix - registers.shape[1]
        return torch.cat([x[:, :front], registers, x[:, front:]], dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> pooled features (B, embed_dim)."""
        x = self.forward_tokens(x)
        pooled = x[:, 0] if self.pool == "token" else x[:, self.prefix :].mean(1)
        return self.fc_norm(pooled)

    def flops(self) -> int:
        """Multiply-accumulates for one image, attention products included."""
        tokens = self.prefix + self.patch_embed.num_patches
        return (
            self.embed_flops()
            + sum(block.flops(tokens) for block in self.blocks)
            + self.head_flops()
        )

    def position_names(self) -> set[str]:
        """Position embedding, class token and registers."""
        return {"pos_embed", "cls_token", "reg_token"}
