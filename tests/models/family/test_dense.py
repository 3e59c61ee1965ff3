"""The oracle itself: plain modules agree with it, and it sees a broken region."""

import pytest
import torch

from tests.models.family.dense import (
    Dense,
    Place,
    cases,
    compare,
    compare_fused,
    exact,
    lone_cases,
    plain,
    visible,
)


@pytest.mark.parametrize("place", cases() + lone_cases(), ids=str)
def test_plain_attention_is_the_formula_over_the_whole_grid(place):
    compare(place.attention(), place.x(), place.layout, plain, tolerance=1e-12)


@pytest.mark.parametrize("place", cases("swin", "swinv2")[3::5] + cases("vit")[:1], ids=str)
def test_the_fused_kernel_is_as_near_to_it_as_plain_operations(place):
    compare_fused(place.attention(), place.x(), place.layout, plain)


@pytest.mark.parametrize("broken", ["region", "padding", "offset", "scale"])
def test_a_broken_map_is_seen(broken):
    place = Place("swin", (6, 6), (4, 4), (2, 2))

    def formula(dense):
        if broken == "offset":
            return dense.softmax(dense.logits.mT) @ dense.v
        if broken == "scale":
            return dense.softmax(1.01 * dense.logits) @ dense.v
        dense.visible = visible(place.grid, place.window, (0, 0) if broken == "region" else (1, 2))
        return dense.softmax(dense.logits) @ dense.v

    with pytest.raises(AssertionError, match="output"):
        compare(place.attention(), place.x(), place.layout, formula)


def test_a_wrong_gradient_is_seen():
    place = Place("vit", (2, 3), (2, 3))
    with pytest.raises(AssertionError, match="x:"):
        compare(place.attention(), place.x(), None, lambda dense: dense.A.detach() @ dense.v)


def test_the_counts_are_those_of_the_regions():
    place = Place("swin", (6, 6), (4, 4), (2, 2))
    dense = Dense(exact(place.attention()), place.x().double(), place.layout)
    counts = dense.count.view(6, 6)
    assert counts[0, 0] == 4  # two rows and columns that the roll brought to the end
    assert counts[3, 3] == 16
    assert counts[0, 3] == 8
    assert torch.equal(dense.U.sum(1), torch.ones(36, dtype=torch.float64))


@pytest.mark.parametrize("place", lone_cases("swin"), ids=str)
def test_a_lone_token_is_the_only_one_it_sees(place):
    seen = visible(place.grid, place.window, place.shift)
    assert (seen.sum(1) == 1).sum() == 1
