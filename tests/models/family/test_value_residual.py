"""value_residual and neutreno: the values of the first block reach the later ones."""

import copy

import pytest
import torch
from torch import nn

from models import evaluation
from models.attention import AttentionSpec
from optimizer import decay_rule
from tests.models.builders import randomise, small

from .blocks import compare_stage, each_case

IMAGES = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
FORMS = {
    "swin": {"depths": (3, 1)},
    "swinv2": {"depths": (3, 1)},
    "vit": {"depth": 3},
    "cait": {},
    "pit": {"depths": (2, 1)},
    "t2t": {"modified": "blocks"},
    "refined_vit": {"share_every": 1, "carry": False},
}
CHAINED = ("value_residual", "neutreno")


def network(family, *modifiers, **options):
    return randomise(small(family, **FORMS[family], attention=AttentionSpec(modifiers), **options))


def learned(dense, seen):
    if dense is seen[0]:
        return dense.y
    first, own = dense.modifier("value_residual").l
    return dense.A @ (first * seen[0].v + own * dense.v)


def half(dense, seen):
    return dense.A @ (seen[0].v + dense.v) / 2


def svformer(dense, seen):
    return dense.A @ seen[0].v


def neutreno(dense, seen):
    return dense.y + 0.4 * (seen[0].v - dense.v)


def both(dense, seen):
    v = (seen[0].v + dense.v) / 2
    return dense.A @ v + 0.2 * (seen[0].v - v)


@each_case
def test_a_learned_mixture_is_its_formula(case):
    compare_stage(case, "value_residual", heads=learned)


@pytest.mark.parametrize(
    ("texts", "heads"),
    [
        (("value_residual(preset=half)",), half),
        (("value_residual(preset=svformer)",), svformer),
        (("neutreno",), neutreno),
        (("value_residual(preset=half)", "neutreno(strength=0.2)"), both),
    ],
)
def test_fixed_forms_are_their_formulas(texts, heads):
    compare_stage("swin-padded", *texts, heads=heads)
    compare_stage("vit-class_token", *texts, heads=heads)


@pytest.mark.parametrize("family", FORMS)
def test_starts_as_the_plain_model(family):
    plain = network(family)
    neutral = AttentionSpec(("value_residual", "neutreno(strength=0)"))
    chained = small(family, **FORMS[family], attention=neutral)
    chained.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(chained(IMAGES), plain(IMAGES))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chained(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("family", FORMS)
def test_every_block_but_the_first_of_its_chain_has_two_numbers_without_decay(family):
    model = small(family, **FORMS[family], attention=AttentionSpec(("value_residual(init=0.25)",)))
    mixtures = {name: p for name, p in model.named_parameters() if name.endswith(".l")}
    count = {"swin": 2, "swinv2": 2, "vit": 2}.get(family, 1)
    assert [p.tolist() for p in mixtures.values()] == [[0.25, 0.75]] * count
    assert not any(".0.attn" in name for name in mixtures)
    assert not any(decay_rule(model)(name, p) for name, p in mixtures.items())


@pytest.mark.parametrize("family", FORMS)
def test_activations_computed_again_give_the_same_and_every_parameter_learns(family):
    """Data-parallel training would wait for one without a gradient."""
    found = []
    for again in (False, True):
        model = network(family, "value_residual", "neutreno", use_checkpoint=again)
        logits = model(IMAGES)
        logits.square().sum().backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
        found.append([logits, *(p.grad for p in model.parameters())])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("family", ["swin", "vit"])
def test_values_are_handed_down_and_kept_nowhere(family):
    model = network(family, "value_residual")
    before = model(IMAGES)
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    assert torch.equal(model(IMAGES), before)
    assert len(seen) > 20
    assert not [
        name
        for module in model.modules()
        for name, value in vars(module).items()
        if torch.is_tensor(value)
    ]
    assert torch.equal(copy.deepcopy(model)(IMAGES), before)
    with evaluation(model.eval()):
        torch.testing.assert_close(model(IMAGES), before)


COMPILED = {("swin", False), ("vit", True)}  # by `make test-slow`; all by `make test-long`


@pytest.mark.parametrize(
    ("family", "again"),
    [
        pytest.param(
            family,
            again,
            marks=pytest.mark.slow if (family, again) in COMPILED else pytest.mark.long,
            id=f"{family}-{'computed_again' if again else 'kept'}",
        )
        for family in FORMS
        for again in (False, True)
    ],
)
def test_compiles_to_one_graph(family, again):
    torch.compiler.reset()
    model = network(family, "value_residual", "neutreno", use_checkpoint=again)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    compiled(IMAGES).sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(IMAGES).sum().backward()
    for found, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-4)


def test_blocks_without_the_arm_are_called_and_answer_as_ever():
    swin, vit = small("swin"), small("vit")
    x = torch.randn(1, 64, 8)
    assert torch.is_tensor(swin.layers[0].blocks[0](x, (8, 8)))
    assert torch.is_tensor(
        swin.layers[0]
        .blocks[0]
        .attn(x.unflatten(1, (8, 8)), swin.layers[0].blocks[0].layout((8, 8), None))
    )
    assert torch.is_tensor(vit.blocks[0](x[:, :17]))


@pytest.mark.parametrize("name", CHAINED)
@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("timm", {}, "MODEL.TYPE swin"),
        ("t2t", {}, "MODEL.T2T.MODIFIED blocks"),
        ("refined_vit", {}, "SHARE_EVERY 1"),
        ("refined_vit", {"share_every": 1}, "CARRY False"),
        ("pit", {}, "no stage has a second block"),
    ],
)
def test_where_nothing_can_be_handed_down_it_is_refused(name, family, options, reason):
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        small(family, **options, attention=AttentionSpec((name,)))


def test_a_chain_that_was_broken_is_no_other_model():
    model = network("vit", "value_residual")
    model.blocks[0] = nn.Identity()
    with pytest.raises(ValueError, match="block 1.*value_residual.*first block of its chain"):
        model(IMAGES)


def test_a_fixed_form_has_no_start():
    with pytest.raises(ValueError, match="init 0.5 is where a learned mixture starts"):
        small("vit", attention=AttentionSpec(("value_residual(preset=half, init=0.5)",)))
