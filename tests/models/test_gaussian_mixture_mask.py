"""The Gaussian mixture mask: its profile, its place in the formula, the models of its paper, and
vectors of the original.
"""

from pathlib import Path

import pytest
import torch

from config import load_config
from kernels.window_attention import OffsetTerms, window_layout
from models import SwinTransformer, build_model
from models.attention import AttentionSpec
from models.attention.geometry import Geometry
from models.attention.modifiers import MODIFIERS
from models.attention.modifiers.gaussian_mixture_mask import squared_distances
from tests.helpers import golden, subtree
from tests.models.builders import WINDOW_FAMILIES, randomise, small

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAME = "gaussian_mixture_mask"
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
both_families = pytest.mark.parametrize("family", WINDOW_FAMILIES)


def mask(window=(4, 4), heads=2, prefix=0, **options):
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    return MODIFIERS.create(f"{NAME}({words})", Geometry(8 * heads, heads, window, prefix=prefix))


def set_to(modifier, alpha, sigma):
    with torch.no_grad():
        modifier.alpha.copy_(
            torch.as_tensor(alpha, dtype=torch.float32).view(len(modifier.alpha), -1)
        )
        modifier.sigma.copy_(
            torch.as_tensor(sigma, dtype=torch.float32).view(len(modifier.sigma), -1)
        )
    return modifier


def plain_terms(modifier, scale=1.0):
    geometry = modifier.geometry
    return OffsetTerms(
        geometry.window, torch.full((1, geometry.num_heads), scale), prefix=geometry.prefix
    )


def modifiers_of(model):
    return [block.attn.modifiers[NAME] for layer in model.layers for block in layer.blocks]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_locality_minus_extroversion_has_the_published_profile():
    modifier = set_to(mask((5, 5), 1, num_kernels=2), [0.6, -0.8], [2.0, 0.2])
    profile = {
        0: -0.2,
        1: 0.5295,
        2: 0.4673,
        4: 0.3639,
        5: 0.3212,
        8: 0.2207,
        9: 0.1948,
        16: 0.0812,
    }
    distance, values = squared_distances(modifier.geometry), modifier.mixture()[:, 0]
    for squared, expected in profile.items():
        assert (values[distance == squared] - expected).abs().max() <= 6e-5, squared


@pytest.mark.parametrize("legacy", [False, True])
def test_pairs_get_the_mixture_of_their_squared_distance(legacy):
    modifier = set_to(
        mask((3, 4), 2, num_kernels=2, legacy_pow=legacy),
        [[0.5, -1.0], [2.0, 0.3]],
        [[1.0, -2.0], [0.4, 3.0]],
    )
    scale = modifier(plain_terms(modifier, 0.5)).dense("scale")
    for i, j in ((0, 0), (0, 11), (5, 2), (7, 10)):
        squared = (i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2
        for head in (0, 1):
            variance = modifier.sigma[:, head].double() ** 2 + 1e-5
            expected = 0.5 * (modifier.alpha[:, head] * torch.exp(-squared / (2 * variance))).sum()
            assert scale[head, i, j].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, (5, 3)), ({"num_kernels": 2}, (2, 3)), ({"share_heads": True}, (5, 1))],
)
def test_it_works_on_the_offsets_and_has_two_numbers_per_kernel_and_head(options, sizes):
    modifier = mask((16, 16), 3, **options)
    assert modifier.alpha.shape == modifier.sigma.shape == sizes
    assert {name for name, _ in modifier.named_parameters()} == {"alpha", "sigma"}
    assert not modifier.state_dict().keys() - {"alpha", "sigma"}
    offsets = 31 * 31
    assert max(tensor.numel() for tensor in modifier.buffers()) == offsets
    assert modifier(plain_terms(modifier)).scale.shape == (offsets, 3)


@both_families
@pytest.mark.parametrize("position", ["pre", "post"])
def test_one_wide_gaussian_of_height_1_is_the_plain_model(family, position):
    plain = randomise(small(family))
    for option in (
        "num_kernels=1",
        "init=identity",
        "init=identity, num_kernels=1",
        "init=identity, share_heads=True",
    ):
        model = small(family, attention=AttentionSpec((f"{NAME}({option}, position={position})",)))
        model.load_state_dict({**model.state_dict(), **plain.state_dict()})
        if option == "num_kernels=1":
            for modifier in modifiers_of(model):
                set_to(
                    modifier, torch.ones_like(modifier.alpha), torch.full_like(modifier.sigma, 1e4)
                )
        torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=1e-5)


