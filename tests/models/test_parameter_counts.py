"""Exact parameter numbers and multiply-accumulates of the models whose results are published or
planned.
"""

import pytest

from models import SwinTransformer, SwinTransformerV2
from models.attention import AttentionSpec

TABLE = AttentionSpec(("qk_residual", "crpw(source=table)"))
MLP = AttentionSpec(("qk_residual", "crpw"))
SMALL, BASE = (
    dict(depths=(2, 2, 18, 2)),
    dict(depths=(2, 2, 18, 2), embed_dim=128, num_heads=(4, 8, 16, 32)),
)
V2_256 = dict(img_size=256, window_size=8)

COUNTS = {
    "Swin-T": (SwinTransformer, {}, 28_288_354, 4.4944),
    "Swin-S": (SwinTransformer, SMALL, 49_606_258, 8.7465),
    "Swin-B": (SwinTransformer, BASE, 87_768_224, 15.4385),
    "SwinV2-T w8": (SwinTransformerV2, V2_256, 28_347_154, 5.9257),
    "SwinV2-S w8": (SwinTransformerV2, {**V2_256, **SMALL}, 49_728_418, 11.5149),
    "SwinV2-B w8": (SwinTransformerV2, {**V2_256, **BASE}, 87_918_816, 20.2857),
    "SwinV2-T w16": (SwinTransformerV2, dict(img_size=256, window_size=16), 28_347_154, 6.6052),
    "Swin-T + QK residual": (
        SwinTransformer,
        dict(attention=AttentionSpec(("qk_residual",))),
        28_288_354,
        4.4944,
    ),
    "Swin-T + QK residual + table": (SwinTransformer, dict(attention=TABLE), 28_311_676, 4.4944),
    "Swin-T + QK residual + table + pre-MLP": (
        SwinTransformer,
        dict(attention=TABLE, pre_mlp="stem"),
        28_386_076,
        4.7256,
    ),
    "Swin-T + pre-MLP": (SwinTransformer, dict(pre_mlp="stem"), 28_362_754, 4.7256),
    "Swin-T + QK residual + CRPW": (SwinTransformer, dict(attention=MLP), 28_377_442, 4.4944),
    "SwinV2-T + QK residual + CRPW": (
        SwinTransformerV2,
        {**V2_256, "attention": MLP},
        28_436_242,
        5.9257,
    ),
    "SwinV2-T + QK residual + CRPW + pre-MLP": (
        SwinTransformerV2,
        {**V2_256, "attention": MLP, "pre_mlp": "stage"},
        34_713_202,
        7.1337,
    ),
}
BUILD_UP = {
    (True, 0): 997_096,
    (False, 1): 1_604_212,
    (True, 1): 2_195_956,
    (False, 2): 2_803_072,
    (True, 2): 3_394_816,
    (False, 3): 4_001_932,
    (True, 3): 4_593_676,
    (False, 4): 5_200_792,
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_exact_and_macs_agree_to_the_printed_digits(name):
    family, options, parameters, gmacs = COUNTS[name]
    model = family(**options)
    assert count(model) == parameters
    assert round(model.flops() / 1e9, 4) == gmacs


@pytest.mark.parametrize(("pre_mlp", "blocks"), BUILD_UP)
def test_build_up_networks_have_the_published_sizes(pre_mlp, blocks):
    model = SwinTransformerV2(
        256,
        embed_dim=384,
        depths=(blocks,),
        num_heads=(12,),
        window_size=8,
        mlp_ratio=2.0,
        attention=MLP,
        pretrained_window_sizes=(0,),
        pre_mlp="stage" if pre_mlp else "off",
        pre_mlp_ratio=2.0,
    )
    assert count(model) == BUILD_UP[pre_mlp, blocks]
