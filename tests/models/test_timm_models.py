"""timm's transformers with their attention exchanged: the same keys, logits and gradients, and
every modification on top.
"""

import copy

import pytest
import timm
import torch

from checkpoint import CheckpointError, load_weights, read_weights, save_weights
from config import load_config
from models import build_model, timm_model
from models.attention import AttentionSpec
from models.attention.modifiers import MODIFIERS, TermModifier
from models.attention.softmax import SoftmaxAttention
from models.build import ModelError
from models.timm_models import FITTING
from optimizer import LayerIds, parameter_groups
from tests.models.builders import EVERYWHERE, randomise

SMALL = "depth=2, embed_dim=48, num_heads=4"
MODELS = {  # a name that pytest shows -> timm model with options
    "vit": f"vit_tiny_patch16_224(patch_size=8, {SMALL})",
    "vit without class token": (
        f"vit_small_patch16_224(patch_size=8, {SMALL}, class_token=False, global_pool='avg')"
    ),
    "vit with registers": (
        f"vit_small_patch16_224(patch_size=8, {SMALL}, reg_tokens=3, no_embed_class=True)"
    ),
    "vit with attention pooling": (
        f"vit_small_patch16_224(patch_size=8, {SMALL}, class_token=False, global_pool='map')"
    ),
    "vit with normed q and k": (
        f"vit_small_patch16_224(patch_size=8, {SMALL}, qk_norm=True, init_values=0.5)"
    ),
    "vit with normed results": (
        f"vit_small_patch16_224(patch_size=8, {SMALL}, scale_attn_norm=True, scale_mlp_norm=True)"
    ),
    "vit without biases": (
        f"vit_small_patch16_224(patch_size=8, {SMALL}, qkv_bias=False, proj_bias=False)"
    ),
    "deit distilled": f"deit_tiny_distilled_patch16_224(patch_size=8, {SMALL})",
    "deit3": f"deit3_small_patch16_224(patch_size=8, {SMALL})",
    "beit": f"beit_base_patch16_224(patch_size=8, {SMALL})",
    "beitv2": f"beitv2_base_patch16_224(patch_size=8, {SMALL}, use_abs_pos_emb=True)",
    "cait": f"cait_xxs24_224(patch_size=8, {SMALL}, depth_token_only=1)",
}
SIZE = (32, 24)  # a grid of 4 x 3 patches


def options_of(text: str) -> tuple[str, dict]:
    name, _, rest = text.partition("(")
    return name, eval(f"dict({rest}")


def theirs(text: str) -> torch.nn.Module:
    name, options = options_of(text)
    return timm.create_model(name, num_classes=5, img_size=SIZE, **options)


def ours(text: str, *modifiers: str, **options) -> torch.nn.Module:
    options = {"drop_path_rate": 0.0, **options}
    return timm_model(text, 5, SIZE, attention=AttentionSpec(modifiers), **options)


def gradients(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name],
            wanted[name],
            rtol=1e-4,
            atol=1e-5 * max(1, wanted[name].abs().max().item()),
            msg=name,
        )


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_timms_weights_load_strictly_and_give_the_same_logits_and_gradients(self, name):
        reference, model = randomise(theirs(MODELS[name]), std=0.1), ours(MODELS[name])
        model.load_state_dict(reference.state_dict(), strict=True)
        images = torch.randn(2, 3, *SIZE)
        assert any(isinstance(module, SoftmaxAttention) for module in model.modules())
        torch.testing.assert_close(
            model.eval()(images), reference.eval()(images), rtol=1e-5, atol=1e-5
        )
        assert_same_gradients(
            gradients(model.train(), images), gradients(reference.train(), images)
        )

    def test_parameters_keep_their_names_and_their_order_of_magnitude(self, name):
        reference, model = theirs(MODELS[name]), ours(MODELS[name])
        assert {key: p.shape for key, p in model.named_parameters()} == {
            key: p.shape for key, p in reference.named_parameters()
        }
        assert model.state_dict().keys() == reference.state_dict().keys()
        for key, p in model.named_parameters():
            drawn = reference.get_parameter(key).std(correction=0)
            rtol = 0.5 if p.numel() >= 256 else 3.0  # a few random numbers tell little
            torch.testing.assert_close(p.std(correction=0), drawn, rtol=rtol, atol=1e-3, msg=key)

    def test_the_program_finds_what_it_needs(self, name):
        model = ours(MODELS[name], "crpw")
        assert model.num_classes == 5 and model.num_features == 48 and model.flops() > 0
        spared = model.no_weight_decay()
        assert any(key.endswith("crpw.mlp.0.weight") or ".crpw." in key for key in spared)
        assert {
            key
            for key in ("pos_embed", "cls_token", "dist_token")
            if key in dict(model.named_parameters())
        } <= spared
        if name.startswith("beit"):
            assert "blocks.0.attn.relative_position_bias_table" in spared
        names = {p: key for key, p in model.named_parameters()}
        decayed = {
            names[p]
            for group in parameter_groups(model, 1e-3, 0.05)
            if group["weight_decay"]
            for p in group["params"]
        }
        assert not decayed & spared and any(key.endswith("attn.qkv.weight") for key in decayed)
        assert LayerIds(model).last == 3 + (name == "cait")

    def test_copies_are_independent(self, name):
        model = ours(MODELS[name], "crpw").eval()
        images = torch.randn(1, 3, *SIZE)
        twin = copy.deepcopy(model)
        randomise(twin, std=0.5)
        assert type(twin) is type(model) and not torch.allclose(twin(images), model(images))
        assert twin.flops() == model.flops()