def test_every_number_of_the_identity_learns():
    modifier = mask(init="identity")
    modifier.initialise(modifier)
    for _ in range(2):
        loss = modifier(plain_terms(modifier)).scale.sin().sum()
        gradients = torch.autograd.grad(loss, [modifier.alpha, modifier.sigma])
        with torch.no_grad():
            modifier.alpha -= 0.01 * gradients[0]
    assert gradients[0].abs().min() > 0
    assert gradients[1].abs().min() > 0


def test_far_pairs_keep_their_weight_and_gradient_unlike_in_the_original():
    for legacy in (False, True):
        modifier = set_to(mask((16, 16), 1, num_kernels=1, legacy_pow=legacy), [[1.0]], [[30.0]])
        far = squared_distances(modifier.geometry) >= 104
        values = modifier.mixture()[far]
        (gradient,) = torch.autograd.grad(values.sum(), modifier.sigma)
        if legacy:
            assert not values.any()
            assert not gradient.any()
        else:
            corner = modifier.mixture()[squared_distances(modifier.geometry) == 225]
            assert corner.mean().item() == pytest.approx(0.8825, abs=1e-4)
            assert gradient.abs().min() > 0


@both_families
def test_a_height_of_zero_leaves_the_bias_and_the_mask_alone(family):
    model = randomise(small(family, attention=AttentionSpec((NAME,))))
    without = randomise(small(family))
    without.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in without.state_dict()}
    )
    with torch.no_grad():
        for modifier in modifiers_of(model):
            modifier.alpha.zero_()
        for block in (block for layer in without.layers for block in layer.blocks):
            block.attn.qkv.weight[: 2 * block.dim] = 0
            for bias in (block.attn.qkv.bias, getattr(block.attn, "q_bias", None)):
                if bias is not None:
                    bias[: 2 * block.dim] = 0
    torch.testing.assert_close(model(IMAGES), without(IMAGES), rtol=0, atol=1e-5)


@both_families
def test_masked_pairs_stay_masked_whatever_the_sign_of_the_factor(family):
    attention = randomise(small(family, attention=AttentionSpec((NAME,)))).layers[0].blocks[1].attn
    set_to(attention.modifiers[NAME], torch.full((5, 2), -0.2), torch.full((5, 2), 5.0))
    layout, maps = window_layout((8, 8), (4, 4), (2, 2)), []
    attention.map_tap.register_forward_hook(lambda _module, _inputs, attn: maps.append(attn))
    attention(torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(2)), layout)
    forbidden = (layout.mask != 0)[None, :, None].expand(3, -1, 2, -1, -1).flatten(0, 1)
    assert forbidden.any()
    assert maps[0][forbidden].max() < 1e-30


@pytest.mark.parametrize("renormalise", [False, True])
def test_after_the_softmax_it_multiplies_the_map(renormalise):
    text = f"{NAME}(position=post, renormalise={renormalise}, num_kernels=1)"
    attention = randomise(small("swin", attention=AttentionSpec((text,)))).layers[0].blocks[0].attn
    set_to(attention.modifiers[NAME], [[0.5, 2.0]], [[1.5, 3.0]])
    maps = []
    attention.map_tap.register_forward_hook(lambda _module, _inputs, attn: maps.append(attn))
    x, layout = torch.randn(2, 8, 8, 8), window_layout((8, 8), (4, 4))
    attention(x, layout)
    factor = attention.terms().dense("post")
    attention.modifiers.pop(NAME)
    attention(x, layout)
    expected = maps[1] * factor
    expected = expected / expected.sum(-1, keepdim=True) if renormalise else expected
    torch.testing.assert_close(maps[0], expected)


@pytest.mark.parametrize(
    ("position", "name", "neutral"), [("pre", "scale", 0.25), ("post", "post", 1.0)]
)
def test_class_tokens_keep_factor_1(position, name, neutral):
    modifier, bare = mask(prefix=1, position=position), mask(position=position)
    bare.load_state_dict(modifier.state_dict())
    with_class = modifier(plain_terms(modifier, 0.25)).dense(name)
    assert with_class.shape == (2, 17, 17)
    assert (with_class[:, 0] == neutral).all()
    assert (with_class[:, :, 0] == neutral).all()
    torch.testing.assert_close(with_class[:, 1:, 1:], bare(plain_terms(bare, 0.25)).dense(name))


@pytest.mark.parametrize("position", ["pre", "post"])
def test_it_joins_a_dense_term_and_shares_the_place_with_class_tokens(position):
    modifier, name = mask(prefix=1, position=position), {"pre": "scale", "post": "post"}[position]
    table = modifier(plain_terms(modifier)).dense(name)
    dense = torch.rand(2, 17, 17)
    joined = modifier(plain_terms(modifier).replace(**{name: dense}))
    torch.testing.assert_close(joined.dense(name), dense * table)


