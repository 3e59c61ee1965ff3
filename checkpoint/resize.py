"""Position tables of one window or image size -> another. Pure functions; the rules are
Swin's (golden kind load).
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

GEOMETRIC_RATIO = (1.01, 1.5)  # the ratio of the geometric grid is searched in here
CUBIC_POINTS = 4  # a cubic spline needs as many


def resize_bias_table(
    table: Tensor, source: tuple[int, int], target: tuple[int, int], method: str = "bicubic"
) -> Tensor:
    """(S_h * S_w, heads) -> (T_h * T_w, heads): one value per relative offset, S = 2 * window - 1.

    method: 'bicubic' (Swin's fine-tuning; half-pixel centres, no antialiasing) or
        'geometric' (fine-tuning from SimMIM).
    """
    if source == target:
        return table
    grid = table.detach().float().T.unflatten(1, source)  # (heads, S_h, S_w)
    if method == "geometric" and min(source) >= CUBIC_POINTS:
        grid = geometric(grid, target)
    else:
        grid = bicubic(grid, target)
    return grid.flatten(1).T.contiguous()


def resize_absolute(embedding: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Absolute position embedding (1, S_h * S_w, C) -> (1, T_h * T_w, C), bicubic."""
    if source == target:
        return embedding
    grid = embedding.detach().float()[0].T.unflatten(1, source)  # (C, S_h, S_w)
    return bicubic(grid, target).flatten(1).T[None].contiguous()


def resize_map(embedding: Tensor, target: tuple[int, int]) -> Tensor:
    """Position embedding (1, C, S_h, S_w) -> (1, C, T_h, T_w), bicubic."""
    if tuple(embedding.shape[2:]) == tuple(target):
        return embedding
    return bicubic(embedding.detach().float()[0], tuple(target))[None]


def bicubic(grid: Tensor, target: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *target)."""
    return F.interpolate(grid[None], size=target, mode="bicubic", align_corners=False)[0]


def geometric(grid: Tensor, target: tuple[int, int]) -> Tensor:
    """(H, h, w) -> (H, *target): the source values stand at offsets 0, ±1, ±(1 + q), ±(1 + q + q²),
    ..., the targets at whole offsets.

    Near offsets thus keep their value and far ones are stretched. Cubic splines along both axes;
    beyond the grid, its edge value.
    """
    rows, columns = (
        spline_matrix(geometric_nodes(s, t), whole_offsets(t))
        for s, t in zip(grid.shape[1:], target)
    )
    return (rows @ grid.double() @ columns.T).to(grid.dtype)


def geometric_nodes(source: int, target: int) -> Tensor:
    """Positions (source,) of the source's offsets: q is such that the outermost reaches the
    target's outermost, within limits.
    """
    low, high = GEOMETRIC_RATIO
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (source // 2)) / (1 - ratio) > target // 2:
            high = ratio
        else:
            low = ratio
    reach = list(accumulate(ratio**n for n in range(source // 2)))
    return torch.tensor([-r for r in reversed(reach)] + [0.0] + reach, dtype=torch.float64)


def whole_offsets(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64) - size // 2


def spline_matrix(nodes: Tensor, points: Tensor) -> Tensor:
    """(T, S): row t holds the weights of the S node values in the not-a-knot cubic spline at
    points[t], clamped to the nodes' range.

    A cubic spline is linear in its values, so the spline through the identity matrix is this
    matrix. Per interval of length h,
    with second derivatives m at its ends: S(x) = (m0 b³ + m1 a³) / 6h + (y0/h - m0 h/6) b + (y1/h -
        m1 h/6) a, a = x - x0, b = x1 - x.
    """
    values = torch.eye(len(nodes), dtype=nodes.dtype)
    bends = second_derivatives(nodes, values)  # (S, S)
    points = points.clamp(nodes[0], nodes[-1])
    i = (torch.searchsorted(nodes, points, right=True) - 1).clamp(0, len(nodes) - 2)
    h = (nodes[i + 1] - nodes[i])[:, None]
    a, b = (points - nodes[i])[:, None], (nodes[i + 1] - points)[:, None]
    cubic = (bends[i] * b**3 + bends[i + 1] * a**3) / (6 * h)
    return (
        cubic
        + (values[i] / h - bends[i] * h / 6) * b
        + (values[i + 1] / h - bends[i + 1] * h / 6) * a
    )


def second_derivatives(nodes: Tensor, values: Tensor) -> Tensor:
    """Solves the spline's continuity equations; the third derivative does not jump at the second
    and last-but-one node.
    """
    count, h = len(nodes), nodes.diff()
    system, right = torch.zeros(count, count, dtype=nodes.dtype), torch.zeros_like(values)
    slopes = values.diff(dim=0) / h[:, None]
    for n in range(1, count - 1):
        system[n, n - 1 : n + 2] = torch.stack((h[n - 1], 2 * (h[n - 1] + h[n]), h[n]))
        right[n] = 6 * (slopes[n] - slopes[n - 1])
    system[0, :3] = torch.stack((h[1], -h[0] - h[1], h[0]))
    system[-1, -3:] = torch.stack((h[-1], -h[-2] - h[-1], h[-2]))
    return torch.linalg.solve(system, right)


def index_extent(index: Tensor) -> tuple[int, int]:
    """(2 M_h - 1, 2 M_w - 1) of a position index (N, N) or, as in torchvision, (N*N,).

    Seen from token 0, the index falls by one from token to token in a row of the window and by more
    into the next row.
    """
    tokens = math.isqrt(index.numel())
    first = index.reshape(tokens, tokens)[0]
    row_ends = (first.diff() != -1).nonzero()
    width = int(row_ends[0]) + 1 if len(row_ends) else tokens
    return 2 * (tokens // width) - 1, 2 * width - 1
