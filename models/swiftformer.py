"""SwiftFormer (arXiv:2303.15446): convolution encoders, and one block of additive attention at the
end of each stage.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.mixers import MIXERS
from models.base.backbone import BACKBONES, Backbone, attention_spec
from models.base.options import pixels
from models.layers.drop_path import drop_path_rates, stochastic_depth
from models.layers.init import trunc_normal
from registry import check_choice, parse_call

SIZES = {
    "xs": dict(embed_dims=(48, 56, 112, 220), depths=(3, 3, 6, 4)),
    "s": dict(embed_dims=(48, 64, 168, 224), depths=(3, 3, 9, 6)),
    "l1": dict(embed_dims=(48, 96, 192, 384), depths=(4, 3, 10, 5)),
    "l3": dict(embed_dims=(64, 128, 320, 512), depths=(4, 4, 12, 6)),
}


class LayerScale2d(nn.Module):
    """x * gamma, one factor a channel.

    Shapes: (B, C, H, W) -> (B, C, H, W); gamma (C, 1, 1).
    """

    def __init__(self, dim: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gamma


class ConvNorm(nn.Module):
    """A 3 x 3 convolution of stride 2 and a batch norm: (B, C, H, W) -> (B, out_dim, ceil(H / 2),
    ceil(W / 2)).
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))."""
        return self.norm(self.proj(x))

    def flops(self, pixels: int) -> int:
        """Multiply-accumulates for `pixels` pixels of the result."""
        return pixels * self.proj.weight.numel()


class ConvEncoder(nn.Module):
    """x + gamma * pwconv2(gelu(pwconv1(norm(dwconv(x))))): a 3 x 3 depthwise convolution, then a
    channel MLP.

    hidden: the width between the 1 x 1 convolutions. gamma starts at 1; layer_scale False leaves it
        out.
    Shapes: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, dim: int, hidden: int, drop_path: float = 0.0, layer_scale: bool = True):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.pwconv1 = nn.Conv2d(dim, hidden, 1)
        self.pwconv2 = nn.Conv2d(hidden, dim, 1)
        self.layer_scale = LayerScale2d(dim, 1.0) if layer_scale else nn.Identity()
        self.drop_path = stochastic_depth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.drop_path(self.layer_scale(y))

    def flops(self, pixels: int) -> int:
        """Multiply-accumulates of the convolutions for `pixels` pixels."""
        return pixels * sum(
            layer.weight.numel() for layer in (self.dwconv, self.pwconv1, self.pwconv2)
        )


class ConvMlp(nn.Module):
    """drop(fc2(drop(gelu(fc1(norm1(x)))))) with 1 x 1 convolutions and a batch norm: (B, C, H, W)
    -> (B, C, H, W).
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm1(x))))))

    def flops(self, pixels: int) -> int:
        """Multiply-accumulates of the convolutions for `pixels` pixels."""
        return pixels * (self.fc1.weight.numel() + self.fc2.weight.numel())


class SwiftFormerBlock(nn.Module):
    """A narrow convolution encoder, then x + gamma1 * attention(x), then x + gamma2 * mlp(x).

    layer_scale: the initial gammas, or None to leave them out (also the encoder's, which starts at
        1).
    Shapes: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        attention: str,
        num_heads: int,
        drop: float,
        drop_path: float,
        layer_scale: float | None,
    ):
        super().__init__()
        self.local_representation = ConvEncoder(dim, dim, layer_scale=layer_scale is not None)
        self.attn = MIXERS.create(attention, dim, num_heads)
        self.linear = ConvMlp(dim, hidden, drop)
        self.drop_path = stochastic_depth(drop_path)
        self.layer_scale_1 = (
            nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale)
        )
        self.layer_scale_2 = (
            nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale)
        )

    def attend(self, x: Tensor) -> Tensor:
        """The attention alone, (B, C, H, W) -> (B, C, H, W)."""
        grid = tuple(x.shape[-2:])
        return self.attn(x.flatten(2).transpose(1, 2), grid).transpose(1, 2).unflatten(2, grid)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.local_representation(x)
        x = x + self.drop_path(self.layer_scale_1(self.attend(x)))
        return x + self.drop_path(self.layer_scale_2(self.linear(x)))

    def flops(self, pixels: int) -> int:
        """Multiply-accumulates of convolutions and linear layers for `pixels` pixels."""
        return (
            self.local_representation.flops(pixels)
            + self.attn.flops(pixels)
            + self.linear.flops(pixels)
        )


