"""Modifiers that only set initial values: what they touch, draw and refuse."""

import pytest
import torch

from checkpoint import CheckpointError, load_weights
from models.attention import AttentionSpec
from tests.models.builders import randomise, size, small

SETS = {  # what of the attention's own weights
    "mimetic": ("qkv.weight", "proj.weight"),
    "mimetic(vo=none)": ("qkv.weight",),
    "orthogonal(which=qv, basis=random)": ("qkv.weight",),
    "impulse_bias": ("relative_position_bias_table",),
}
NEW = ("mimetic", "orthogonal(basis=random)", "impulse_bias")


def seeded(family, *modifiers, seed=3, **changes):
    torch.manual_seed(seed)
    return small(family, attention=AttentionSpec(modifiers), **changes)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("modifier", SETS)
def test_equal_seeds_give_equal_other_weights_and_it_sets_its_own_alone(modifier):
    plain = state(seeded("swin"))
    after = torch.rand(1)
    started = state(seeded("swin", modifier))
    assert torch.equal(after, torch.rand(1))
    assert list(started) == list(plain)  # no parameter of its own
    changed = {key for key, value in plain.items() if not torch.equal(started[key], value)}
    assert {key.split(".attn.")[1] for key in changed} == set(SETS[modifier])
    assert all(
        torch.equal(value, started[key]) for key, value in state(seeded("swin", modifier)).items()
    )


@pytest.mark.parametrize(
    ("modifier", "rows"),
    [
        ("mimetic(vo=none)", (0, 1)),
        ("mimetic(qk=none)", (2,)),
        ("orthogonal", (1,)),
        ("orthogonal(which=vq)", (0, 2)),
    ],
)
def test_parts_that_are_not_named_keep_their_rows(modifier, rows):
    name = "layers.0.blocks.1.attn.qkv.weight"
    plain, started = (
        seeded("swin", *modifiers).state_dict()[name].split(8) for modifiers in ((), (modifier,))
    )
    for place in range(3):
        assert torch.equal(started[place], plain[place]) is (place not in rows)


@pytest.mark.parametrize("modifier", NEW[:2])
def test_layers_and_seeds_draw_different_numbers(modifier):
    first, other = (state(seeded("swin", modifier, seed=seed)) for seed in (3, 4))
    names = [f"layers.0.blocks.{block}.attn.qkv.weight" for block in (0, 1)]
    keys = [first[name][8:16] for name in names]
    assert not torch.equal(*keys) and not torch.equal(keys[0], other[names[0]][8:16])


@pytest.mark.parametrize("modifier", ["mimetic", "impulse_bias"])
def test_models_without_numbers_are_built_and_say_what_would_be_overwritten(modifier):
    spec = AttentionSpec((modifier,))
    assert size(small, "swin", attention=spec) == size(small, "swin")
    with torch.device("meta"):
        model = small("swin", attention=spec)
    assert model.layers[0].blocks[0].attn.overwriting == [modifier.partition("(")[0]]


@pytest.mark.parametrize("modifier", NEW)
def test_pretrained_weights_are_refused_or_overwritten_with_the_same_values(modifier):
    name = modifier.partition("(")[0]
    model, weights = seeded("swin", modifier), randomise(small("swin")).state_dict()
    fresh = state(model)
    with pytest.raises(CheckpointError, match=f"^{name} sets initial values.*INIT_OVER"):
        load_weights(model, weights)
    torch.manual_seed(3)
    load_weights(model, weights, init_over=True)
    prefix = "layers.0.blocks.0.attn."
    for key in SETS.get(modifier, SETS["mimetic(vo=none)"]):
        found = model.state_dict()[prefix + key]
        ours = fresh[prefix + key] == found
        if key == "relative_position_bias_table":
            assert ours.sum() == 2  # an entry a head
        elif name == "orthogonal":
            assert ours[8:16].all() and not ours[:8].any()
        else:
            assert ours.all()


def test_of_several_initialisers_the_last_one_has_the_rows_that_both_set():
    names = ("mimetic", "orthogonal(which=k, norm=none, basis=identity)")
    for order, expected in ((names, True), (names[::-1], False)):
        weight = seeded("swin", *order).layers[0].blocks[0].attn.qkv.weight
        assert torch.equal(weight[8:16], torch.eye(8)) is expected


@pytest.mark.parametrize(
    ("family", "modifier", "words"),
    [
        ("swinv2", "impulse_bias", "WindowAttentionV2 makes its position bias by an MLP"),
        ("vit", "impulse_bias", "GlobalAttention has no position bias"),
        ("t2t", "mimetic", "x has 27 channels, v 8 .* set vo=none.*MODEL.T2T.MODIFIED blocks"),
        ("t2t", "orthogonal", "x has 27 channels, q, k and v have 8.*MODEL.T2T.MODIFIED blocks"),
        ("swin", "mimetic(qk=none, vo=none)", "changes nothing"),
        ("swin", "mimetic(vo=-0.4)", "allowed are numbers above 0, and none"),
        ("swin", "orthogonal(which=kk)", "the letters q, k and v, each once"),
        ("swin", "orthogonal(basis=dft)", "allowed are dct, random, identity"),
        ("swin", "orthogonal(norm=off)", "norm"),
        ("swin", "impulse_bias(kernel=4)", "odd numbers"),
        ("swin", "impulse_bias(kernel=9)", "a window of 4x4 has no offset of 4"),
        ("swin", "impulse_bias(scale=0)", "numbers above 0, and auto"),
    ],
)
def test_what_cannot_be_set_is_refused_with_the_reason(family, modifier, words):
    with pytest.raises(ValueError, match=words) as error:
        small(family, attention=AttentionSpec((modifier,)))
    assert "\n" not in str(error.value)