# Terms change the logits between patches alone. Where the head reads the tokens in front, the last
# block's patches are read by nobody.
UNREAD = {"vit with registers", "deit distilled", "vit with normed q and k"}


@pytest.mark.parametrize("modifier", EVERYWHERE)
@pytest.mark.parametrize(
    "name", ["vit with registers", "deit distilled", "beit", "cait", "vit with normed q and k"]
)
def test_every_modifier_trains_on_timms_models(name, modifier):
    torch.manual_seed(0)
    model = ours(MODELS[name], modifier)
    optimizer, touched = torch.optim.AdamW(model.parameters(), lr=1e-2), set()
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, *SIZE)), torch.arange(4))
        loss.backward()
        touched |= {
            key
            for key, p in model.named_parameters()
            if p.grad is not None and p.grad.abs().max() > 0
        }
        optimizer.step()
        assert loss.isfinite()
    added = {key for key, _ in model.named_parameters() if ".modifiers." in key}
    terms = issubclass(MODIFIERS[modifier], TermModifier)
    unread = (
        {key for key in added if key.startswith("blocks.1.")} if terms and name in UNREAD else set()
    )
    assert added - unread <= touched and not unread & touched
    twin = ours(MODELS[name], modifier)
    twin.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, *SIZE)
    assert torch.equal(twin.eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    "modifier", ["crpw(init_std=0)", "elementwise_mask(init=ones)", "talking_heads"]
)
@pytest.mark.parametrize("name", ["vit with registers", "beit", "cait"])
def test_a_modifier_at_its_neutral_setting_leaves_timms_logits(name, modifier):
    reference, model = randomise(theirs(MODELS[name]), std=0.1), ours(MODELS[name], modifier)
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert not unexpected and all(".modifiers." in key for key in missing)
    images = torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(model.eval()(images), reference.eval()(images), rtol=1e-5, atol=1e-5)


def test_qk_residual_adds_the_input_to_q_and_k():
    text = MODELS["vit"]
    reference, model = randomise(theirs(text), std=0.1), ours(text, "qk_residual")
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for block in reference.blocks:
            block.attn.qkv.weight[:96] += torch.eye(48).repeat(2, 1)
    images = torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(model.eval()(images), reference.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "beit", "cait", "deit distilled"])
def test_a_file_of_timms_weights_loads_with_new_modifiers_and_a_new_head(name, tmp_path):
    name, options = options_of(MODELS[name])
    reference = randomise(timm.create_model(name, num_classes=7, img_size=SIZE, **options), std=0.1)
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    model = timm_model(
        name + "(" + ", ".join(f"{k}={v!r}" for k, v in options.items()) + ")",
        5,
        SIZE,
        attention=AttentionSpec(("crpw",)),
    )
    report = load_weights(model, read_weights(str(tmp_path / "timm.pth")))
    assert report.coverage == 1 and not report.missing and not report.unexpected
    assert "the head starts at zero" in report.text and any(".crpw." in key for key in report.fresh)
    assert torch.equal(model.blocks[0].attn.qkv.weight, reference.blocks[0].attn.qkv.weight)
    assert not any(p.any() for key, p in model.named_parameters() if key.startswith("head"))


def test_a_headless_model_takes_a_file_with_two_heads_and_a_plain_one_refuses_it():
    reference = theirs(MODELS["deit distilled"])
    report = load_weights(timm_model(MODELS["deit distilled"], 0, SIZE), reference.state_dict())
    assert report.coverage == 1 and not report.unexpected
    with pytest.raises(CheckpointError, match="dist_token"):
        load_weights(ours(MODELS["vit"]), reference.state_dict())


