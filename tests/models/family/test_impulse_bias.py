"""Impulse starts: each head's offset, by tokens of a grid and not by rows of the table."""

import math

import pytest
import torch

from kernels.window_attention import window_layout
from models import timm_model
from models.attention import AttentionSpec, Geometry, WindowAttention

# (down, right) of the key from the query, in the released order of a 3 x 3
SHIFTS = [(0, 0), (-1, 0), (0, 1), (0, -1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]


def first_map(text, window, heads):
    """(heads, rows, columns, rows, columns): the map where q = k = 0 and the drawn bias is 0."""
    torch.manual_seed(0)
    attention = WindowAttention(Geometry(4 * heads, heads, window), AttentionSpec((text,)))
    for parameter in attention.parameters():
        torch.nn.init.zeros_(parameter)
    attention.initialise_modifiers("test")
    kept = []
    attention.map_tap.register_forward_hook(lambda _m, _i, attn: kept.append(attn))
    with torch.no_grad():
        attention(torch.zeros(1, *window, 4 * heads), window_layout(window, window))
    return kept[0][0].unflatten(1, window).unflatten(3, window)


def assert_shifts(attn, shifts, share):
    """A token's neighbour at the head's shift has `share` of the row, all others the same rest."""
    rows, columns = attn.shape[1:3]
    for head, (down, right) in enumerate(shifts):
        for row in range(max(0, -down), min(rows, rows - down)):
            for column in range(max(0, -right), min(columns, columns - right)):
                there = attn[head, row, column]
                assert there[row + down, column + right].item() == pytest.approx(share, abs=1e-6)
                rest = (1 - share) / (rows * columns - 1)
                assert there.min().item() == pytest.approx(rest, abs=1e-6)


@pytest.mark.parametrize("window", [(4, 4), (3, 5)])
def test_half_of_a_row_goes_to_the_shift_of_its_head_and_heads_begin_again(window):
    assert_shifts(first_map("impulse_bias", window, 10), [*SHIFTS, SHIFTS[0]], 0.5)


def test_a_scale_is_the_logit_of_the_shift():
    share = math.exp(2) / (math.exp(2) + 15)
    assert_shifts(first_map("impulse_bias(scale=2)", (4, 4), 2), SHIFTS[:2], share)


def test_larger_kernels_take_the_nearest_places_first():
    nearest = [(0, 0), (-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1)]
    assert_shifts(first_map("impulse_bias(kernel=5)", (4, 4), 6), nearest, 0.5)


@pytest.mark.slow
def test_timms_beit_takes_it_too_and_its_class_token_keeps_its_bias():
    text = "beit_base_patch16_224(patch_size=8, embed_dim=16, depth=1, num_heads=2)"
    torch.manual_seed(0)
    plain = timm_model(text, 5, 32)
    torch.manual_seed(0)
    started = timm_model(text, 5, 32, attention=AttentionSpec(("impulse_bias",)))
    before, after = (
        model.blocks[0].attn.relative_position_bias_table for model in (plain, started)
    )
    index = started.blocks[0].attn.relative_position_index[1:, 1:]  # patches of a 4 x 4 grid
    assert (before != after).sum() == 2
    assert after[index[5, 5], 0].item() == pytest.approx(math.log(15))
    assert after[index[5, 1], 1].item() == pytest.approx(math.log(15))  # the one above
