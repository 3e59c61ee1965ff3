"""What identity sharpening does, term by term: it reduces to the plain model, and it moves
attention towards the identity.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.linear import precision
from kernels.window_attention import window_layout
from models.attention import AttentionSpec, WindowAttention, WindowAttentionV2
from models.attention.geometry import Geometry
from models.attention.modifiers import MODIFIERS, MapModifier, TermModifier
from tests.models.builders import GRID, WINDOW_FAMILIES, identity_options, randomise, small

both_families = pytest.mark.parametrize("family", WINDOW_FAMILIES)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
CRPW_OPTIONS = [
    "crpw",
    "crpw(source=table)",
    "crpw(mode=one_plus)",
    "crpw(source=table, mode=one_plus)",
    "crpw(apply=probs)",
    "crpw(apply=probs, renormalise=True)",
]


def with_modifiers(family, *modifiers, **changes):
    return small(family, attention=AttentionSpec(modifiers), **changes)


def copy_shared(source, target):
    target.load_state_dict({**target.state_dict(), **source.state_dict()})
    return target


def loss_and_gradients(model, names=None):
    model.zero_grad()
    F.cross_entropy(model(IMAGES), torch.tensor([1, 7])).backward()
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None and (names is None or name in names)
    }


@both_families
@pytest.mark.parametrize("modifier", [*CRPW_OPTIONS, "init_identity"])
def test_switching_a_modifier_on_leaves_every_other_initial_weight_as_it_was(family, modifier):
    torch.manual_seed(3)
    plain = small(family)
    after_plain = torch.rand(1)
    torch.manual_seed(3)
    modified = with_modifiers(family, modifier, pre_mlp="stage")
    assert torch.equal(after_plain, torch.rand(1))
    for name, value in plain.state_dict().items():
        if not (modifier == "init_identity" and name.endswith("attn.qkv.weight")):
            assert torch.equal(value, modified.state_dict()[name]), name


@both_families
@pytest.mark.parametrize("modifier", CRPW_OPTIONS)
def test_a_zero_weight_is_the_plain_model(family, modifier):
    plain = randomise(small(family))
    modified = with_modifiers(family, modifier)
    copy_shared(plain, modified)
    exact = "one_plus" not in modifier and "probs" not in modifier
    torch.testing.assert_close(modified(IMAGES), plain(IMAGES), rtol=0, atol=0 if exact else 1e-5)


@both_families
def test_a_fresh_crpw_gives_the_plain_loss_to_the_last_bit(family):
    torch.manual_seed(0)
    plain = small(family)
    torch.manual_seed(0)
    modified = with_modifiers(family, "crpw")
    assert torch.equal(plain(IMAGES), modified(IMAGES))


@both_families
@pytest.mark.parametrize("modifier", [*CRPW_OPTIONS, "crpw(mode=sigmoid16)"])
def test_crpw_learns_from_the_first_step_and_so_does_its_first_layer_from_the_second(
    family, modifier
):
    model = with_modifiers(family, modifier, "qk_residual")
    torch.manual_seed(0)
    with torch.no_grad():  # SwinV2's post-norms start at 0 and let nothing through
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.fill_(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        gradients = loss_and_gradients(model)
        optimizer.step()
    ours = {name: g for name, g in gradients.items() if ".crpw." in name}
    assert ours
    assert all(g.abs().max() > 0 for g in ours.values()), [
        name for name, g in ours.items() if not g.abs().max() > 0
    ]


@both_families
@pytest.mark.parametrize("which", ["both", "q", "k"])
def test_qk_residual_equals_a_plain_model_with_the_identity_added_to_its_weights(family, which):
    plain = randomise(small(family))
    modified = with_modifiers(family, f"qk_residual(which={which})")
    modified.load_state_dict(plain.state_dict())  # no parameter, no buffer of its own
    with torch.no_grad():
        for layer in plain.layers:
            for block in layer.blocks:
                weight = block.attn.qkv.weight
                for place, part in enumerate("qk"):
                    if which in ("both", part):
                        weight[place * block.dim : (place + 1) * block.dim] += torch.eye(block.dim)
    torch.testing.assert_close(modified(IMAGES), plain(IMAGES), rtol=0, atol=2e-5)
    ours, theirs = loss_and_gradients(modified), loss_and_gradients(plain)
    assert all(
        (ours[name] - theirs[name]).abs().max() <= 2e-5 * theirs[name].abs().max().clamp(min=1)
        for name in theirs
    )


@pytest.mark.parametrize("which", ["both", "q", "k"])
def test_adding_x_to_the_projections_is_the_same_as_adding_the_identity_to_the_weights(which):
    modifier = MODIFIERS.create(f"qk_residual(which={which})", Geometry(12, 3, (4, 4)))
    x, weight = torch.randn(2, 16, 12), torch.randn(36, 12)
    torch.testing.assert_close(
        modifier.add(x, F.linear(x, weight)),
        F.linear(x, modifier.fold(weight)),
        rtol=1e-5,
        atol=1e-5,
    )
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    added, folded = (
        torch.autograd.grad(y.sin().sum(), leaves)
        for y in (modifier.add(x, F.linear(x, weight)), F.linear(x, modifier.fold(weight)))
    )
    torch.testing.assert_close(added, folded, rtol=1e-4, atol=1e-4)


@both_families
def test_few_and_many_tokens_take_different_ways_to_the_same_gradients(family, monkeypatch):
    model = randomise(with_modifiers(family, "qk_residual"))
    results = []
    for few in (0.0, float("inf")):
        monkeypatch.setattr("models.attention.projection.FEW_TOKENS", few)
        results.append(loss_and_gradients(model))
    for name in results[0]:
        scale = results[0][name].abs().max().clamp(min=1e-3)
        assert (results[0][name] - results[1][name]).abs().max() <= 1e-4 * scale, name


@both_families
def test_in_bfloat16_autocast_the_residual_is_added_to_the_tokens_and_costs_no_precision(
    family, monkeypatch
):
    """The identity folded into a bfloat16 weight would round w to steps of 2^-8; added to the
    tokens the error is the plain model's.
    """
    monkeypatch.setattr(precision, "WIDENED", frozenset())
    model = with_modifiers(family, "qk_residual", embed_dim=32)
    for block in (b for layer in model.layers for b in layer.blocks):
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.003)
    attention = model.layers[0].blocks[0].attn
    x = torch.randn(4, 64, 32)
    exact = attention.project(x)[..., :64] - x.repeat(1, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = attention.project(x)
        unfolded = F.linear(x, attention.qkv.weight, attention.packed_bias())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low[..., :64], (unfolded[..., :64] + x.repeat(1, 1, 2).bfloat16()))
    folded = F.linear(x, attention._projection(True)[0].bfloat16().float())[..., :64] - x.repeat(
        1, 1, 2
    )
    assert (unfolded[..., :64].float() - exact).abs().mean() < 0.5 * (folded - exact).abs().mean()


@both_families
def test_where_bfloat16_is_multiplied_in_float32_the_folded_residual_is_rounded_once(
    family, monkeypatch
):
    monkeypatch.setattr(precision, "WIDENED", frozenset([torch.bfloat16]))
    attention = with_modifiers(family, "qk_residual", embed_dim=32).layers[0].blocks[0].attn
    torch.nn.init.normal_(attention.qkv.weight, std=0.003)
    x = torch.randn(4, 64, 32)
    exact = attention.project(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(attention.project(x), exact.bfloat16(), rtol=2**-7, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(
                attention.project(x), exact.bfloat16(), rtol=2**-7, atol=1e-6
            )


@both_families
def test_in_bfloat16_evaluation_the_residual_is_folded_in_float32_and_errs_little_more(
    family, monkeypatch
):
    monkeypatch.setattr(precision, "WIDENED", frozenset())
    model = with_modifiers(family, "qk_residual", embed_dim=32)
    attention = model.layers[0].blocks[0].attn
    torch.nn.init.normal_(attention.qkv.weight, std=0.02)
    x = torch.randn(4, 64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        added = attention.project(x)
        with torch.no_grad():
            folded, again = attention.project(x), attention.project(x)
    exact = F.linear(
        x.double(),
        attention._projection(True)[0].double(),
        None if attention.packed_bias() is None else attention.packed_bias().double(),
    )
    assert folded.dtype == torch.bfloat16 and torch.equal(folded, again)
    assert (folded - exact).abs().mean() < 2 * (added - exact).abs().mean()


def test_dropped_biases_have_no_effect_and_the_value_bias_keeps_its_own():
    for family in WINDOW_FAMILIES:
        model = randomise(with_modifiers(family, "qk_residual(drop_bias=True)"))
        gradients = loss_and_gradients(model)
        name = "layers.0.blocks.0.attn."
        if family == "swin":
            bias = gradients[f"{name}qkv.bias"]
            assert not bias[:16].any()
            assert bias[16:].abs().min() > 0
        else:
            assert not gradients[f"{name}q_bias"].any()
            assert gradients[f"{name}v_bias"].abs().min() > 0


@both_families
def test_one_adamw_step_without_gradient_moves_the_effective_weight_towards_the_identity(family):
    model = randomise(with_modifiers(family, "qk_residual"))
    weights = [b.attn.qkv.weight for layer in model.layers for b in layer.blocks]
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.zeros_like(w)
    torch.optim.AdamW(weights, lr=0.1, weight_decay=0.05).step()
    for block, old, new in zip(
        (b for layer in model.layers for b in layer.blocks), before, weights, strict=True
    ):
        torch.testing.assert_close(new, old * (1 - 0.1 * 0.05))
        effective = block.attn._projection(True)[0][: block.dim]
        torch.testing.assert_close(
            effective - torch.eye(block.dim),
            old[: block.dim] * (1 - 0.1 * 0.05),
            rtol=1e-5,
            atol=1e-6,
        )


@both_families
def test_init_identity_starts_where_qk_residual_with_zero_weights_does(family):
    control, residual = (
        with_modifiers(family, "init_identity"),
        with_modifiers(family, "qk_residual"),
    )
    copy_shared(control, residual)
    with torch.no_grad():
        for block in (b for layer in residual.layers for b in layer.blocks):
            block.attn.qkv.weight[: 2 * block.dim] = 0
    torch.testing.assert_close(residual(IMAGES), control(IMAGES), rtol=0, atol=1e-6)


def diagonal_mass(attention, x):
    """Mean of A_ii, read through the tap on the map."""
    kept = []
    handle = attention.map_tap.register_forward_hook(lambda _m, _i, attn: kept.append(attn))
    side = attention.window_size
    with torch.no_grad():
        attention(x.unflatten(1, side), window_layout(side, side))
    handle.remove()
    return kept[0].diagonal(dim1=-2, dim2=-1).mean().item()


@pytest.mark.parametrize(
    ("kind", "modifiers", "expected"),
    [
        (WindowAttention, (), [0.020] * 4),
        (WindowAttention, ("qk_residual",), [0.73, 0.72, 0.70, 0.66]),
        (WindowAttentionV2, (), [0.02] * 4),
        (WindowAttentionV2, ("qk_residual",), [0.99, 0.98, 0.96, 0.88]),
    ],
)
def test_initial_diagonal_mass_is_as_computed_for_decorrelated_tokens(kind, modifiers, expected):
    """Tokens: LayerNorm of independent normal numbers, 49 of them; the four stages of Swin-T."""
    torch.manual_seed(0)
    for stage, value in enumerate(expected):
        dim = 96 * 2**stage
        attention = kind(Geometry(dim, dim // 32, (7, 7)), AttentionSpec(modifiers))
        torch.nn.init.trunc_normal_(attention.qkv.weight, std=0.02)
        mass = diagonal_mass(attention, F.layer_norm(torch.randn(32, 49, dim), (dim,)))
        assert mass == pytest.approx(value, abs=0.03), dim


@both_families
@pytest.mark.parametrize("flags", GRID)
def test_every_combination_trains_every_parameter_and_round_trips_its_state(family, flags):
    torch.manual_seed(0)
    model = small(family, **identity_options(*flags))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    touched = set()
    for _ in range(3):
        touched |= {name for name, g in loss_and_gradients(model).items() if g.abs().max() > 0}
        optimizer.step()
    assert touched == {name for name, _ in model.named_parameters()}
    again = small(family, **identity_options(*flags))
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(IMAGES), model(IMAGES))


@both_families
@pytest.mark.parametrize("place", ["stem", "stage"])
def test_a_pre_mlp_with_zero_output_is_the_plain_model(family, place):
    plain = randomise(small(family))
    model = copy_shared(plain, randomise(small(family, pre_mlp=place), seed=1))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "pre_mlp.mlp.fc2" in name:
                p.zero_()
    assert torch.equal(model(IMAGES), plain(IMAGES))


@both_families
def test_sw_mlp_token_mix_starts_as_the_plain_model_and_then_learns(family):
    plain = randomise(small(family))
    model = copy_shared(plain, small(family, sw_mlp="token_mix"))
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=1e-6)
    assert all(
        g.abs().max() > 0 for name, g in loss_and_gradients(model).items() if ".sw_mlp." in name
    )


def test_sw_mlp_shift_moves_each_fifth_of_the_channels_one_token():
    from models.layers.sw_mlp import ChannelShift

    x = torch.arange(2 * 3 * 4 * 10.0).view(2, 3, 4, 10)
    y = ChannelShift()(x, None)
    assert torch.equal(y[:, 1:, :, :2], x[:, :-1, :, :2])
    assert torch.equal(y[:, :-1, :, 2:4], x[:, 1:, :, 2:4])
    assert torch.equal(y[:, :, 1:, 4:6], x[:, :, :-1, 4:6])
    assert torch.equal(y[:, :, :-1, 6:8], x[:, :, 1:, 6:8])
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert not y[:, 0, :, :2].any()


def test_logit_scale_starts_as_asked_and_stays_at_most_100():
    model = small("swinv2", attention=AttentionSpec(logit_scale_init=3.0))
    attention = model.layers[0].blocks[0].attn
    torch.testing.assert_close(attention.terms().scale, torch.full((1, 2), 3.0))
    torch.nn.init.constant_(attention.logit_scale, 9.0)
    torch.testing.assert_close(attention.terms().scale, torch.full((1, 2), 100.0))
    with pytest.raises(ValueError, match="logit_scale_init is 200"):
        small("swinv2", attention=AttentionSpec(logit_scale_init=200.0))


def test_without_the_sigmoid_the_bias_is_the_mlp_itself():
    attention = (
        randomise(small("swinv2", attention=AttentionSpec(bias_sigmoid=False)))
        .layers[0]
        .blocks[0]
        .attn
    )
    table = attention.relative_coords_table.flatten(0, 2)
    torch.testing.assert_close(attention.terms().bias, attention.cpb_mlp(table))


def test_weight_decay_reaches_crpw_only_on_request():
    for option, expected in (
        ("crpw", True),
        ("crpw(weight_decay=True)", False),
        ("crpw(source=table)", True),
    ):
        model = with_modifiers("swin", option)
        names = {name for name, _ in model.named_parameters() if ".crpw." in name}
        assert names
        assert (names <= model.no_weight_decay()) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qk_residul", r"no attention modifier 'qk_residul'.*did you mean 'qk_residual'"),
        ("qk_residual(which=v)", "allowed are both, q, k"),
        ("qk_residual(wich=q)", "wich"),
        ("crpw(mode=add)", "allowed are add_to_scale, one_plus, sigmoid16"),
        ("crpw(renormalise=True)", "needs apply=probs"),
        ("crpw(", "cannot read"),
        ("crpw(1)", "cannot read"),
    ],
)
def test_a_wrong_modifier_is_refused_with_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=message):
        with_modifiers("swin", text)


def test_a_modifier_listed_twice_is_refused():
    with pytest.raises(ValueError, match="listed twice"):
        with_modifiers("swin", "crpw", "crpw(source=table)")


def test_a_modifier_defined_in_one_place_works_in_every_model_without_another_edit():
    @MODIFIERS.register("halve_logits")
    class HalveLogits(TermModifier):
        def forward(self, terms):
            return terms.replace(scale=terms.scale / 2, bias=terms.bias / 2)

    @MODIFIERS.register("identity_map")
    class IdentityMap(MapModifier):
        def forward(self, attn):
            return torch.eye(attn.shape[-1]).expand_as(attn)

    try:
        for family in WINDOW_FAMILIES:
            plain = randomise(small(family))
            halved = copy_shared(plain, with_modifiers(family, "halve_logits"))
            assert (halved(IMAGES) - plain(IMAGES)).abs().max() > 1e-5
            attention = (
                copy_shared(plain, with_modifiers(family, "identity_map")).layers[0].blocks[0].attn
            )
            x = torch.randn(1, 8, 8, 8)
            expected = attention.proj(
                attention.project(x)[..., 16:]
            )  # y = proj(v): attention has become redundant
            torch.testing.assert_close(
                attention(x, window_layout((8, 8), (4, 4), (2, 2))), expected
            )
    finally:
        for name in ("halve_logits", "identity_map"):
            del MODIFIERS._entries[name]


def test_the_open_path_equals_the_fast_one():
    for family in WINDOW_FAMILIES:
        model = randomise(small(family, **identity_options(True, True, True)))
        fast = model(IMAGES)
        for layer in model.layers:
            for block in layer.blocks:
                block.attn.map_tap.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(IMAGES), fast, rtol=1e-4, atol=1e-5)


def test_the_former_name_of_after_mask_is_still_called():
    class Former(MapModifier):
        def settle(self, attn):
            return 2 * attn

    attn = torch.rand(2, 3, 4, 4)
    assert torch.equal(Former(geometry=None).after_mask(attn), 2 * attn)
    assert torch.equal(MapModifier(geometry=None).after_mask(attn), attn)
