"""T2T-ViT (arXiv:2101.11986) for small images: soft splits with token transformers, frozen
positions, blocks, the mean of the tokens.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.window_attention.layout import Size, to_pair
from models.attention import AttentionSpec, Geometry, GlobalAttention
from models.attention.modifiers import BranchModifier
from models.base.backbone import BACKBONES
from models.base.token_block import TokenBlock
from models.base.tokens import TokenTransformer
from models.layers.drop_path import drop_path_rates
from models.layers.mlp import Mlp
from registry import check_choice

KERNEL, STRIDE, PADDING = 3, 2, 1  # of every soft split


class SkipAttention(GlobalAttention):
    """proj(softmax(..) v), plus v ("value") or the module's input ("input"), or nothing more
    ("none").

    With "value" the result is as wide as v, whatever the input: attention can so change the number
    of channels.
    Shapes: (B, N, C) -> (B, N, heads * D) with "value", else (B, N, C). State dict: qkv, proj.
    Raises: ValueError for another word, for a mixer instead of softmax attention, which has no v
        to add, and for a branch modifier beside a skip.
    Source: Tokens-to-Token ViT, arXiv:2101.11986, and its released code.
    """

    def __init__(
        self,
        geometry: Geometry,
        spec: AttentionSpec,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        skip: str = "value",
    ):
        if spec.mixer != "softmax":
            raise ValueError(
                f"t2t: mixer {spec.mixer} does not fit, as the token transformers change the width"
                " and skip by v; set MODEL.ATTENTION.MIXER softmax, or take MODEL.TYPE vit"
            )
        check_choice("t2t: skip", skip, ("none", "value", "input"))
        out_dim = geometry.inner if skip == "value" else geometry.dim
        super().__init__(geometry, spec, qkv_bias, qk_scale, proj_drop, out_dim)
        self.skip = skip
        if skip != "none" and (edits := self.names_of(BranchModifier)):
            raise ValueError(
                f"{', '.join(edits)} edits what a block adds to the residual stream, and this"
                " attention adds a skip of its own to that (in the blocks not with"
                " MODEL.T2T.PRESET paper)"
            )

    def finish(self, y: Tensor, x: Tensor, qkv: Tensor) -> Tensor:
        """The result of the projection with the skip."""
        if self.skip == "none":
            return y
        return y + (x if self.skip == "input" else qkv[..., 2 * self.geometry.inner :])


class NarrowingBlock(nn.Module):
    """x <- attn(norm1(x)), which changes the width and brings its own skip; then x + mlp(norm2(x)).

    Shapes: (B, N, dim) -> (B, N, out_dim).
    """

    def __init__(
        self, dim: int, attn: SkipAttention, out_dim: int, norm_eps: float, drop: float = 0.0
    ):
        super().__init__()
        self.dim = dim
        self.out_dim = out_dim
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(out_dim, norm_eps)
        self.mlp = Mlp(out_dim, out_dim, drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, out_dim)."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for one image; norms count once per number."""
        return self.attn.flops(tokens) + tokens * (2 * self.out_dim**2 + self.dim + self.out_dim)


