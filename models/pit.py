"""PiT, the pooling-based vision transformer (arXiv:2103.16302): ViT blocks at resolutions that
halve from stage to stage.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.window_attention.layout import Size, to_pair
from models.attention import AttentionSpec, Geometry
from models.base.backbone import BACKBONES
from models.base.options import pixels
from models.base.tokens import TokenTransformer, token_block
from models.layers.drop_path import drop_path_rates
from models.layers.init import trunc_normal


class OverlapEmbed(nn.Module):
    """A convolution of the patch's size, moved by `stride` pixels, without padding.

    Shapes: (B, in_chans, H, W) of `img_size` -> (B, embed_dim, rows, columns). Raises ValueError
        for another image size.
    """

    def __init__(
        self,
        img_size: int | Size,
        patch_size: int | Size,
        stride: int | Size,
        in_chans: int,
        embed_dim: int,
    ):
        super().__init__()
        self.img_size = to_pair(img_size)
        patch = to_pair(patch_size)
        step = to_pair(stride)
        if any(side < wide for side, wide in zip(self.img_size, patch, strict=True)):
            raise ValueError(f"image size {self.img_size} is smaller than one patch of {patch}")
        self.patches_resolution = tuple(
            (side - wide) // by + 1
            for side, wide, by in zip(self.img_size, patch, step, strict=True)
        )
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.conv = nn.Conv2d(in_chans, embed_dim, patch, step)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, embed_dim, rows, columns)."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"the images are {x.shape[-2]}x{x.shape[-1]} pixels, the model was built for "
                f"{self.img_size[0]}x{self.img_size[1]}; set DATA.IMG_SIZE"
            )
        return self.conv(x)

    def flops(self) -> int:
        """Multiply-accumulates for one image."""
        return self.num_patches * self.conv.weight.numel()


class TokenPooling(nn.Module):
    """Halves the grid and widens the channels: a depthwise 3 x 3 convolution of stride 2 for the
    patches, a linear layer for class tokens.

    grid: (rows, columns) before.
    prefix: class tokens.
    pointwise: a 1 x 1 convolution after the depthwise one.
    Shapes: (B, prefix + rows * columns, dim) -> (B, prefix + ceil(rows / 2) * ceil(columns / 2),
        out_dim), out_dim a multiple of dim.
    """

    def __init__(self, dim: int, out_dim: int, grid: Size, prefix: int, pointwise: bool = False):
        super().__init__()
        self.grid = grid
        self.prefix = prefix
        self.pooled = tuple((side + 1) // 2 for side in grid)
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, groups=dim)
        self.proj = nn.Conv2d(out_dim, out_dim, 1) if pointwise else nn.Identity()
        self.fc = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + rows * columns, dim) -> (B, prefix + fewer, out_dim)."""
        tokens, patches = x[:, : self.prefix], x[:, self.prefix :]
        patches = self.proj(self.conv(patches.transpose(1, 2).unflatten(2, self.grid)))
        return torch.cat([self.fc(tokens), patches.flatten(2).transpose(1, 2)], dim=1)

    def flops(self) -> int:
        """Multiply-accumulates for one image."""
        pixels = self.pooled[0] * self.pooled[1]
        pointwise = 0 if isinstance(self.proj, nn.Identity) else self.proj.weight.numel()
        mixed = self.fc.in_features * self.fc.out_features  # quantized layers hide their weight
        return pixels * (self.conv.weight.numel() + pointwise) + self.prefix * mixed


class PoolingStage(nn.Module):
    """`pool` (None in the first stage), then `blocks`, over class tokens and patches together."""

    def __init__(self, pool: TokenPooling | None, blocks: list[nn.Module], tokens: int):
        super().__init__()
        self.pool = pool
        self.blocks = nn.ModuleList(blocks)
        self.tokens = tokens

    def flops(self) -> int:
        """Multiply-accumulates for one image."""
        pooling = 0 if self.pool is None else self.pool.flops()
        return pooling + sum(block.flops(self.tokens) for block in self.blocks)


