"""What `build_model` does for every family."""

import pytest
from torch import nn

from config import load_config
from models import build_model
from models.build import ModelError
from models.sasa_resnet import SasaResNet
from models.swiftformer import SwiftFormer
from optimizer import BlockTree
from tests.models.builders import FAMILIES, small

VIT = [
    "MODEL.TYPE",
    "vit",
    "DATA.IMG_SIZE",
    32,
    "MODEL.VIT.DEPTH",
    2,
    "MODEL.VIT.EMBED_DIM",
    12,
    "MODEL.VIT.NUM_HEADS",
    2,
]


def test_one_momentum_reaches_every_batch_norm():
    plain, slow = (
        build_model(
            load_config(
                None,
                [
                    *VIT,
                    "MODEL.ATTENTION.MODIFIERS",
                    ["re_attention"],
                    "MODEL.BN_MOMENTUM",
                    momentum,
                ],
            )
        )
        for momentum in (None, 1e-4)
    )
    own, set_ = (
        [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for model in (plain, slow)
    )
    assert own == [0.1, 0.1] and set_ == [1e-4, 1e-4]


def test_a_momentum_without_batch_norm_is_refused():
    with pytest.raises(
        ModelError,
        match="MODEL.BN_MOMENTUM 0.1: VisionTransformer has no BatchNorm; set it to None",
    ):
        build_model(load_config(None, [*VIT, "MODEL.BN_MOMENTUM", 0.1]))


@pytest.mark.parametrize("family", [*FAMILIES, "swiftformer", "sasa_resnet"])
def test_layer_decay_finds_the_blocks_of_every_family_in_the_order_of_the_forward_pass(family):
    others = {"swiftformer": SwiftFormer, "sasa_resnet": SasaResNet}
    model = others[family](num_classes=5) if family in others else small(family)
    tree = BlockTree.of(model)
    ids = {name: tree.layer_id(name) for name, _ in model.named_parameters()}
    assert sorted(set(ids.values())) == list(range(tree.last + 1))
    classifiers = {name for name in ids if name.split(".")[0] in ("head", "head_dist", "fc")}
    assert classifiers and {ids[name] for name in classifiers} == {tree.last}
    blocks = [depth for name, depth in ids.items() if "block" in name or name.startswith("layer1.")]
    assert blocks == sorted(blocks)
