"""Locality self-attention: nobody attends to itself but who is alone."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.attention import AttentionSpec, Geometry
from models.attention.talking_attention import TalkingHeadsAttention
from tests.models.family.dense import compare, compare_fused
from tests.models.family.table_edits import (
    CASES,
    FUSED_PLACES,
    LONE,
    LONE_CASES,
    LONE_SHIFTED,
    PLACES,
    assert_runs_fused,
    by_head,
    products,
    run,
)


def masked(dense):
    """The softmax of all others' logits, of everyone's where there is no other."""
    t = dense.modifier("self_mask").t
    logits = products(dense) * by_head(t.exp()) + dense.bias
    hidden = (dense.own > 0) & (dense.count > 1)
    return dense.softmax(logits.masked_fill(hidden, -math.inf)) @ dense.v


def shared_out(dense):
    """(y - A_ii v_i) / (1 - A_ii), v_i where A_ii is 1."""
    own = (dense.A * dense.own).sum(-1, keepdim=True)
    others = dense.y - own * dense.v
    alone = dense.count == 1
    return torch.where(alone, dense.v, others / torch.where(alone, 1, 1 - own))


@pytest.mark.parametrize("place", [*CASES, *LONE_CASES], ids=str)
def test_it_is_the_softmax_over_all_others(place):
    compare(place.attention("self_mask"), place.x(), place.layout, masked)


@pytest.mark.parametrize("place", [*PLACES[:3], LONE_SHIFTED], ids=str)
def test_the_diagonal_of_plain_attention_is_shared_out(place):
    attention = place.attention("self_mask(temperature=False)")
    compare(attention, place.x(), place.layout, shared_out)


@pytest.mark.parametrize("place", [*FUSED_PLACES, LONE[0], LONE_SHIFTED], ids=str)
def test_the_fused_kernel_is_as_exact_as_plain_operations(place):
    attention = place.attention("self_mask")
    assert_runs_fused(attention)
    compare_fused(attention, place.x(), place.layout, masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "eager", "sdpa", "fused", "open"])
@pytest.mark.parametrize("place", [LONE[0], LONE_SHIFTED, LONE[4]], ids=str)
def test_who_is_alone_keeps_its_own_value_to_the_last_bit(place, backend, dtype):
    """Large logits too: a forbidden neighbour is never preferred."""
    attention = place.attention("self_mask")
    attention.spec = replace(attention.spec, backend=backend.replace("open", "auto"))
    if backend == "open":
        attention.map_tap.register_forward_hook(lambda *_: None)
    attention.proj = nn.Identity()
    seen = []
    attention.before_projection = lambda y, x: seen.append(y) or y
    with torch.no_grad():
        attention.qkv.weight[:32] *= 40
    x = place.x().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        output = attention(x, place.layout)
        v = attention.tokens(x)[..., 32:]
    corner = (-1, -1) if place.window == (7, 7) and place.shift == (0, 0) else (0, 0)
    assert torch.equal(output[(..., *corner, slice(None))], v[(..., *corner, slice(None))])
    assert not torch.equal(output[:, 3, 3], v[:, 3, 3])
    output.float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("backend", ["reference", "eager", "fused"])
def test_the_masked_row_of_the_bias_table_gets_no_gradient(backend):
    attention = LONE_SHIFTED.attention("self_mask")
    attention.spec = replace(attention.spec, backend=backend)
    run(attention, LONE_SHIFTED).square().sum().backward()
    gradient = attention.relative_position_bias_table.grad
    assert not gradient[12].any()  # 5 x 5 offsets
    assert (gradient[torch.arange(25) != 12].abs().sum(1) > 0).all()


def test_the_temperature_starts_at_the_scale_of_the_module():
    for place in PLACES:
        start, without = place.attention("self_mask"), place.attention("self_mask(temperature=off)")
        assert start.modifiers["self_mask"].t.shape == (2,)
        nn.init.zeros_(start.modifiers["self_mask"].t)
        assert torch.equal(run(start, place), run(without, place))


@pytest.mark.parametrize("prefix", [0, 1])
def test_mixed_heads_are_masked_behind_the_mixing(prefix):
    """A negative mixing would turn the mask into a preference."""
    geometry = Geometry(16, 2, (3, 3), prefix=prefix)
    torch.manual_seed(0)
    attention = TalkingHeadsAttention(geometry, AttentionSpec(("self_mask",)), mixing="normal")
    nn.init.constant_(attention.proj_l.weight, -1.0)
    maps = []
    attention.proj_w.register_forward_pre_hook(lambda _module, inputs: maps.append(inputs[0]))
    attention(torch.randn(2, prefix + 9, 16))
    own = torch.eye(prefix + 9, dtype=torch.bool)
    own[:prefix] = False
    assert torch.equal(maps[0] > 0, ~own.expand_as(maps[0]))
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, prefix + 9))


@pytest.mark.slow
def test_it_compiles_to_one_graph():
    attention = LONE_SHIFTED.attention("self_mask")
    compiled = torch.compile(copy.deepcopy(attention), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, LONE_SHIFTED), run(attention, LONE_SHIFTED))