@pytest.mark.parametrize("name", ["vit", "vit without class token", "deit distilled", "cait"])
def test_positions_follow_another_image_size(name):
    reference = randomise(
        timm.create_model(
            options_of(MODELS[name])[0],
            num_classes=5,
            img_size=(24, 24),
            **options_of(MODELS[name])[1],
        )
    )
    model = ours(MODELS[name])
    report = load_weights(model, reference.state_dict())
    assert "pos_embed" in report.resized and report.coverage == 1
    prefix = reference.pos_embed.shape[1] - 9
    assert torch.equal(model.pos_embed[:, :prefix], reference.pos_embed[:, :prefix])
    positions = reference.pos_embed[:, prefix:].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(positions, (4, 3), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(model.pos_embed[:, prefix:], wanted)


def test_stochastic_depth_dropout_and_checkpointing_are_timms():
    model = ours(MODELS["vit"], drop_path_rate=0.3, drop_rate=0.2, use_checkpoint=True)
    assert (
        model.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
        and model.pos_drop.p == model.blocks[0].attn.proj_drop.p == 0.2
    )
    assert model.grad_checkpointing
    model.train()(torch.randn(2, 3, *SIZE)).sum().backward()


def test_dropout_of_the_map_is_the_configs_or_timms():
    text = MODELS["vit"][:-1] + ", attn_drop_rate=0.25)"
    assert ours(text).blocks[0].attn.spec.drop == 0.25
    assert (
        timm_model(text, 5, SIZE, attention=AttentionSpec(drop=0.5)).blocks[0].attn.spec.drop == 0.5
    )


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "resnet18",
            (
                "timm model resnet18 .ResNet. has no attention module of a known"
                " class.*vit_.*MODEL.TYPE sasa_resnet"
            ),
        ),
        ("convnext_atto", "timm model convnext_atto .ConvNeXt. has no attention.*those that fit"),
        ("swin_tiny_patch4_window7_224", "but .*WindowAttention.*MODEL.TYPE swin"),
        (
            "eva02_tiny_patch14_224",
            (
                "timm model eva02_tiny_patch14_224 .Eva. has no attention module of a known class,"
                " but (Attention|Eva)"
            ),
        ),
        (
            "vit_tiny_patch16_2240",
            "has no model 'vit_tiny_patch16_2240'.*did you mean 'vit_tiny_patch16_224'",
        ),
        ("vit_tiny_patch16_224(dept=2)", "timm cannot build vit_tiny_patch16_224.dept=2.: .*dept"),
        ("vit_tiny_patch16_224(depth=)", "cannot read"),
        ("vit_tiny_patch16_224(depth=1, patch_drop_rate=0.5)", "patch_drop_rate drops tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, words):
    with pytest.raises(ValueError, match=words):
        timm_model(text, 5, 224)


def test_the_models_that_a_refusal_names_fit():
    with torch.device("meta"):
        for name in FITTING:
            timm_model(name, 5, 224)
    with pytest.raises(ValueError, match="such as vit_small_patch16_224") as caught:
        timm_model("vit_base_patch16_rope_224", 5, 224)
    assert "vit_*" not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        timm_model("swinv2_tiny_window8_256", 5, 256)
    assert str(caught.value).count("is similar") == 1


def test_a_model_that_cannot_have_the_image_size_is_not_built_without_it(monkeypatch):
    real = timm.create_model

    def create(name, img_size=None, **options):
        if img_size is not None:
            raise TypeError("unexpected argument 'img_size'")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ValueError, match="unexpected argument 'img_size'"):
        timm_model(f"vit_tiny_patch16_224({SMALL})", 5, 32)


def test_a_mixer_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match="timm: mixer separable has other parameters.*MODEL.TYPE vit"
    ):
        timm_model(MODELS["vit"], 5, SIZE, attention=AttentionSpec(mixer="separable"))


def test_masks_and_other_image_sizes_are_refused():
    model = ours(MODELS["vit"][:-1] + ", dynamic_img_size=True)")
    with pytest.raises(ValueError, match="masks are not supported"):
        model.blocks[0].attn(torch.randn(1, 13, 48), attn_mask=torch.zeros(13, 13))
    with pytest.raises(
        ValueError, match="17 tokens, but it was built for 1 class tokens and a grid of 4x3"
    ):
        model(torch.randn(1, 3, 32, 32))


def test_the_name_of_the_run_is_timms_where_no_other_is_given():
    opts = [
        "MODEL.TYPE",
        "timm",
        "DATA.IMG_SIZE",
        32,
        "MODEL.NUM_CLASSES",
        5,
        "DATA.DATASET",
        "folder",
    ]
    named = build_model(load_config(None, [*opts, "MODEL.NAME", "vit_tiny_patch16_224"]))
    assert len(named.blocks) == 12 and named.head.out_features == 5
    given = build_model(
        load_config(
            None,
            [*opts, "MODEL.NAME", "mine", "MODEL.TIMM.MODEL", f"vit_tiny_patch16_224({SMALL})"],
        )
    )
    assert len(given.blocks) == 2
    with pytest.raises(ModelError, match="timm .* has no model 'mine'"):
        build_model(load_config(None, [*opts, "MODEL.NAME", "mine"]))
    with pytest.raises(ModelError, match="DROP_PATH_PROFILE constant"):
        build_model(
            load_config(
                None,
                [
                    *opts,
                    "MODEL.NAME",
                    "vit_tiny_patch16_224",
                    "MODEL.DROP_PATH_PROFILE",
                    "constant",
                ],
            )
        )


def test_saved_weights_come_back(tmp_path):
    model = randomise(ours(MODELS["beit"], "crpw"))
    save_weights(tmp_path / "weights.safetensors", model.state_dict())
    twin = ours(MODELS["beit"], "crpw")
    load_weights(twin, read_weights(str(tmp_path / "weights.safetensors")), rule="exact")
    images = torch.randn(1, 3, *SIZE)
    assert torch.equal(twin.eval()(images), model.eval()(images))