@BACKBONES.register("pit")
class PiT(TokenTransformer):
    """Stages of blocks of global attention, with pooling between them that halves the grid and
    doubles the channels.

    Args:
        img_size, patch_size: an int or (rows, columns).
        stride: pixels between two patches; None is patch_size.
        embed_dim: channels of the first stage.
        depths, num_heads: per stage.
        head_dim: channels of a head; None is channels / heads.
        pointwise: a 1 x 1 convolution in the pooling.
        class_position: the class tokens have a position embedding, `cls_pos`.
        distilled: a second class token with a head of its own; the logits are the mean of both.
        drop_path_profile: linear from 0 to drop_path_rate, or constant.
    Shapes: (B, in_chans, H, W) -> (B, num_classes), or features of the (first) class token where
        num_classes is 0. Keys are timm's.
    Raises: ValueError for lists of different lengths.
    Source: Rethinking Spatial Dimensions of Vision Transformers, arXiv:2103.16302. pointwise and
        class_position are of the small-image form of
        github.com/CatworldLee/Gaussian-Mixture-Mask-Attention.
    """

    section = "PIT"
    head_names = ("head", "head_dist")

    @classmethod
    def from_config(cls, config, num_classes: int) -> "PiT":
        """See the base."""
        node = config.MODEL.PIT
        return super().from_config(
            config,
            num_classes,
            patch_size=pixels(node.PATCH_SIZE),
            depths=list(node.DEPTHS),
            num_heads=list(node.NUM_HEADS),
            stride=node.STRIDE,
            head_dim=node.HEAD_DIM,
            pointwise=node.POINTWISE,
            class_position=node.CLASS_POSITION,
            distilled=node.DISTILLED,
        )

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int | Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 144,
        depths: Sequence[int] = (2, 6, 4),
        num_heads: Sequence[int] = (3, 6, 12),
        *,
        stride: int | Size | None = None,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pointwise: bool = False,
        class_position: bool = False,
        distilled: bool = False,
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_profile: str = "linear",
        use_checkpoint: bool = False,
        attention: AttentionSpec | None = None,
    ):
        if len(depths) != len(num_heads):
            raise ValueError(
                f"pit: depths {list(depths)} and num_heads {list(num_heads)} must have one entry"
                " per stage each"
            )
        embed = OverlapEmbed(img_size, patch_size, stride or patch_size, in_chans, embed_dim)
        super().__init__(
            img_size, patch_size, in_chans, num_classes, embed_dim, drop_rate, use_checkpoint, embed
        )
        self.prefix = 1 + distilled
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.cls_token = nn.Parameter(torch.zeros(1, self.prefix, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, embed_dim, *embed.patches_resolution))
        self.cls_pos = (
            nn.Parameter(torch.zeros(1, self.prefix, embed_dim)) if class_position else None
        )
        rates = iter(drop_path_rates(drop_path_rate, sum(depths), drop_path_profile))
        grid = embed.patches_resolution
        stages = []
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**stage
            pool = TokenPooling(dim // 2, dim, grid, self.prefix, pointwise) if stage else None
            grid = pool.pooled if pool else grid
            geometry = Geometry(dim, heads, grid, prefix=self.prefix, head_dim=head_dim or 0)
            blocks = [
                token_block(
                    replace(geometry, block=number),
                    attention or AttentionSpec(),
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop=drop_rate,
                    drop_path=next(rates),
                    norm_eps=norm_eps,
                )
                for number in range(depth)
            ]
            stages.append(PoolingStage(pool, blocks, self.prefix + grid[0] * grid[1]))
        self.transformers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.num_features, norm_eps)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head_dist = (
            nn.Linear(self.num_features, num_classes) if num_classes and distilled else None
        )
        self.initialise()

    def initialise_weights(self) -> None:
        """The general rule; position embeddings and class tokens trunc_normal 0.02."""
        super().initialise_weights()
        for positions in (self.pos_embed, self.cls_token, self.cls_pos):
            if positions is not None:
                trunc_normal(positions, 0.02)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the class tokens after the last stage and `norm`, (B, prefix,
        num_features).
        """
        x = (self.patch_embed(x) + self.pos_embed).flatten(2).transpose(1, 2)
        token = self.cls_token if self.cls_pos is None else self.cls_token + self.cls_pos
        x = self.pos_drop(torch.cat([token.expand(len(x), -1, -1), x], dim=1))
        for stage in self.transformers:
            x = self.run(stage.blocks, x if stage.pool is None else stage.pool(x))
        return self.norm(x[:, : self.prefix])

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the class token, (B, num_features)."""
        return self.forward_tokens(x)[:, 0]

    def forward_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_chans, H, W) -> logits of the head and of the distillation head; the same twice
        where there is one.
        """
        tokens = self.forward_tokens(x)
        logits = self.head(tokens[:, 0])
        return logits, logits if self.head_dist is None else self.head_dist(tokens[:, 1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes), the mean of both heads."""
        logits, distilled = self.forward_heads(x)
        return logits if distilled is logits else (logits + distilled) / 2

    def flops(self) -> int:
        """Multiply-accumulates for one image, attention products included."""
        heads = self.prefix if self.head_dist is not None else 1
        return (
            self.embed_flops()
            + sum(stage.flops() for stage in self.transformers)
            + heads * self.head_flops()
        )

    def layer_groups(self) -> list[list[str]]:
        """See the base; a pooling counts with the block before it."""
        groups = [["patch_embed", *sorted(self.position_names())]]
        for index, stage in enumerate(self.transformers):
            groups[-1].append(f"transformers.{index}.pool")
            blocks = range(len(stage.blocks))
            groups += [[f"transformers.{index}.blocks.{block}"] for block in blocks]
        return groups

    def hidden_names(self) -> list[str]:
        """The blocks alone; the pooling's matrix sees no patches."""
        return [name for name in super().hidden_names() if not name.endswith(".pool")]

    def has_two_heads(self) -> bool:
        """Whether it is distilled."""
        return self.head_dist is not None

    def position_names(self) -> set[str]:
        """Position embeddings and class tokens."""
        return {"pos_embed", "cls_token", "cls_pos"}
