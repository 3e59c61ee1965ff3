"""Attention of every pixel to the k x k pixels around it, tile by tile: neither the k² copies of an
unfold nor an N x N matrix.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.derivatives import is_differentiated_again, is_transformed, plain_gradients
from kernels.modes import AUTOCAST

TILE = 4  # queries of a TILE x TILE square share their keys, the (TILE + k - 1)² pixels around
# Planes (one head of one image each) are worked on together as long as their logits stay below
# this.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


def neighbourhood_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    size: int,
    mask_padding: bool = True,
) -> Tensor:
    """y_ij = sum_ab softmax_ab(q_ij · k_ab + q_ij · r_(a-i, b-j)) v_ab over the size x size pixels
    (a, b) around (i, j).

    Args:
        q, k, v: (B, H, D, rows, columns), H heads.
        size: side of the neighbourhood, odd.
        k: None leaves q · k out.
        row, col: (1 or H, size, D/2), r = [row of a - i; column of b - j]; both None leaves the
            position out.
        mask_padding: True leaves pixels outside the image out of the softmax; False counts them as
            zeros, with logit q · r.
    Shapes: -> (B, H, D, rows, columns). While a gradient is recorded only q, k, v, row and col are
        kept; logits are computed again. Second derivatives hold all logits at once.
    """
    batch, heads = q.shape[:2]
    inputs = [x if x is None else x.flatten(0, 1) for x in (q, k, v)]
    inputs += [
        None if x is None else x.expand(batch, heads, -1, -1).flatten(0, 1) for x in (row, col)
    ]
    step = _planes_at_once(q, size)
    if torch.compiler.is_compiling():
        y = torch.cat(
            [
                checkpoint(_attend, *part, size, mask_padding, use_reentrant=False)
                for part in _split(inputs, step)
            ]
        )
    elif is_transformed():
        y = torch.cat([_attend(*part, size, mask_padding) for part in _split(inputs, step)])
    else:
        y = _Chunked.apply(*inputs, step, size, mask_padding)
    return y.unflatten(0, (batch, heads))


def _split(inputs: Sequence[Tensor | None], step: int) -> Iterator[list[Tensor | None]]:
    """Each input cut along its first axis; None stays None."""
    chunks = -(-len(inputs[0]) // step)
    return zip(*([None] * chunks if x is None else x.split(step) for x in inputs), strict=True)


class _Chunked(torch.autograd.Function):
    """`_attend` some planes at a time, in the backward once more. Every chunk is written into one
    result that was there before it:
    results kept one by one between the freed logits would leave a CPU's heap full of holes.
    """

    @staticmethod
    def forward(ctx, q, k, v, row, col, step: int, size: int, mask_padding: bool) -> Tensor:
        ctx.save_for_backward(q, k, v, row, col)
        ctx.step = step
        ctx.options = (size, mask_padding)
        kind = q.device.type if q.device.type in AUTOCAST else "cpu"
        ctx.autocast = dict(
            device_type=kind,
            enabled=torch.is_autocast_enabled(kind),
            dtype=torch.get_autocast_dtype(kind),
        )
        y = torch.empty_like(v)
        for place, *part in _split((y, q, k, v, row, col), step):
            place.copy_(_attend(*part, size, mask_padding))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        inputs = ctx.saved_tensors
        if is_differentiated_again(grad):

            def formula(*inputs: Tensor | None) -> Tensor:
                return _attend(*inputs, *ctx.options).to(grad.dtype)

            with torch.autocast(**ctx.autocast):
                grads = plain_gradients(formula, inputs, grad, ctx.needs_input_grad[:5])
            return *grads, None, None, None
        wanted = [i for i, x in enumerate(inputs) if ctx.needs_input_grad[i]]
        gradients = [torch.empty_like(inputs[i]) for i in wanted]
        for grad_part, *rest in _split((grad, *inputs, *gradients), ctx.step):
            part, places = rest[: len(inputs)], rest[len(inputs) :]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                part = [
                    None if x is None else x.detach().requires_grad_(i in wanted)
                    for i, x in enumerate(part)
                ]
                y = _attend(*part, *ctx.options)
            for place, piece in zip(
                places,
                torch.autograd.grad(y, [part[i] for i in wanted], grad_part.to(y.dtype)),
                strict=True,
            ):
                place.copy_(piece)
        own = dict(zip(wanted, gradients, strict=True))
        return *(own.get(i) for i in range(len(inputs))), None, None, None


def _tile(height: int, width: int) -> tuple[int, int]:
    return min(TILE, height), min(TILE, width)


def _planes_at_once(q: Tensor, size: int) -> int:
    height, width = q.shape[-2:]
    tile = _tile(height, width)
    pixels = -(-height // tile[0]) * tile[0] * -(-width // tile[1]) * tile[1]
    plane = pixels * (tile[0] + size - 1) * (tile[1] + size - 1) * max(q.element_size(), 4)
    return max(1, CHUNK_BYTES.get(q.device.type, CHUNK_BYTES["cuda"]) // plane)


def _attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    size: int,
    mask_padding: bool,
) -> Tensor:
    """q, k, v (P, D, rows, columns), row and col (P, size, D/2) -> (P, D, rows, columns).

    In the comments S x T is the tile, M = S + size - 1 and L = T + size - 1 its rows and columns of
    keys, G the grid of tiles.
    """
    height, width = q.shape[-2:]
    tile = _tile(height, width)
    queries, values = _cut(q, tile, 0), _cut(v, tile, size // 2)  # (P, G, G, S*T or M*L, D)
    logits = queries.new_zeros(())
    if k is not None:
        logits = (
            (queries @ _cut(k, tile, size // 2).mT)
            .unflatten(-1, (tile[0] + size - 1, -1))
            .unflatten(3, tile)
        )  # (P, G, G, S, T, M, L)
    by_row = _far(height, tile[0], size, mask_padding, logits)[:, None, :, None]  # (G, 1, S, 1, M)
    by_col = _far(width, tile[1], size, mask_padding, logits)[:, None]  # (G, 1, T, L)
    if row is not None:
        q_row, q_col = queries.unflatten(3, tile).chunk(2, -1)  # (P, G, G, S, T, D/2)
        by_row = by_row + _skew((q_row @ row[:, None, None, None].mT).transpose(3, 4)).transpose(
            3, 4
        )
        by_col = by_col + _skew(q_col @ col[:, None, None, None].mT)
    attn = (
        (logits + by_row.unsqueeze(-1) + by_col.unsqueeze(-2)).flatten(5).softmax(-1).flatten(3, 4)
    )
    y = (attn.to(values.dtype) @ values).unflatten(3, tile)  # (P, G, G, S, T, D)
    return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width]


def _cut(x: Tensor, tile: tuple[int, int], halo: int) -> Tensor:
    """(P, D, rows, columns) -> (P, G, G, pixels, D): tiles with `halo` pixels around them, zeros
    outside the image.
    """
    below, right = (-length % side + halo for length, side in zip(x.shape[-2:], tile, strict=True))
    x = F.pad(x, (halo, right, halo, below))
    x = x.unfold(2, tile[0] + 2 * halo, tile[0]).unfold(
        3, tile[1] + 2 * halo, tile[1]
    )  # (P, D, G, G, M, L)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3, 4)


def _skew(x: Tensor) -> Tensor:
    """Moves line i by i places: (..., S, size) -> (..., S, S + size - 1) with y[i, i + c] = x[i, c]
    and zeros elsewhere.
    """
    lines, size = x.shape[-2:]
    return F.pad(x, (0, lines)).flatten(-2)[..., :-lines].unflatten(-1, (lines, lines + size - 1))


def _far(length: int, side: int, size: int, mask_padding: bool, like: Tensor) -> Tensor:
    """(G, side, side + size - 1): 0 where the pixel of a tile may see the key along this axis, else
    a very low number.

    Rows and columns add up, and a filled-up query may see nothing: a quarter of the dtype's lowest
    number stays finite in the sum.
    """
    tiles = -(-length // side)
    query = torch.arange(side, device=like.device)[:, None]
    key = torch.arange(side + size - 1, device=like.device)
    near = ((key >= query) & (key < query + size)).expand(tiles, -1, -1)
    if mask_padding:
        place = (
            key + torch.arange(tiles, device=like.device)[:, None] * side - size // 2
        )  # (G, side + size - 1)
        near = near & ((place >= 0) & (place < length))[:, None]
    return torch.zeros(near.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~near, torch.finfo(like.dtype).min / 4
    )