def test_the_paper_s_initial_values_have_its_mean_and_spread():
    modifier = mask(heads=2000)
    modifier.initialise(modifier)
    for value, mean, spread in ((modifier.sigma, 10, 10), (modifier.alpha, 0, 2)):
        assert value.mean().item() == pytest.approx(mean, abs=0.5)
        assert value.std().item() == pytest.approx(spread, rel=0.05)
    model = small("swin", attention=AttentionSpec((NAME,)))
    first, second = modifiers_of(model)[:2]
    assert not torch.equal(first.alpha, second.alpha)


def test_weight_decay_reaches_it_as_in_the_original():
    model = small("swin", attention=AttentionSpec((NAME,)))
    mine = {
        name for name, parameter in model.named_parameters() if NAME in name and parameter.ndim > 1
    }
    assert len(mine) == 2 * 3
    assert not mine & model.no_weight_decay()
    assert not any(word in name for name in mine for word in model.no_weight_decay_keywords())


@pytest.mark.parametrize(
    ("dataset", "parameters"),
    [
        ("cifar10", 7_073_188),
        ("cifar100", 7_107_838),
        ("svhn", 7_073_188),
        ("tiny_imagenet", 7_149_794),
    ],
)
def test_the_paper_s_swin_has_its_exact_size(dataset, parameters):
    for suffix, extra in (("", 0), ("_gmm", 900), ("_elm", 12 * 256)):
        model = build_model(load_config(CONFIGS / f"gmm/swin_{dataset}{suffix}.yaml"))
        assert count(model) == parameters + extra, suffix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("position=middle", "allowed are pre, post"),
        ("init=zeros", "allowed are paper, identity"),
        ("num_kernels=0", "at least 1"),
        ("renormalise=True", "needs position=post"),
        ("kernels=3", "kernels"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(text, message):
    with pytest.raises(ValueError, match=message):
        MODIFIERS.create(f"{NAME}({text})", Geometry(8, 2, (4, 4)))


# ---- vectors of the original


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("name", ["gmm_mask_4x4", "gmm_mask_16x16"])
def test_the_multiplier_and_its_gradients_are_the_original_s(name):
    meta, tensors = golden(name)
    options, state = meta["config"], subtree(tensors, "state_dict")
    side = options["grid"]
    modifier = mask(
        (side, side), options["num_heads"], num_kernels=options["num_kernals"], legacy_pow=True
    )
    set_to(modifier, state["alpha"].flatten(1), state["sigma"].flatten(1))
    matrices = tensors["input"].clone().requires_grad_()
    output = (
        modifier(plain_terms(modifier)).dense("scale")[:, options.get("rows", slice(None))]
        * matrices
    )
    (output * tensors["loss_weight"]).sum().backward()
    assert (output - tensors["output"]).abs().max() <= 1e-5 * tensors["output"].abs().max().clamp(
        min=1
    )
    assert relative(matrices.grad, tensors["input_grad"]) <= 2e-5
    assert relative(modifier.alpha.grad, tensors["grad/alpha"].flatten(1)) <= 5e-5
    assert relative(modifier.sigma.grad, tensors["grad/sigma"].flatten(1)) <= 5e-5
    assert count(modifier) == meta["num_trainable"]


def renamed(key):
    return key.replace("attn.mask.", f"attn.modifiers.{NAME}.")


@pytest.mark.parametrize("legacy", [True, False])
def test_the_original_s_swin_gives_the_same_logits_and_gradients(legacy):
    """Windows of 4 x 4 tokens are free of underflow, so the formula itself agrees as well."""
    meta, tensors = golden("gmm_swin")
    options = {
        name: value
        for name, value in meta["config"].items()
        if name not in ("is_GMM", "num_kernals")
    }
    text = f"{NAME}(num_kernels={meta['config']['num_kernals']}, legacy_pow={legacy})"
    model = SwinTransformer(**options, ape=True, attention=AttentionSpec((text,))).eval()
    state = {
        renamed(key): value
        for key, value in subtree(tensors, "state_dict").items()
        if not key.endswith("mask")
    }
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    missing, unexpected = model.load_state_dict(
        {key: value.view(shapes[key]) for key, value in state.items()}, strict=False
    )
    assert not unexpected
    assert all(key.endswith("attn_mask") for key in missing)
    assert count(model) == meta["num_trainable"]

    images = tensors["input"].clone().requires_grad_()
    logits = model(images)
    (logits * tensors["loss_weight"]).sum().backward()
    assert (logits - tensors["logits"]).abs().max() <= 1e-5 * tensors["logits"].abs().max().clamp(
        min=1
    )
    assert relative(images.grad, tensors["input_grad"]) <= 2e-5
    gradients = {renamed(key): value for key, value in subtree(tensors, "grad").items()}
    for key, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[key].view(parameter.shape)) <= 5e-5, key
