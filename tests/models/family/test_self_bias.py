"""A learned preference for oneself, added to the logits."""

import pytest
import torch

from tests.models.family.dense import Place, compare, compare_fused
from tests.models.family.table_edits import (
    CASES,
    FUSED_PLACES,
    PLACES,
    assert_neutral,
    assert_runs_fused,
    by_head,
)


def biased(dense):
    """b more at the logit of a token with itself."""
    b = by_head(dense.modifier("self_bias").b)
    return dense.softmax(dense.logits + b * dense.own) @ dense.v


@pytest.mark.parametrize("place", CASES, ids=str)
def test_it_is_added_to_the_logit_of_a_token_with_itself(place):
    compare(place.attention("self_bias"), place.x(), place.layout, biased)


@pytest.mark.parametrize("place", FUSED_PLACES, ids=str)
def test_the_fused_kernel_is_as_exact_as_plain_operations(place):
    attention = place.attention("self_bias")
    assert_runs_fused(attention)
    compare_fused(attention, place.x(), place.layout, biased)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_0_changes_no_bit(place):
    assert_neutral(place, "self_bias")


@pytest.mark.parametrize("place", PLACES[:3], ids=str)
def test_a_large_one_leaves_every_token_its_own_value(place):
    attention = place.attention("self_bias")
    torch.nn.init.constant_(attention.modifiers["self_bias"].b, 1e3)
    compare(attention, place.x(), place.layout, lambda dense: dense.v)


def test_beside_a_dense_bias_it_takes_its_form():
    """BeiT of timm has a bias for the pairs of class tokens too."""
    place = Place("vit", (2, 2), (2, 2), prefix=1)
    attention = place.attention("self_bias(init=0.5)")
    terms = attention.terms().replace(bias=torch.randn(2, 5, 5))
    bias = attention.modifiers["self_bias"](terms).bias
    added = torch.diag(torch.tensor([0.0, 1, 1, 1, 1])) * by_head(
        attention.modifiers["self_bias"].b
    )
    torch.testing.assert_close(bias, terms.bias + added, rtol=0, atol=0)
