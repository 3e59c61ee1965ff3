"""A temperature per head: CRPW made uniform."""

import pytest
import torch

from kernels.window_attention import OffsetTerms
from tests.models.family.dense import Place, compare, compare_fused
from tests.models.family.table_edits import (
    CASES,
    FUSED_PLACES,
    PLACES,
    assert_neutral,
    assert_runs_fused,
    by_head,
    products,
    run,
)

CLASS_TOKEN = Place("vit", (2, 2), (2, 2), prefix=1)


def warmed(dense):
    """All logits of a head times exp(t), before the bias."""
    t = dense.modifier("head_temperature").t
    return dense.softmax(products(dense) * by_head(t.exp()) + dense.bias) @ dense.v


@pytest.mark.parametrize("place", CASES, ids=str)
def test_it_multiplies_all_logits_of_a_head(place):
    compare(place.attention("head_temperature"), place.x(), place.layout, warmed)


@pytest.mark.parametrize("place", FUSED_PLACES, ids=str)
def test_the_fused_kernel_is_as_exact_as_plain_operations(place):
    attention = place.attention("head_temperature")
    assert_runs_fused(attention)
    compare_fused(attention, place.x(), place.layout, warmed)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_0_changes_no_bit(place):
    assert_neutral(place, "head_temperature")


def test_it_is_crpw_with_one_weight_for_all_offsets():
    for place in PLACES[:3]:
        attention = place.attention("head_temperature")
        crpw = place.attention("crpw(source=table, mode=one_plus)")
        with torch.no_grad():
            crpw.modifiers["crpw"].table.copy_(attention.modifiers["head_temperature"].t.expm1())
        torch.testing.assert_close(run(attention, place), run(crpw, place))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["after", "before"])
def test_a_dense_scale_of_as_many_tokens_as_heads_is_multiplied_head_by_head(order):
    """Where N = H, (H,) would also fit the axis of the keys."""
    place = Place("swin", (2, 2), (2, 2))
    texts = ["elementwise_mask", "head_temperature"]

    def formula(dense):
        mask, t = dense.modifier("elementwise_mask").mask, dense.modifier("head_temperature").t
        logits = products(dense) * mask * by_head(t.exp()) + dense.bias
        return dense.softmax(logits) @ dense.v

    attention = place.attention(*(texts[i] for i in order), heads=4)
    compare(attention, place.x(), place.layout, formula)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["after", "before"])
@pytest.mark.parametrize(
    "other", ["crpw(source=table, mode=one_plus)", "self_weight", "elementwise_mask"]
)
def test_class_tokens_take_it_whatever_it_stands_beside(other, order):
    attention = CLASS_TOKEN.attention(*([other, "head_temperature"][i] for i in order))
    factor = by_head(attention.modifiers["head_temperature"].t.exp())
    scale = attention.terms().dense("scale")
    torch.testing.assert_close(scale[:, :1], (8**-0.5 * factor).expand(2, 1, 5))
    torch.testing.assert_close(scale[:, :, :1], (8**-0.5 * factor).expand(2, 5, 1))
    assert not torch.isclose(scale[:, 1, 1], scale[:, 0, 0]).any()


def test_every_form_of_the_scale_is_multiplied_along_its_heads():
    factor = torch.tensor([2.0, 3.0])
    for scale in (torch.ones(1, 2), torch.ones(9, 2), torch.ones(2, 4, 4), torch.ones(2, 1, 1)):
        terms = OffsetTerms((2, 2), scale).scale_heads(factor)
        dense = terms.dense("scale").expand(2, 4, 4)
        assert torch.equal(dense, by_head(factor).expand(2, 4, 4))