class SwiftFormerStage(nn.Module):
    """A downsampling (Identity in the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2), or the same size in the first stage."""
        return self.blocks(self.downsample(x))

    def flops(self, pixels: int) -> int:
        """Multiply-accumulates for `pixels` pixels of the result."""
        first = 0 if isinstance(self.downsample, nn.Identity) else self.downsample.flops(pixels)
        return first + sum(block.flops(pixels) for block in self.blocks)


@BACKBONES.register("swiftformer")
class SwiftFormer(Backbone):
    """Four stages on maps of 1/4, 1/8, 1/16 and 1/32 of the image.

    Args:
        img_size: what `flops` assumes; the model takes any size.
        embed_dims, depths: channels and blocks of each stage.
        vit_num: blocks with attention at the end of each stage; the others are convolution
            encoders.
        attention: the mixer, "name(option=value)" (models/attention/mixers).
        num_heads: per stage, for mixers that have heads.
        drop_rate: dropout before the heads and in the MLPs.
        drop_path_rate: of the last block; 0 in the published recipe.
        drop_path_profile: linear from 0 over the blocks, or constant.
        layer_scale: initial value of the gammas of attention and MLP, None leaves all out.
        distillation: a second head. The logits are the mean of both; `forward_heads` gives each.
    Shapes: (B, in_chans, H, W) -> (B, num_classes), or pooled features (B, embed_dims[-1]) where
        num_classes is 0. State-dict keys are timm's. Published parameter counts include the second
        head.
    Source: SwiftFormer, arXiv:2303.15446; widths and depths of the released code.
    """

    head_names = ("head", "head_dist")
    optional_settings = frozenset(("MODEL.DROP_PATH_PROFILE", "MODEL.ATTENTION.MIXER"))

    @classmethod
    def from_config(cls, config, num_classes: int) -> "SwiftFormer":
        """See the base."""
        model, node = config.MODEL, config.MODEL.SWIFTFORMER
        spec = attention_spec(config, own="efficient_additive")
        if spec.mixer == "softmax":
            raise ValueError(
                "MODEL.ATTENTION.MIXER softmax: swiftformer attends on maps of up to a quarter of"
                " the image's sides, too many tokens for N x N maps; leave it at auto, which is"
                " efficient_additive here"
            )
        return cls(
            img_size=pixels(config.DATA.IMG_SIZE),
            in_chans=node.IN_CHANS,
            num_classes=num_classes,
            embed_dims=list(node.EMBED_DIMS),
            depths=list(node.DEPTHS),
            mlp_ratio=node.MLP_RATIO,
            vit_num=node.VIT_NUM,
            attention=spec.mixer,
            num_heads=list(node.NUM_HEADS),
            drop_rate=model.DROP_RATE,
            drop_path_rate=model.DROP_PATH_RATE,
            drop_path_profile=model.DROP_PATH_PROFILE,
            layer_scale=node.LAYER_SCALE,
            distillation=node.DISTILL_HEAD,
        )

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (48, 56, 112, 220),
        depths: Sequence[int] = (3, 3, 6, 4),
        *,
        mlp_ratio: float = 4.0,
        vit_num: int = 1,
        attention: str = "efficient_additive",
        num_heads: Sequence[int] = (),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_profile: str = "linear",
        layer_scale: float | None = 1e-5,
        distillation: bool = True,
    ):
        super().__init__()
        num_heads = num_heads or [1] * len(depths)
        if not len(embed_dims) == len(depths) == len(num_heads):
            raise ValueError(
                f"swiftformer: embed_dims {list(embed_dims)}, depths {list(depths)} and num_heads"
                f" {list(num_heads)} must have one entry per stage each"
            )
        if max(num_heads) > 1 and not MIXERS[parse_call(attention)[0]].has_heads:
            raise ValueError(
                f"swiftformer: num_heads {list(num_heads)} has no meaning for mixer {attention},"
                " which has no heads; leave it out"
            )
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.depths = tuple(depths)
        first = embed_dims[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, first // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(first // 2),
            nn.ReLU(),
            nn.Conv2d(first // 2, first, 3, stride=2, padding=1),
            nn.BatchNorm2d(first),
            nn.ReLU(),
        )
        rates = iter(drop_path_rates(drop_path_rate, sum(depths), drop_path_profile))
        stages = []
        for stage, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            hidden = int(dim * mlp_ratio)
            heads = num_heads[stage]
            blocks = [
                ConvEncoder(dim, hidden, next(rates), layer_scale is not None)
                for _ in range(depth - vit_num)
            ]
            blocks += [
                SwiftFormerBlock(dim, hidden, attention, heads, drop_rate, next(rates), layer_scale)
                for _ in range(depth - len(blocks))
            ]
            downsample = ConvNorm(embed_dims[stage - 1], dim) if stage else nn.Identity()
            stages.append(SwiftFormerStage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head_dist = None
        if num_classes and distillation:
            self.head_dist = nn.Linear(self.num_features, num_classes)
        self.initialise()

    def initialise_weights(self) -> None:
        """The released code's rule: weights trunc_normal 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal(module.weight, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor, return_stages: bool = False) -> Tensor | list[Tensor]:
        """(B, in_chans, H, W) -> pooled features (B, embed_dims[-1]); with `return_stages` the map
        of each stage, the last normalised.
        """
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x = self.norm(x)
        return [*maps[:-1], x] if return_stages else x.mean((2, 3))

    def forward_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_chans, H, W) -> logits of the head and of the distillation head; the same twice
        where there is one.
        """
        x = self.head_drop(self.forward_features(x))
        logits = self.head(x)
        return logits, logits if self.head_dist is None else self.head_dist(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes), the mean of both heads."""
        logits, distilled = self.forward_heads(x)
        return logits if distilled is logits else (logits + distilled) / 2

    def layer_groups(self) -> list[list[str]]:
        """See the base; a downsampling counts with the block before it."""
        groups = [["stem"]]
        for index, stage in enumerate(self.stages):
            groups[-1].append(f"stages.{index}.downsample")
            groups += [[f"stages.{index}.blocks.{block}"] for block in range(len(stage.blocks))]
        return groups

    def has_two_heads(self) -> bool:
        """Whether there is a distillation head."""
        return self.head_dist is not None

    def flops(self) -> int:
        """Multiply-accumulates of convolutions, linear layers and q w_g for one image; norms and
        activations are not counted.
        """
        height, width = self.img_size
        halvings = range(1, len(self.depths) + 2)
        pixels = [-(-height // 2**step) * -(-width // 2**step) for step in halvings]
        macs = pixels[0] * self.stem[0].weight.numel() + pixels[1] * self.stem[3].weight.numel()
        for stage, count in zip(self.stages, pixels[1:], strict=True):
            macs += stage.flops(count)
        for name in self.classifiers():
            macs += self.get_submodule(name).weight.numel()
        return macs


def swiftformer(size: str, **options) -> SwiftFormer:
    """A published size, xs, s, l1 or l3, with further `options` of SwiftFormer. Raises ValueError
    for another word.
    """
    published = SIZES[check_choice("swiftformer: size", size, SIZES)]
    return SwiftFormer(**{**published, **options})
