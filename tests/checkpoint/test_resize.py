"""Resizing of position tables: properties of the interpolations themselves."""

import numpy as np
import pytest
import torch

from checkpoint.resize import (
    geometric_nodes,
    index_extent,
    resize_absolute,
    resize_bias_table,
    spline_matrix,
    whole_offsets,
)


def position_index(rows: int, columns: int) -> torch.Tensor:
    """idx(i, j) = (y_i - y_j + rows - 1) (2 columns - 1) + (x_i - x_j + columns - 1), tokens
    row-major.
    """
    y, x = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    return (y[:, None] - y + rows - 1) * (2 * columns - 1) + (x[:, None] - x + columns - 1)


@pytest.mark.parametrize("window", [(7, 7), (3, 5), (5, 3), (1, 4), (2, 2), (1, 1)])
def test_a_position_index_tells_its_window(window):
    index, expected = position_index(*window), (2 * window[0] - 1, 2 * window[1] - 1)
    assert (
        index_extent(index) == expected
        and index_extent(index.flatten()) == expected
        and index_extent(index + 1) == expected
    )


@pytest.mark.parametrize("method", ["bicubic", "geometric"])
def test_resizing_keeps_constants_heads_and_the_same_size(method):
    table = torch.tensor([1.0, -2.0, 3.0]).expand(49, 3)
    assert torch.allclose(
        resize_bias_table(table, (7, 7), (11, 11), method),
        torch.tensor([1.0, -2.0, 3.0]).expand(121, 3),
        atol=1e-6,
    )
    assert resize_bias_table(table, (7, 7), (7, 7), method) is table


@pytest.mark.parametrize("method", ["bicubic", "geometric"])
def test_rows_and_columns_are_not_confused_in_tables_that_are_not_square(method):
    rows = torch.arange(7.0)[:, None].expand(7, 5).reshape(35, 1)  # varies along rows only
    resized = resize_bias_table(rows, (7, 5), (11, 9), method).reshape(11, 9)
    assert torch.allclose(resized, resized[:, :1].expand(11, 9), atol=1e-5) and bool(
        (resized[:, 0].diff() > -1e-6).all()
    )


def test_absolute_embeddings_resize_over_the_grid():
    ramp = (
        torch.arange(4.0)[None, :, None].expand(6, 4, 2).reshape(1, 24, 2)
    )  # varies along columns only
    resized = resize_absolute(ramp, (6, 4), (3, 8)).reshape(3, 8, 2)
    assert torch.allclose(resized, resized[:1].expand(3, 8, 2), atol=1e-5) and resized.shape == (
        3,
        8,
        2,
    )


@pytest.mark.parametrize("source, target", [(7, 11), (11, 13), (13, 23), (23, 47), (13, 7)])
def test_the_spline_is_scipys_not_a_knot_spline(source, target):
    scipy = pytest.importorskip("scipy.interpolate")
    nodes, points = geometric_nodes(source, target), whole_offsets(target)
    values = np.random.default_rng(0).normal(size=(source, 3))
    inside = np.clip(points.numpy(), float(nodes[0]), float(nodes[-1]))
    expected = scipy.CubicSpline(nodes.numpy(), values, bc_type="not-a-knot")(inside)
    assert np.allclose(spline_matrix(nodes, points).numpy() @ values, expected, atol=1e-10)


def test_the_geometric_grid_reaches_the_targets_edge_and_keeps_the_centre():
    nodes = geometric_nodes(11, 13)
    assert (
        nodes[5] == 0
        and nodes[6] == 1
        and torch.equal(nodes, -nodes.flip(0))
        and abs(float(nodes[-1]) - 6) < 1e-3
    )
    table = torch.randn(121, 1, generator=torch.Generator().manual_seed(0))
    resized = resize_bias_table(table, (11, 11), (13, 13), "geometric").reshape(13, 13)
    assert torch.allclose(
        resized[5:8, 5:8], table.reshape(11, 11)[4:7, 4:7], atol=1e-6
    )  # offsets -1, 0, 1 keep their value


def test_windows_too_small_for_a_cubic_spline_fall_back_to_bicubic():
    table = torch.randn(9, 2)
    assert torch.equal(
        resize_bias_table(table, (3, 3), (7, 7), "geometric"),
        resize_bias_table(table, (3, 3), (7, 7)),
    )
