"""Normed queries and keys: the formula over the whole grid, what it makes of scales, refusals."""

import re

import pytest
import torch

from models import timm_model
from models.attention import AttentionSpec
from models.attention.report import why_not_fused
from optimizer import decay_rule
from tests.models.builders import randomise, small
from tests.models.family.dense import Place, cases, compare, compare_fused

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
EPS = 1e-6
kinds = pytest.mark.parametrize("kind", ["layer", "rms"])


def normed(x, kind):
    """By the definition, over the last axis."""
    if kind == "rms":
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def formula(kind):
    def attended(dense):
        modifier = dense.modifier("qk_norm")
        q, k = (normed(part, kind) for part in (dense.q, dense.k))
        logits = dense.logits_of(q * modifier.q_gain, k * modifier.k_gain)
        return dense.softmax(logits) @ dense.v

    return attended


@kinds
@pytest.mark.parametrize("place", cases("swin", "vit"), ids=str)
def test_each_heads_q_and_k_are_normed_before_the_scale(place, kind):
    attention = place.attention(f"qk_norm(kind={kind})")
    compare(attention, place.x(), place.layout, formula(kind))


@kinds
def test_the_fused_kernel_takes_normed_tokens(kind):
    place = Place("swin", (6, 6), (4, 4), (2, 2))
    attention = place.attention(f"qk_norm(kind={kind})")
    compare_fused(attention, place.x(), place.layout, formula(kind))
    model = small("swin", embed_dim=32, attention=AttentionSpec((f"qk_norm(kind={kind})",)))
    with torch.autocast("cpu", torch.bfloat16):
        low = why_not_fused(model)
    assert set(why_not_fused(model).values()) == set(low.values()) == {None}


@kinds
def test_scaling_the_query_weights_leaves_the_result_and_so_no_sharpness_is_left_to_them(kind):
    place = Place("vit", (3, 4), (3, 4), prefix=1)
    attention = place.attention(f"qk_norm(kind={kind})").double()
    with torch.no_grad():
        attention.qkv.bias.zero_()
        before = attention(place.x().double())
        attention.qkv.weight[:16] *= 7.0
        after = attention(place.x().double())
        attention.modifiers["qk_norm"].q_gain *= 7.0
        sharper = attention(place.x().double())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # but eps
    assert (sharper - before).abs().max() > 1e-2


def test_layer_norm_takes_a_constant_over_a_heads_channels_away_and_rms_does_not():
    for kind, same in (("layer", True), ("rms", False)):
        place = Place("vit", (3, 4), (3, 4))
        attention = place.attention(f"qk_norm(kind={kind})").double()
        before = attention(place.x().double())
        with torch.no_grad():
            attention.qkv.bias[:8] += 2.0  # q of the first head
        after = attention(place.x().double())
        assert torch.allclose(after, before, rtol=0, atol=1e-5) is same


def test_it_acts_behind_the_qk_residual():
    place = Place("vit", (3, 4), (3, 4))
    attention = place.attention("qk_norm", "qk_residual")

    def residual(dense):
        modifier, heads = dense.modifier("qk_norm"), dense.heads
        x = dense.x.unflatten(-1, (heads, -1)).transpose(1, 2)
        q, k = (normed(part + x, "layer") for part in (dense.q, dense.k))
        logits = dense.logits_of(q * modifier.q_gain, k * modifier.k_gain)
        return dense.softmax(logits) @ dense.v

    compare(attention, place.x(), place.layout, residual)


@kinds
def test_the_dtype_of_autocast_is_kept_and_the_statistics_are_float32s(kind):
    attention = Place("vit", (4, 4), (4, 4)).attention(f"qk_norm(kind={kind})", dim=32)
    modifier = attention.modifiers["qk_norm"]
    torch.nn.init.ones_(modifier.q_gain)
    torch.nn.init.ones_(modifier.k_gain)
    qkv = (100 + torch.randn(2, 16, 96)).bfloat16()  # bfloat16 sums would lose the spread
    with torch.autocast("cpu", torch.bfloat16):
        found = modifier(qkv)
    assert found.dtype == torch.bfloat16
    heads = qkv.double().unflatten(-1, (3, 2, -1))
    torch.testing.assert_close(
        found.unflatten(-1, (3, 2, -1))[..., :2, :, :].double(),
        normed(heads[..., :2, :, :], kind),
        rtol=2**-8,
        atol=2**-9,
    )
    assert torch.equal(found[..., 64:], qkv[..., 64:])


def test_gains_start_at_one_belong_to_all_heads_and_do_not_decay():
    model = small("swin", attention=AttentionSpec(("qk_norm",)))
    gains = {name: p for name, p in model.named_parameters() if ".qk_norm." in name}
    assert len(gains) == 6 and all(torch.equal(gain, torch.ones(4)) for gain in gains.values())
    decays = decay_rule(model)
    assert not any(decays(name, gain) for name, gain in gains.items())


TIMM = "vit_tiny_patch16_224(patch_size=8, embed_dim=16, depth=1, num_heads=2, qk_norm={})"
SPEC = AttentionSpec(("qk_norm",))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: small("swinv2", attention=SPEC), "WindowAttentionV2 divides q and k by"),
        (lambda: timm_model(TIMM.format(True), 5, 16, attention=SPEC), "qk_norm=False"),
        (lambda: small("swin", attention=AttentionSpec(("qk_norm(kind=l2)",))), "layer, rms"),
    ],
)
def test_attention_that_norms_q_and_k_itself_refuses_it(build, words):
    with pytest.raises(ValueError, match=words) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_it_is_timms_qk_norm_without_the_biases():
    ours = randomise(timm_model(TIMM.format(False), 5, 16, attention=SPEC)).state_dict()
    theirs = timm_model(TIMM.format(True), 5, 16)
    state = {
        name: ours.get(re.sub(r"([qk])_norm\.weight", r"modifiers.qk_norm.\1_gain", name))
        for name in theirs.state_dict()
    }
    theirs.load_state_dict(
        {name: value for name, value in state.items() if value is not None}, False
    )
    model = timm_model(TIMM.format(False), 5, 16, attention=SPEC)
    model.load_state_dict(ours)
    torch.testing.assert_close(model(IMAGES), theirs(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@kinds
def test_it_is_traced_as_one_graph(kind):
    place = Place("vit", (3, 4), (3, 4))
    attention = place.attention(f"qk_norm(kind={kind})")
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(place.x()), attention(place.x()))
