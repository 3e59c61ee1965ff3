"""Gates of the heads' results: the formula over the whole grid, open starts, decay, counts."""

import pytest
import torch

from checkpoint import load_weights
from models.attention import AttentionSpec, Geometry
from models.attention.modifiers import MODIFIERS
from models.attention.report import why_not_fused
from models.counting import count_macs
from optimizer import decay_rule
from tests.models.builders import randomise, small
from tests.models.family.dense import Place, cases, compare, compare_fused

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
KINDS = ["gate", "gate(kind=element)", "gate(init=paper)", "gate(kind=element, init=paper)"]
both_kinds = pytest.mark.parametrize("kind", ["head", "element"])


def seeded(family, *modifiers):
    torch.manual_seed(0)
    return small(family, attention=AttentionSpec(modifiers))


def formula(text):
    most = 1 if "paper" in text else 2

    def gated(dense):
        scores = dense.x @ dense.modifier("gate").linear.weight.T  # (B, L, heads or C)
        gates = most / (1 + torch.exp(-scores))
        if "element" not in text:
            gates = gates.repeat_interleave(dense.v.shape[-1], -1)
        return dense.merged(dense.y) * gates

    return gated


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("place", cases("swin") + cases("vit")[1:], ids=str)
def test_the_result_is_gated_by_its_own_token_wherever_that_stands(place, text):
    compare(place.attention(text), place.x(), place.layout, formula(text))


@both_kinds
def test_swinv2_and_the_fused_kernel_give_the_same(kind):
    text = f"gate(kind={kind})"
    place = Place("swinv2", (6, 6), (4, 4), (2, 2))
    compare(place.attention(text), place.x(), place.layout, formula(text))
    compare_fused(place.attention(text), place.x(), place.layout, formula(text))


@pytest.mark.parametrize(
    ("family", "kind", "low"),
    [
        ("swin", "head", False),
        ("swin", "element", True),
        ("vit", "head", True),
        ("vit", "element", False),
    ],
)
def test_open_gates_are_the_plain_model_to_the_last_bit(family, kind, low):
    plain, gated = seeded(family), seeded(family, f"gate(kind={kind})")
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        results = plain(IMAGES), gated(IMAGES)
    assert torch.equal(*results) and results[0].dtype == results[1].dtype
    results[1].float().square().sum().backward()
    gates = [weight for name, weight in gated.named_parameters() if ".gate." in name]
    assert gates and all(weight.grad.abs().max() > 0 for weight in gates)


def test_the_start_of_the_paper_is_near_one_half_and_other_in_each_layer():
    model = seeded("swin", "gate(init=paper, kind=element)")
    first, second = (block.attn.modifiers["gate"].linear.weight for block in model.layers[0].blocks)
    assert not torch.equal(first, second)
    weights = torch.cat([w.flatten() for name, w in model.named_parameters() if ".gate." in name])
    assert weights.std().item() == pytest.approx(0.02, rel=4 / (2 * len(weights)) ** 0.5)
    place = Place("vit", (2, 2), (2, 2))
    attention = place.attention("gate(init=paper)")
    torch.nn.init.zeros_(attention.modifiers["gate"].linear.weight)
    plain = place.attention()
    torch.testing.assert_close(
        attention(place.x()) - attention.proj.bias, (plain(place.x()) - plain.proj.bias) / 2
    )


@both_kinds
def test_a_gate_near_one_is_not_rounded_away_in_bfloat16(kind):
    """1.003 is 1 in bfloat16; on the products of many numbers it shows in the mean."""
    gate = MODIFIERS.create(f"gate(kind={kind})", Geometry(16, 2, (4, 4)))
    torch.nn.init.constant_(gate.linear.weight, 0.006 / 16)
    y = (1 + torch.rand(4, 8, 8, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        gated = gate(y, None, torch.ones(4, 8, 8, 16), None)
    assert gated.dtype == torch.bfloat16
    assert (gated.float() / y.float()).mean().item() == pytest.approx(1.003, abs=5e-4)


@both_kinds
def test_gates_decay_and_are_as_many_as_said(kind):
    plain, gated = small("swin"), small("swin", attention=AttentionSpec((f"gate(kind={kind})",)))
    added = {name: p for name, p in gated.named_parameters() if ".gate." in name}
    wanted = (2 * 8 * 2 + 16 * 4) if kind == "head" else (2 * 8 * 8 + 16 * 16)
    assert sum(p.numel() for p in added.values()) == wanted
    assert len(gated.state_dict()) == len(plain.state_dict()) + len(added)
    decays = decay_rule(gated)
    assert all(decays(name, weight) for name, weight in added.items())


@pytest.mark.parametrize(("family", "kind"), [("swin", "head"), ("vit", "element")])
def test_their_product_is_counted_as_a_linear_layer(family, kind):
    plain, gated = (
        small(family, attention=AttentionSpec(names)) for names in ((), (f"gate(kind={kind})",))
    )
    counted = count_macs(gated, IMAGES) - count_macs(plain, IMAGES)
    assert counted.attention == counted.norm == 0
    assert counted.linear == gated.flops() - plain.flops() > 0


def test_released_weights_start_as_the_released_function_behind_open_gates():
    released = randomise(small("vit"))
    gated = small("vit", attention=AttentionSpec(("gate(kind=element)",)))
    report = load_weights(gated, released.state_dict())
    assert torch.equal(gated(IMAGES), released(IMAGES)) and "modifiers.gate" in report.text


def test_gated_attention_stays_on_the_fused_path():
    model = small("swin", embed_dim=32, attention=AttentionSpec(("gate",)))
    with torch.autocast("cpu", torch.bfloat16):
        low = why_not_fused(model)
    assert set(why_not_fused(model).values()) == set(low.values()) == {None}


@pytest.mark.slow
def test_it_is_traced_as_one_graph():
    place = Place("vit", (3, 4), (3, 4), prefix=1)
    attention = place.attention("gate")
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(place.x()), attention(place.x()))
