"""ViT, CaiT, PiT and T2T-ViT alike: modifiers at their neutral setting, weights of the plain model,
names, and what they refuse.
"""

import pytest
import timm
import torch

from checkpoint import load_weights
from config import load_config
from models import build_model
from models.attention import AttentionSpec
from models.build import ModelError
from tests.models.builders import randomise, small

NEUTRAL = (
    "gaussian_mixture_mask(init=identity)",
    "gaussian_mixture_mask(init=identity, position=post)",
    "elementwise_mask(init=ones)",
    "talking_heads",
    "refiner",
    "crpw",
    "crpw(source=table, apply=probs)",
)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
each_family = pytest.mark.parametrize("family", ("vit", "cait", "pit", "t2t"))


@each_family
@pytest.mark.parametrize("text", NEUTRAL)
def test_a_modifier_at_its_neutral_setting_is_the_plain_model_with_the_plain_weights(family, text):
    plain = randomise(small(family)).eval()
    model = small(family, attention=AttentionSpec((text,))).eval()
    report = load_weights(model, plain.state_dict())
    assert not report.missing
    assert not report.unexpected
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=1e-5)


@each_family
def test_the_qk_residual_is_the_identity_added_to_both_projections(family):
    options = {"modified": "blocks"} if family == "t2t" else {}
    model, fused = (
        randomise(small(family, attention=AttentionSpec(names), **options))
        for names in (("qk_residual",), ())
    )
    with torch.no_grad():
        for name, module in fused.named_modules():
            if name.endswith(".attn") and "patch_embed" not in name and hasattr(module, "qkv"):
                module.qkv.weight += torch.cat(
                    [
                        torch.eye(module.dim),
                        torch.eye(module.dim),
                        torch.zeros(module.dim, module.dim),
                    ]
                )
    torch.testing.assert_close(model(IMAGES), fused(IMAGES), rtol=1e-4, atol=1e-5)


@each_family
def test_several_modifiers_work_together_and_round_trip(family):
    spec = AttentionSpec(
        (
            "crpw",
            "gaussian_mixture_mask",
            "elementwise_mask(init=ones)",
            "talking_heads",
            "re_attention",
            "refiner",
        )
    )
    model, again = (
        randomise(small(family, attention=spec)).eval(),
        small(family, attention=spec).eval(),
    )
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=0, atol=0)


@each_family
def test_without_a_head_the_pooled_features_come_out(family):
    model = small(family, num_classes=0)
    assert model(IMAGES).shape == (2, model.num_features)


@each_family
def test_positions_and_class_tokens_are_not_decayed_and_masks_are(family):
    model = small(family, attention=AttentionSpec(("gaussian_mixture_mask",)))
    names = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    free = names & model.no_weight_decay()
    assert free == {name for name in names if name in ("pos_embed", "cls_token", "cls_pos")}
    assert any("gaussian_mixture_mask.alpha" in name for name in names - free)


@each_family
def test_activation_checkpointing_changes_no_gradient(family):
    gradients = []
    for use in (False, True):
        model = randomise(small(family, use_checkpoint=use))
        model(IMAGES).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@each_family
def test_stochastic_depth_follows_the_profile(family):
    model = small(family, drop_path_rate=0.2, drop_path_profile="constant")
    rates = [
        getattr(module.drop_path, "drop_prob", 0.0)
        for name, module in model.named_modules()
        if hasattr(module, "drop_path")
    ]
    assert rates == ([0.2, 0.2, 0.0] if family == "cait" else [0.2, 0.2])
    model = small(family, drop_path_rate=0.2, drop_path_profile="linear")
    rates = [
        getattr(module.drop_path, "drop_prob", 0.0)
        for name, module in model.named_modules()
        if hasattr(module, "drop_path")
    ]
    assert rates[:2] == pytest.approx([0.0, 0.2])


@each_family
@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.PRE_MLP.WHERE", "stem"),
        ("MODEL.SW_MLP", "shift"),
        ("MODEL.DYNAMIC_IMG_SIZE", "True"),
    ],
)
def test_options_of_windowed_models_are_refused(family, opts):
    with pytest.raises(ModelError, match=f"is for swin.* and swinv2; {family} has no such part"):
        build_model(load_config(None, ["MODEL.TYPE", family, "DATA.IMG_SIZE", 32, *opts]))


@pytest.mark.parametrize(
    ("name", "opts"),
    [
        ("vit_tiny_patch16_224", ["VIT.EMBED_DIM", 192, "VIT.NUM_HEADS", 3]),
        ("cait_xxs24_224", ["CAIT.EMBED_DIM", 192]),
        ("pit_ti_224", ["PIT.STRIDE", 8, "PIT.EMBED_DIM", 64, "PIT.NUM_HEADS", "[2, 4, 8]"]),
    ],
)
def test_a_yaml_s_keys_describe_timm_s_models_and_their_weights_load(name, opts):
    family = opts[0].split(".")[0]
    opts = [f"MODEL.{word}" if isinstance(word, str) and "." in word else word for word in opts]
    shallow = ["MODEL.PIT.DEPTHS", "[1, 2, 1]"] if family == "PIT" else [f"MODEL.{family}.DEPTH", 2]
    ours = build_model(
        load_config(
            None,
            [
                "MODEL.TYPE",
                family.lower(),
                "DATA.IMG_SIZE",
                64,
                "MODEL.DROP_PATH_RATE",
                0,
                *opts,
                *shallow,
            ],
        )
    )
    theirs = timm.create_model(name, img_size=64, depth=[1, 2, 1] if family == "PIT" else 2).eval()
    report = load_weights(ours.eval(), theirs.state_dict(), rule="exact")
    assert report.coverage == 1
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
