"""ResNet with stand-alone self-attention (arXiv:1906.05909): local attention instead of the 3 x 3
convolutions.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.window_attention.layout import Size, to_pair
from models.attention.local import LocalAttention
from models.attention.local_stem import AttentionStem
from models.base.backbone import BACKBONES, Backbone, attention_spec
from models.base.options import pixels
from models.layers.drop_path import drop_path_rates, stochastic_depth
from registry import check_choice

DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3)}
STEMS = ("conv", "attention", "small")
EXPANSION = 4  # channels of a block per channel of its spatial layer


class Bottleneck(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1 x))))))) + shortcut(x)): 1 x 1, spatial, 1 x 1.

    Args:
        dim: channels of x.
        width: channels of the spatial layer; the result has 4 width.
        stride: of the spatial layer (ResNet v1.5).
        attention: options of LocalAttention, which then is the spatial layer conv2; None is a 3 x 3
            convolution.
    Shapes: (B, dim, H, W) -> (B, 4 width, ceil(H / stride), ceil(W / stride)). State-dict keys are
        torchvision's.
    Source: Deep Residual Learning, arXiv:1512.03385.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        stride: int = 1,
        attention: dict | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.width = width
        self.stride = stride
        out_dim = EXPANSION * width
        self.conv1 = nn.Conv2d(dim, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        if attention is None:
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        else:
            self.conv2 = LocalAttention(width, stride=stride, **attention)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_dim)
        self.downsample = None
        if stride > 1 or dim != out_dim:
            self.downsample = nn.Sequential(
                nn.Conv2d(dim, out_dim, 1, stride, bias=False), nn.BatchNorm2d(out_dim)
            )
        self.drop_path = stochastic_depth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, 4 width, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.drop_path(self.bn3(self.conv3(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut)

    def flops(self, before: int, after: int) -> int:
        """Multiply-accumulates for a map of `before` pixels that becomes one of `after`; attention
        works at the input's resolution.
        """
        macs = before * self.conv1.weight.numel() + after * self.conv3.weight.numel()
        if isinstance(self.conv2, LocalAttention):
            macs += self.conv2.flops(before)
        else:
            macs += after * self.conv2.weight.numel()
        if self.downsample is not None:
            macs += after * self.downsample[0].weight.numel()
        return macs


@BACKBONES.register("sasa_resnet")
class SasaResNet(Backbone):
    """Groups of bottlenecks with local attention or, where `conv_groups` names the group, 3 x 3
    convolutions (v1.5).

    Args:
        img_size: what `flops` assumes; the model takes any size.
        width: channels of the spatial layers in the first group; each later group has twice as
            many.
        depths: blocks per group.
        stem: conv (7 x 7, stride 2, max pooling), attention (AttentionStem; images in multiples of
            4 pixels), or small (3 x 3, stride 1, no pooling: for images of about 32 pixels).
        conv_groups: numbers of the groups, from 1, that stay convolutions.
        num_heads, kernel_size, rel, pad, scale, grouped, content: of LocalAttention.
        stem_heads, mixtures: of AttentionStem.
    Shapes: (B, in_chans, H, W) -> (B, num_classes), or pooled features (B, 4 width 2^(groups - 1))
        where num_classes is 0. State-dict keys are torchvision's; conv2 of a block may be
        attention, as may conv1 of the stem.
    Raises: ValueError for a group that does not exist, and for sizes that LocalAttention refuses.
    Source: Stand-Alone Self-Attention in Vision Models, arXiv:1906.05909, section 4.1.
    """

    head_names = ("fc",)
    optional_settings = frozenset(("MODEL.DROP_PATH_PROFILE", "MODEL.ATTENTION.MIXER"))

    @classmethod
    def from_config(cls, config, num_classes: int) -> "SasaResNet":
        """See the base."""
        model, node = config.MODEL, config.MODEL.SASA_RESNET
        mixer = attention_spec(config, own="local").mixer
        if mixer != "local":
            raise ValueError(
                f"MODEL.ATTENTION.MIXER {mixer}: sasa_resnet has local attention, whose options"
                " are keys of MODEL.SASA_RESNET; leave it at auto, or take MODEL.TYPE swin, vit or"
                " swiftformer"
            )
        return cls(
            img_size=pixels(config.DATA.IMG_SIZE),
            in_chans=node.IN_CHANS,
            num_classes=num_classes,
            width=node.WIDTH,
            depths=list(node.DEPTHS),
            stem=node.STEM,
            conv_groups=list(node.CONV_GROUPS),
            num_heads=node.NUM_HEADS,
            kernel_size=node.KERNEL_SIZE,
            rel=node.REL,
            pad=node.PAD,
            scale=node.SCALE,
            grouped=node.GROUPED,
            content=node.CONTENT,
            stem_heads=node.STEM_HEADS,
            mixtures=node.STEM_MIXTURES,
            drop_rate=model.DROP_RATE,
            drop_path_rate=model.DROP_PATH_RATE,
            drop_path_profile=model.DROP_PATH_PROFILE,
        )

    def __init__(
        self,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        width: int = 64,
        depths: Sequence[int] = DEPTHS[50],
        *,
        stem: str = "conv",
        conv_groups: Sequence[int] = (),
        num_heads: int = 8,
        kernel_size: int = 7,
        rel: str = "shared",
        pad: str = "mask",
        scale: str = "none",
        grouped: bool = False,
        content: bool = True,
        stem_heads: int = 4,
        mixtures: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_profile: str = "linear",
    ):
        super().__init__()
        strange = sorted(set(conv_groups) - set(range(1, len(depths) + 1)))
        if strange:
            raise ValueError(
                f"sasa_resnet: conv_groups names {strange}; there are groups 1 to {len(depths)}"
            )
        self.img_size = to_pair(img_size)
        self.num_classes = num_classes
        self.num_features = EXPANSION * width * 2 ** (len(depths) - 1)
        self.stem = check_choice("sasa_resnet: stem", stem, STEMS)
        if stem == "attention":  # it norms and pools itself
            self.conv1 = AttentionStem(in_chans, width, stem_heads, mixtures=mixtures)
            self.bn1 = nn.Identity()
            self.relu = nn.Identity()
            self.maxpool = nn.Identity()
        else:
            side, stride = (7, 2) if stem == "conv" else (3, 1)
            self.conv1 = nn.Conv2d(in_chans, width, side, stride, side // 2, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU()
            self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "conv" else nn.Identity()
        local = dict(
            num_heads=num_heads,
            kernel_size=kernel_size,
            rel=rel,
            pad=pad,
            scale=scale,
            grouped=grouped,
            content=content,
        )
        rates = iter(drop_path_rates(drop_path_rate, sum(depths), drop_path_profile))
        dim = width
        for group, depth in enumerate(depths):
            channels = width * 2**group
            attention = None if group + 1 in conv_groups else local
            blocks = []
            for block in range(depth):
                stride = 2 if group and not block else 1
                blocks.append(Bottleneck(dim, channels, stride, attention, next(rates)))
                dim = EXPANSION * channels
            self.add_module(f"layer{group + 1}", nn.Sequential(*blocks))
        self.groups = len(depths)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.initialise()

    def initialise_weights(self) -> None:
        """torchvision's rule for convolutions, normal with variance 2 / (out channels * area);
        projections of attention keep PyTorch's.
        """
        attention = {
            id(inner)
            for module in self.modules()
            if isinstance(module, LocalAttention)
            for inner in module.modules()
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and id(module) not in attention:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self) -> list[nn.Sequential]:
        """The groups in order."""
        return [self.get_submodule(f"layer{group + 1}") for group in range(self.groups)]

    def forward_features(self, x: Tensor, return_stages: bool = False) -> Tensor | list[Tensor]:
        """(B, in_chans, H, W) -> pooled features (B, num_features); with `return_stages` the map of
        each group.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in self.stages():
            x = stage(x)
            maps.append(x)
        return maps if return_stages else x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.fc(self.head_drop(self.forward_features(x)))

    def block_pixels(self) -> list[list[tuple[Bottleneck, int, int]]]:
        """For each group its blocks, each with the pixels of the map before and after it, for an
        image of img_size.
        """
        halvings = 0 if self.stem == "small" else 2  # of the sides before the first group
        before = self.pixels(halvings)
        groups = []
        for group, stage in enumerate(self.stages()):
            after = self.pixels(halvings + group)
            first, *others = stage
            groups.append([(first, before, after), *((block, after, after) for block in others)])
            before = after
        return groups

    def pixels(self, halvings: int) -> int:
        """Pixels of a map whose sides are those of img_size, halved that often and rounded up."""
        height, width = self.img_size
        return -(-height // 2**halvings) * -(-width // 2**halvings)

    def layer_groups(self) -> list[list[str]]:
        """See the base."""
        blocks = [
            [f"layer{group}.{block}"]
            for group, stage in enumerate(self.stages(), 1)
            for block in range(len(stage))
        ]
        return [["conv1", "bn1"], *blocks]

    def flops(self) -> int:
        """Multiply-accumulates of convolutions, linear layers, q · k and the sum of values for one
        image.

        The paper counts otherwise, see tools/sasa_cost.py.
        """
        if self.stem == "attention":
            macs = self.conv1.flops(self.pixels(0))
        else:
            halvings = 1 if self.stem == "conv" else 0
            macs = self.pixels(halvings) * self.conv1.weight.numel()
        macs += sum(
            block.flops(before, after)
            for group in self.block_pixels()
            for block, before, after in group
        )
        return macs + self.num_features * self.num_classes

    @property
    def head(self) -> nn.Module:
        """The classifier, by the name that all backbones share."""
        return self.fc


def sasa_resnet(layers: int, **options) -> SasaResNet:
    """A published depth, 26, 38 or 50, with further `options` of SasaResNet. Raises ValueError for
    another.
    """
    if layers not in DEPTHS:
        raise ValueError(
            f"sasa_resnet: there are {', '.join(map(str, DEPTHS))} layers, not {layers}; for others"
            " give depths"
        )
    return SasaResNet(depths=DEPTHS[layers], **options)