def halved(grid: Size) -> Size:
    """The grid after a soft split."""
    return tuple((side + 2 * PADDING - KERNEL) // STRIDE + 1 for side in grid)


def soft_split(x: Tensor) -> Tensor:
    """Each 3 x 3 neighbourhood at every second place, (B, C, H, W) -> (B, ceil(H/2) * ceil(W/2), 9
    C); channel outermost.
    """
    return F.unfold(x, KERNEL, padding=PADDING, stride=STRIDE).transpose(1, 2)


class TokensToToken(nn.Module):
    """A soft split of the pixels; then, `count` times, a token transformer of one head and a soft
    split of its tokens; a projection.

    Args:
        count: token transformers; the grid is 2^-(count + 1) of the image.
        token_dim: their channels.
        input_scale: their logits are scaled by (input channels)^-0.5 instead of token_dim^-0.5.
        unused_norm: hold a LayerNorm `norm` that nothing uses and nothing trains.
        attention: modifies the token transformers.
    Shapes: (B, in_chans, H, W) of `img_size` -> (B, rows * columns, embed_dim). Raises ValueError
        for another image size.
    Source: Tokens-to-Token ViT, arXiv:2101.11986, section 3.1, with the splits of small images.
    """

    def __init__(
        self,
        img_size: int | Size,
        in_chans: int,
        embed_dim: int,
        token_dim: int,
        count: int,
        attention: AttentionSpec,
        qkv_bias: bool = False,
        input_scale: bool = False,
        unused_norm: bool = False,
        norm_eps: float = 1e-5,
        drop: float = 0.0,
    ):
        super().__init__()
        self.img_size = to_pair(img_size)
        self.count = count
        self.grids = [halved(self.img_size)]
        for number in range(1, count + 1):
            grid = self.grids[-1]
            dim = 9 * (in_chans if number == 1 else token_dim)
            scale = dim**-0.5 if input_scale else None
            geometry = Geometry(dim, 1, grid, head_dim=token_dim)
            attn = SkipAttention(geometry, attention, qkv_bias, scale, drop)
            block = NarrowingBlock(dim, attn, token_dim, norm_eps, drop)
            self.add_module(f"attention{number}", block)
            self.grids.append(halved(grid))
        self.patches_resolution = self.grids[-1]
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        width = 9 * (token_dim if count else in_chans)
        if unused_norm:
            self.norm = nn.LayerNorm(width, norm_eps).requires_grad_(False)
        self.project = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, rows * columns, embed_dim)."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"the images are {x.shape[-2]}x{x.shape[-1]} pixels, the model was built for "
                f"{self.img_size[0]}x{self.img_size[1]}; set DATA.IMG_SIZE"
            )
        x = soft_split(x)
        for number, grid in enumerate(self.grids[:-1], 1):
            x = self.get_submodule(f"attention{number}")(x)
            x = soft_split(x.transpose(1, 2).unflatten(2, grid))
        return self.project(x)

    def flops(self) -> int:
        """Multiply-accumulates for one image."""
        blocks = (self.get_submodule(f"attention{number}") for number in range(1, self.count + 1))
        macs = sum(
            block.flops(grid[0] * grid[1])
            for block, grid in zip(blocks, self.grids[:-1], strict=True)
        )
        project = self.project
        return macs + self.num_patches * project.in_features * project.out_features


def sinusoid(count: int, dim: int) -> Tensor:
    """(1, count, dim): sin(position / 10000^(2 (c // 2) / dim)) for even channels c, cos for odd
    ones.

    Source: Attention Is All You Need, arXiv:1706.03762, section 3.5. Worked out in float64.
    """
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None].float()


@BACKBONES.register("t2t")
class T2TViT(TokenTransformer):
    """Tokens-to-token, then blocks of global attention at one resolution; the head sees the mean of
    the tokens.

    Args:
        img_size: an int or (rows, columns).
        token_transformers: their number; the tokens' grid is 2^-(number + 1) of the image.
        token_dim: their channels.
        preset: "paper", or "release", what the code behind the published small-image results does:
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
        img_size: int | Size = 224,
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
        drop_path_rate: float = 0.1,
        drop_path_profile: str = "linear",
        use_checkpoint: bool = False,
        attention: AttentionSpec | None = None,
    ):
        release = check_choice("t2t: preset", preset, ("paper", "release")) == "release"
        spec = attention or AttentionSpec()
        whole = check_choice("t2t: modified", modified, ("all", "blocks")) == "all"
        token_spec = spec if whole else AttentionSpec()
        try:
            embed = TokensToToken(
                img_size,
                in_chans,
                embed_dim,
                token_dim,
                token_transformers,
                token_spec,
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
        skip = "none"
        if release:
            skip = "value" if num_heads == 1 else "input"
        hidden = int(embed_dim * mlp_ratio)
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.blocks = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, depth, drop_path_profile)
        for number, rate in enumerate(rates):
            place = replace(geometry, block=number)
            attn = SkipAttention(place, spec, qkv_bias, None, drop_rate, skip)
            self.blocks.append(
                TokenBlock(embed_dim, attn, hidden, drop_rate, rate, norm_layer=norm)
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
