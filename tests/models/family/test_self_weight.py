"""CRPW at the diagonal alone."""

import pytest
import torch

from tests.models.family.dense import compare, compare_fused
from tests.models.family.table_edits import (
    CASES,
    FUSED_PLACES,
    PLACES,
    assert_neutral,
    assert_runs_fused,
    by_head,
    products,
)


def weighted(dense):
    """The logit of a token with itself times 1 + w."""
    factor = 1 + by_head(dense.modifier("self_weight").w) * dense.own
    return dense.softmax(products(dense) * factor + dense.bias) @ dense.v


@pytest.mark.parametrize("place", CASES, ids=str)
def test_it_multiplies_the_logit_of_a_token_with_itself(place):
    compare(place.attention("self_weight"), place.x(), place.layout, weighted)


@pytest.mark.parametrize("place", FUSED_PLACES, ids=str)
def test_the_fused_kernel_is_as_exact_as_plain_operations(place):
    attention = place.attention("self_weight")
    assert_runs_fused(attention)
    compare_fused(attention, place.x(), place.layout, weighted)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_0_changes_no_bit(place):
    assert_neutral(place, "self_weight")


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_it_is_crpw_with_zeros_off_the_diagonal(place):
    attention = place.attention("self_weight(init=0.5)")
    crpw = place.attention("crpw(source=table, mode=one_plus)")
    w, table = attention.modifiers["self_weight"].w, crpw.modifiers["crpw"].table
    with torch.no_grad():
        table.zero_()
        table[len(table) // 2] = w
    assert torch.equal(attention.terms().dense("scale"), crpw.terms().dense("scale"))
    assert w.shape == (2,)
