"""What stand-alone self-attention costs, counted as its paper counts (arXiv:1906.05909): a
multiplication and an addition are two FLOPs.

    python tools/sasa_cost.py                          published networks; a layer and a 3 x 3 one
    python tools/sasa_cost.py --dim 128 --kernel 19    one layer
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.attention.local import LocalAttention  # noqa: E402
from models.sasa_resnet import DEPTHS, SasaResNet, sasa_resnet  # noqa: E402

ALL_GROUPS = (1, 2, 3, 4)


def paper_flops(model: SasaResNet, per_position: int = 5) -> int:
    """FLOPs of a network for one image; norms and softmax count nothing.

    per_position: 5 k² d per pixel of attention: 2 for q · k, 2 for the sum of values, 1 to add the
        position to the key (there is none to add where the keys are left out). 4 leaves that out
        everywhere.
    """
    positions = 0
    for block, before, _ in (entry for group in model.block_pixels() for entry in group):
        if isinstance(block.conv2, LocalAttention) and block.conv2.key is not None:
            positions += before * block.conv2.kernel_size**2 * block.width
    return 2 * model.flops() + (per_position - 4) * positions


def layer_flops(dim: int, kernel_size: int, per_position: int = 4, attention: bool = True) -> int:
    """FLOPs per pixel of one layer of `dim` channels: attention 2 * 3 d² + per_position k² d, a
    convolution 2 k² d².

    At 128 channels a 3 x 3 convolution is a little dearer than attention over 19 x 19 pixels
    counted with 4, 17 x 17 with 5.
    """
    area = kernel_size**2
    return 6 * dim**2 + per_position * area * dim if attention else 2 * area * dim**2


def print_networks() -> None:
    """Parameters and FLOPs of each published network."""
    kinds = {
        "convolution": dict(conv_groups=ALL_GROUPS),
        "conv-stem + attention": {},
        "full attention": dict(stem="attention"),
    }
    for layers in DEPTHS:
        for kind, options in kinds.items():
            with torch.device("meta"):
                model = sasa_resnet(layers, **options)
            parameters = sum(p.numel() for p in model.parameters())
            print(
                f"ResNet-{layers:<3} {kind:22} {parameters:>11,} parameters "
                f" {paper_flops(model) / 1e9:.3f} GFLOPs ({paper_flops(model, 4) / 1e9:.3f} without"
                " adding positions)"
            )


def main() -> None:
    """Prints what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, help="channels of one layer")
    parser.add_argument("--kernel", type=int, default=7, help="side of its neighbourhood, pixels")
    args = parser.parse_args()
    if args.dim is None:
        print_networks()
    dim = args.dim or 128
    attention, convolution = (
        (layer_flops(dim, args.kernel, each) for each in (4, 5)),
        layer_flops(dim, 3, attention=False),
    )
    print(
        f"a layer of {dim} channels, FLOPs per pixel: 3 x 3 convolution {convolution:,}, attention"
        f" over {args.kernel} x {args.kernel} pixels {{:,}} (4 k² d) or {{:,}} (5 k² d)".format(
            *attention
        )
    )


if __name__ == "__main__":
    main()
