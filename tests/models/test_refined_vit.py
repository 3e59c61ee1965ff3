"""Refined ViT: sizes and multiply-accumulates, its identities, the shared maps, the penalty, and
vectors of the original.
"""

import pytest
import torch
import torch.nn.functional as F

from checkpoint import load_weights
from engine.losses import make_criterion, with_distillation
from models import RefinedViT, VisionTransformer
from models.attention import AttentionSpec
from models.counting import count_macs
from tests.helpers import golden
from tests.models.builders import randomise, small
from tests.models.originals import assert_same_as_original

SIZES = {
    "S": {},
    "M": dict(embed_dim=420, depth=32),
    "L": dict(embed_dim=512, depth=32, num_heads=16),
}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
ALONE = dict(share_every=1, carry=False)


def refined(**options):
    return small("refined_vit", depth=4, **options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "aux", "plain", "linear"),
    [
        ("S", 25_408_656, 25_023_656, 22_075_528),
        ("M", 55_450_932, 55_029_932, 51_814_540),
        ("L", 81_150_192, 80_637_192, 76_738_792),
    ],
)
def test_the_released_models_have_their_exact_sizes(size, aux, plain, linear):
    with torch.device("meta"):
        assert count(RefinedViT(**SIZES[size], aux_head=True)) == aux
        assert count(RefinedViT(**SIZES[size])) == plain
        assert count(RefinedViT(**SIZES[size], stem="linear")) == linear


@pytest.mark.parametrize(
    ("size", "stem", "giga"),
    [
        ("S", "conv", "6.742"),
        ("S", "linear", "4.968"),
        pytest.param("M", "conv", "13.418", marks=pytest.mark.slow),
        pytest.param("L", "conv", "19.086", marks=pytest.mark.slow),
    ],
)
def test_multiply_accumulates_are_those_counted_in_the_original(size, stem, giga):
    """Linear layers, convolutions and attention products, without norms."""
    model = RefinedViT(**SIZES[size], stem=stem)
    macs = count_macs(model, torch.zeros(1, 3, 224, 224))
    assert f"{macs.with_attention / 1e9:.3f}" == giga
    norms = (
        2 * len(model.blocks) * 197 + 1
    ) * model.embed_dim  # flops() counts one per number, in the last norm of the class token
    assert model.flops() == macs.with_attention + norms


@pytest.mark.parametrize(
    ("depth", "parameters"), [(16, 24_426_664), (24, 36_261_448), (32, 48_096_232)]
)
def test_deepvit_has_the_size_of_its_16_24_and_32_blocks(depth, parameters):
    """384 channels, 12 heads, MLP ratio 3, as in the released code; the 24.5 M published for 16
    blocks are 24.43 M here.
    """
    with torch.device("meta"):
        model = VisionTransformer(
            embed_dim=384,
            depth=depth,
            num_heads=12,
            mlp_ratio=3.0,
            attention=AttentionSpec(("re_attention(init=uniform, bias=True)",)),
        )
    assert count(model) == parameters


def test_a_neutral_one_is_a_vit_with_doubled_branches():
    """share_every 1 and no carry; attention and MLP of the ViT are doubled by doubling the layers
    that end them.
    """
    model, vit = (
        randomise(refined(**ALONE, stem="linear", norm_eps=1e-6)),
        small("vit", depth=4, norm_eps=4e-6),
    )
    state = {
        key: 2 * value if ".attn.proj." in key else value
        for key, value in model.state_dict().items()
        if ".ls2." not in key
    }
    for key in [key for key in state if ".mlp.fc2." in key]:
        gain = 2 * model.state_dict()[key.split("mlp.")[0] + "ls2.gamma"]
        state[key] = state[key] * (gain[:, None] if state[key].dim() == 2 else gain)
    vit.load_state_dict(state)
    vit.norm.eps = 1e-6
    torch.testing.assert_close(model(IMAGES), vit(IMAGES), rtol=1e-5, atol=1e-5)


def test_halving_before_the_norm_is_four_times_its_epsilon():
    x = torch.randn(2, 5, 8) * 1e-2
    torch.testing.assert_close(F.layer_norm(x / 2, (8,), eps=1e-3), F.layer_norm(x, (8,), eps=4e-3))


@pytest.mark.parametrize(
    "options", [{}, dict(share_every=1), dict(carry=False), dict(share_every=3)]
)
def test_maps_are_carried_and_shared_by_the_formula(options):
    """With an identity as refinement a shared block uses the map as it is; blocks that form one add
    D^-0.5 times the one before.
    """
    model = randomise(refined(refine="refiner", stem="linear", **options), std=0.5).eval()
    for block in model.blocks:
        if block.shared:
            block.attn.modifiers["refiner"].initialise(block.attn)
    maps, inputs = {}, {}
    for index, block in enumerate(model.blocks):
        block.attn.map_tap.register_forward_hook(
            lambda _m, _i, attn, index=index: maps.update({index: attn})
        )
        block.attn.register_forward_hook(
            lambda _m, args, _out, index=index: inputs.update({index: args[0]})
        )
    model(IMAGES)
    last = None
    for index, block in enumerate(model.blocks):
        if index % options.get("share_every", 2):
            expected = last
        else:
            q, k, _ = block.attn.qkv(inputs[index]).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            expected = (q @ k.mT * 0.5).softmax(-1)
            expected = (
                expected + 0.5 * last
                if last is not None and options.get("carry", True)
                else expected
            )
        torch.testing.assert_close(maps[index], expected, rtol=1e-4, atol=1e-6)
        last = expected


def test_no_module_keeps_a_map():
    model = refined()
    model(IMAGES).sum().backward()
    tokens = 17
    for module in model.modules():
        assert not any(
            torch.is_tensor(value) and value.shape[-2:] == (tokens, tokens)
            for value in vars(module).values()
        )


