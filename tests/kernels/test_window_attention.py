"""The fast forms of window attention against the specification, and the layout against its
definition.
"""

import itertools

import pytest
import torch

from kernels.window_attention import (
    BACKENDS,
    OffsetTerms,
    eager,
    explain,
    relative_position_index,
    window_attention,
    window_attention_reference,
    window_layout,
    window_partition,
    window_reverse,
)
from tests.helpers import golden
from tests.kernels.grids import GRIDS, offsets


def draw(
    grid, window, shift, *, heads=3, dim=4, batch=3, scale="table", bias=True, dtype=torch.float64
):
    layout = window_layout(grid, window, shift)
    qkv = torch.randn(batch, *grid, 3 * heads * dim, dtype=dtype)
    tables = {
        "scale": torch.rand(offsets(window) if scale == "table" else 1, heads, dtype=dtype) + 0.2,
        "bias": torch.randn(offsets(window), heads, dtype=dtype) if bias else None,
    }
    return layout, qkv, tables


def run(function, layout, qkv, tables, cosine, heads=3):
    leaves = [t.clone().requires_grad_() for t in (qkv, *tables.values()) if t is not None]
    terms = OffsetTerms(layout.window, *leaves[1:])
    y = function(leaves[0], terms, layout, heads, cosine)
    generator = torch.Generator().manual_seed(3)
    return [
        y.detach(),
        *torch.autograd.grad(
            (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum(), leaves
        ),
    ]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale", ["table", "uniform"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
def test_eager_attention_and_its_gradients_equal_the_reference(
    grid, scale, bias, cosine, monkeypatch
):
    monkeypatch.setattr(
        eager, "CHUNK_BYTES", 1
    )  # one image a chunk, so that sums over chunks are exercised
    torch.manual_seed(0)
    layout, qkv, tables = draw(*grid, scale=scale, bias=bias)
    for ours, exact in zip(
        run(BACKENDS["eager"], layout, qkv, tables, cosine),
        run(BACKENDS["reference"], layout, qkv, tables, cosine),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("grid", "bias", "cosine"), list(itertools.product(GRIDS, (True, False), (True, False)))
)
def test_sdpa_equals_the_reference(grid, bias, cosine):
    torch.manual_seed(0)
    layout, qkv, tables = draw(*grid, scale="uniform", bias=bias)
    for ours, exact in zip(
        run(BACKENDS["sdpa"], layout, qkv, tables, cosine),
        run(BACKENDS["reference"], layout, qkv, tables, cosine),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_hand_written_backward_passes_gradcheck(cosine):
    torch.manual_seed(0)
    layout, qkv, tables = draw((3, 4), (2, 2), (1, 1), heads=2, dim=2, batch=2)

    def attention(qkv, scale, bias):
        return BACKENDS["eager"](qkv, OffsetTerms((2, 2), scale, bias), layout, 2, cosine)

    assert torch.autograd.gradcheck(
        attention, [t.requires_grad_() for t in (qkv, *tables.values())]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cosine", [False, True])
def test_eager_errs_no_more_than_twice_the_reference_in_16_bits(dtype, cosine):
    torch.manual_seed(0)
    layout, qkv, tables = draw((14, 14), (7, 7), (3, 3), dim=32, batch=4, dtype=torch.float32)
    low = qkv.to(dtype)
    exact = run(
        window_attention_reference,
        layout,
        low.double(),
        {k: v.double() for k, v in tables.items()},
        cosine,
    )
    plain, ours = (
        run(BACKENDS[name], layout, low, tables, cosine) for name in ("reference", "eager")
    )
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        error = [((t.double() - truth).norm() / truth.norm()).item() for t in (mine, theirs)]
        assert error[0] <= 2 * error[1] + torch.finfo(dtype).eps


def test_without_gradients_eager_still_equals_the_reference_and_keeps_the_masked_bias():
    layout, qkv, tables = draw((8, 8), (4, 4), (2, 2))
    terms = OffsetTerms((4, 4), **tables)
    with torch.no_grad():
        first = BACKENDS["eager"](qkv, terms, layout, 3)
        torch.testing.assert_close(first, window_attention_reference(qkv, terms, layout, 3))
    assert terms.masked_bias(layout) is terms.masked_bias(layout)


def test_post_softmax_weight_scales_the_map_and_renormalising_restores_the_rows():
    layout, qkv, tables = draw((4, 4), (4, 4), (0, 0))
    qkv[..., 24:] = 1  # v of ones shows the sums of the rows
    post = torch.rand(offsets((4, 4)), 3, dtype=qkv.dtype) + 0.5
    scaled = window_attention(qkv, OffsetTerms((4, 4), **tables, post=post), layout, 3)
    plain = window_attention(qkv, OffsetTerms((4, 4), **tables), layout, 3)
    sums = window_attention(
        qkv, OffsetTerms((4, 4), **tables, post=post, renormalise=True), layout, 3
    )
    torch.testing.assert_close(sums, torch.ones_like(sums))
    torch.testing.assert_close(plain, torch.ones_like(plain))
    assert (scaled - 1).abs().max() > 0.05


@pytest.mark.parametrize("grid", [(5, 6), (7, 3)])
def test_padding_never_reaches_an_image_token(grid):
    """Each window of a padded map attends to its image tokens alone: the same as attention over
    just those tokens.
    """
    torch.manual_seed(0)
    layout, qkv, tables = draw(grid, (4, 4), (0, 0), batch=1, heads=1)
    y = window_attention_reference(qkv, OffsetTerms((4, 4), **tables), layout, 1)
    index = relative_position_index((4, 4))
    for top, left in itertools.product(range(0, grid[0], 4), range(0, grid[1], 4)):
        rows, columns = range(top, min(top + 4, grid[0])), range(left, min(left + 4, grid[1]))
        tokens = torch.stack([qkv[0, r, c] for r in rows for c in columns])
        place = [(r - top) * 4 + c - left for r in rows for c in columns]
        pairs = index[place][:, place]
        q, k, v = tokens.chunk(3, -1)
        expected = (q @ k.T * tables["scale"][pairs, 0] + tables["bias"][pairs, 0]).softmax(-1) @ v
        torch.testing.assert_close(
            torch.stack([y[0, r, c] for r in rows for c in columns]), expected
        )


def test_a_shift_is_masked_exactly_where_the_roll_joined_strangers():
    """-100 between two tokens of a window if and only if they were not within one window's reach
    before the roll.
    """
    layout = window_layout((8, 12), (4, 4), (2, 2))
    place = layout.tokens.view(-1, 16)
    row, column = place // 12, place % 12
    apart = ((row[:, :, None] - row[:, None]).abs() >= 4) | (
        (column[:, :, None] - column[:, None]).abs() >= 4
    )
    assert torch.equal(layout.mask, apart * -100.0)


def test_windows_are_the_reference_s():
    meta, tensors = golden("windows")
    for number, case in enumerate(meta["partition"]):
        part = {
            name: tensors[f"partition/{number}/{name}"]
            for name in ("input", "windows", "reverse_input", "reverse_output")
        }
        side, shift = case["window_size"], case["shift_size"]
        rolled = part["input"].roll((-shift, -shift), (1, 2))
        assert torch.equal(window_partition(rolled, side), part["windows"])
        back = window_reverse(part["reverse_input"], side, case["height"], case["width"]).roll(
            (shift, shift), (1, 2)
        )
        assert torch.equal(back, part["reverse_output"])
        tokens = window_layout((case["height"], case["width"]), (side, side), (shift, shift)).tokens
        assert torch.equal(
            part["input"].flatten(1, 2)[:, tokens].view_as(part["windows"]), part["windows"]
        )
    for side in meta["relative_position_index"]:
        assert torch.equal(
            relative_position_index(side), tensors[f"relative_position_index/{side}"]
        )
    for case in meta["attn_mask"]:
        side, shift = (case["window_size"],) * 2, (case["shift_size"],) * 2
        expected = tensors[f"attn_mask/{case['height']}x{case['width']}_w{side[0]}"]
        assert torch.equal(
            window_layout((case["height"], case["width"]), side, shift).mask, expected
        )


def test_partition_and_reverse_undo_each_other():
    x = torch.randn(2, 6, 12, 5)
    assert torch.equal(window_reverse(window_partition(x, (3, 4)), (3, 4), 6, 12), x)


@pytest.mark.parametrize("window", [(1, 1), (3, 3), (2, 4)])
def test_relative_index_numbers_the_offsets_of_every_pair(window):
    index = relative_position_index(window)
    rows, columns = window
    for i, j in itertools.product(range(rows * columns), repeat=2):
        dy, dx = i // columns - j // columns, i % columns - j % columns
        assert index[i, j] == (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1


def test_explain_names_the_backend_and_forcing_an_impossible_one_says_why(monkeypatch):
    layout, qkv, tables = draw((4, 4), (4, 4), (0, 0))
    terms = OffsetTerms((4, 4), **tables)
    assert explain(qkv, terms)[0] == "eager"
    assert explain(qkv, terms, dropout=0.1)[0] == "reference"
    with pytest.raises(ValueError, match="one scale per head"):
        window_attention(qkv, terms, layout, 3, backend="sdpa")
    with pytest.raises(ValueError, match=r"no backend 'fast'.*reference"):
        window_attention(qkv, terms, layout, 3, backend="fast")
    monkeypatch.setenv("WINDOW_ATTENTION_BACKEND", "sdpa")
    with pytest.raises(ValueError, match="one scale per head"):
        window_attention(qkv, terms, layout, 3)


def test_class_tokens_keep_the_neutral_weight_no_bias_and_no_post_factor():
    uniform = torch.rand(1, 3)
    terms = OffsetTerms((2, 3), uniform, prefix=2).replace(
        scale=torch.rand(15, 3), bias=torch.randn(15, 3), post=torch.rand(15, 3)
    )
    plain = OffsetTerms((2, 3), terms.scale, terms.bias, terms.post)
    for name, outside in (
        ("scale", uniform.view(3, 1, 1)),
        ("bias", torch.zeros(3, 1, 1)),
        ("post", torch.ones(3, 1, 1)),
    ):
        dense = terms.dense(name)
        assert dense.shape == (3, 8, 8)
        assert torch.equal(dense[:, 2:, 2:], plain.dense(name))
        assert torch.equal(dense[:, :2], outside.expand(3, 2, 8))
        assert torch.equal(dense[:, :, :2], outside.expand(3, 8, 2))


def test_the_former_name_of_the_scale_is_still_read():
    scale, bias = torch.rand(1, 3), torch.randn(15, 3)
    terms = OffsetTerms((2, 3), weight=scale, bias=bias)
    assert terms.scale is terms.weight is scale
    doubled = terms.replace(weight=2 * terms.weight)
    assert torch.equal(doubled.dense("weight"), 2 * terms.dense("scale"))
    assert terms.matching("weight", bias, 1.0) is bias
    with pytest.raises(TypeError, match="no scale"):
        OffsetTerms((2, 3))


def test_pairs_may_be_masked_by_minus_infinity_but_not_by_nan():
    window, shift = (4, 4), (2, 2)
    qkv = torch.randn(2, 7, 9, 3 * 8)
    terms = OffsetTerms(window, torch.ones(1, 2), torch.randn(offsets(window), 2))
    far, never = (window_layout((7, 9), window, shift, value) for value in (-1e4, -torch.inf))
    expected = window_attention_reference(qkv, terms, far, 2)
    for backend in ("reference", "eager", "sdpa"):
        y = window_attention(qkv, terms, never, 2, backend=backend)
        torch.testing.assert_close(y, expected)
    with pytest.raises(ValueError, match="mask_value is nan"):
        window_layout((7, 9), window, shift, float("nan"))