def test_in_the_paper_s_form_a_fresh_refiner_changes_nothing():
    plain = randomise(refined(**ALONE))
    model = refined(**ALONE, attention=AttentionSpec(("refiner",)))
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=1e-5)


def test_activation_checkpointing_changes_nothing():
    gradients = []
    for use in (False, True):
        model = randomise(refined(use_checkpoint=use, cos_reg=0.1))
        output = model(IMAGES)
        (output["logits"].square().sum() + output["penalty"]).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


# ---- the penalty


def test_the_penalty_is_the_mean_cosine_over_heads_of_neighbouring_maps():
    model, maps = randomise(refined(cos_reg=0.3, cos_pairs=3, **ALONE)), []
    for block in model.blocks:
        block.attn.map_tap.register_forward_hook(lambda _m, _i, attn: maps.append(attn))
    penalty = model(IMAGES)["penalty"]
    cosines = [
        ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean() for a, b in zip(maps, maps[1:])
    ]
    torch.testing.assert_close(penalty, 0.1 * sum(cosines))


def test_a_block_that_shares_adds_a_cosine_of_1():
    model = randomise(refined(cos_reg=1.0, cos_pairs=1))
    assert model(IMAGES)["penalty"] == 1


def test_the_penalty_is_added_to_the_loss_of_training_alone():
    model, targets = randomise(refined(cos_reg=0.3, stem="linear")), torch.tensor([1, 2])
    loss = with_distillation(make_criterion(False), None)
    output = model(IMAGES)
    assert (
        loss(IMAGES, output, targets)
        == F.cross_entropy(output["logits"], targets) + output["penalty"]
    )
    assert loss(IMAGES, output["logits"], targets) == F.cross_entropy(output["logits"], targets)
    assert torch.is_tensor(model.eval()(IMAGES))
    assert torch.is_tensor(refined()(IMAGES))


def test_the_penalty_pulls_maps_apart():
    model = randomise(refined(cos_reg=1.0, **ALONE))
    model(IMAGES)["penalty"].backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert model.head.weight.grad is None


# ---- heads and refusals


def test_the_second_head_adds_half_its_largest_logits():
    model = randomise(refined(aux_head=True)).eval()
    tokens, _ = model.forward_tokens(IMAGES)
    expected = model.head(tokens[:, 0]) + 0.5 * torch.stack(
        [model.aux_head(tokens[:, i]) for i in range(1, 17)]
    ).amax(0)
    torch.testing.assert_close(model(IMAGES), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stem="dense"), "conv, linear"),
        (dict(patch_size=1), "must be even"),
        (dict(attention=AttentionSpec(mixer="separable")), "forms no map"),
        (dict(share_every=(True, False, True, False)), "first False"),
        (dict(attention=AttentionSpec(("refiner(reduce=False, expand=2)",))), "makes 4 maps of 2"),
        (dict(refine="crpw"), "modifier of maps"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        refined(**options)


def test_without_sharing_carry_and_penalty_a_block_may_have_more_maps_than_heads():
    model = refined(**ALONE, attention=AttentionSpec(("refiner(reduce=False, expand=2)",)))
    assert model(IMAGES).shape == (2, 10)


# ---- vectors of the original

NAMES = {
    ".mlp.scale_channel": ".ls2.gamma",
    ".DLA.conv_exp.weight": ".{}.expansion",
    ".DLA.depth_sep_conv.weight": ".{}.kernel",
    ".DLA.conv_pro.weight": ".{}.reduction",
    ".DLA.bn1.": ".{}.norms.expanded.",
    ".DLA.bn2.": ".{}.norms.local.",
    ".DLA.bn3.": ".{}.norms.reduced.",
    ".adapt_bn.": ".{}.norms.refined.",
}


@pytest.mark.parametrize("name", ["refiner_vit", "refiner_vit_transform"])
def test_the_original_gives_the_same_logits_features_and_gradients(name):
    config = golden(name)[0]["config"]
    shared = config["depth"]

    def convert(state):
        result = {}
        for key, value in state.items():
            for old, new in NAMES.items():
                key = key.replace(old, new.format("modifiers.refiner"))
            if key.startswith("blocks.") and shared[int(key.split(".")[1])]:
                key = key.replace(".attn.qkv.", ".attn.v.")
            pointwise = key.endswith((".expansion", ".reduction"))
            result[key] = value.flatten(1) if pointwise else value
        return result

    own = f"refiner(preset=release, expand={config['head_expand']})"
    model = RefinedViT(
        **{
            key: config[key]
            for key in (
                "img_size",
                "patch_size",
                "num_classes",
                "embed_dim",
                "num_heads",
                "mlp_ratio",
                "qkv_bias",
                "norm_eps",
            )
        },
        depth=len(shared),
        share_every=shared,
        stem="linear",
        aux_head=config.get("return_dense", True),
        attention=AttentionSpec((own,) if any(config["apply_transform"]) else ()),
    )
    assert_same_as_original(
        name, model, convert, {f"blocks.{i}.attn": f"blocks.{i}.attn" for i in range(len(shared))}
    )


def test_weights_of_one_image_size_load_at_another_with_the_position_embedding_resized():
    model, larger = randomise(refined()), refined(img_size=32)
    load_weights(larger, model.state_dict(), rule="finetune")
    grid = model.pos_embed[0, 1:].T.unflatten(1, (4, 4))
    expected = F.interpolate(grid[None], size=(8, 8), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(larger.pos_embed[0, 1:], expected)
    assert torch.equal(larger.pos_embed[:, 0], model.pos_embed[:, 0])
    assert larger(torch.randn(2, 3, 32, 32)).shape == (2, 10)
