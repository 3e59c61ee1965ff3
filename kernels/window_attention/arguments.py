"""What every backend of window attention asks of its arguments: what one refuses, none takes."""

import torch
from torch import Tensor

from .epilogue import FACTORS, Epilogue
from .layout import WindowLayout
from .terms import OffsetTerms


def check_arguments(
    qkv: Tensor, terms: OffsetTerms, layout: WindowLayout, num_heads: int, dropout: float = 0.0
) -> None:
    """Raises ValueError, in one line, for what has no result or that of another question."""
    if not 0 <= dropout < 1:
        raise ValueError(f"window_attention: dropout {dropout} is not in [0, 1)")
    if torch.compiler.is_compiling():
        _check(qkv, terms, layout, num_heads)
        return
    given, like = (layout, num_heads), (qkv.shape, qkv.dtype, qkv.device)
    if terms.checked.get(given) != like:  # terms that are kept are checked once
        _check(qkv, terms, layout, num_heads)
        terms.checked[given] = like


def _check(qkv: Tensor, terms: OffsetTerms, layout: WindowLayout, num_heads: int) -> None:
    if not qkv.is_floating_point():
        raise ValueError(f"window_attention: qkv is {_name(qkv)}; a floating-point dtype is needed")
    if qkv.dim() != 4 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            "window_attention: qkv must be (B, H, W, 3 * heads * head_dim), not"
            f" {tuple(qkv.shape)} for {num_heads} heads"
        )
    check_grid(qkv, layout)
    if not _together(layout.tokens.device, qkv.device):
        raise ValueError(
            f"window_attention: the layout is on {layout.tokens.device}, qkv on {qkv.device};"
            " window_layout(..., device=qkv.device) makes one there"
        )
    for name in ("scale", "bias", "post"):
        table = getattr(terms, name)
        if table is not None:
            _check_term(name, table, terms, layout, num_heads, qkv.device)


def check_grid(qkv: Tensor, layout: WindowLayout) -> None:
    """Raises ValueError where the layout is that of another grid: windows and mask would be too."""
    if tuple(qkv.shape[1:3]) != tuple(layout.grid):
        height, width = qkv.shape[1:3]
        raise ValueError(
            f"window_attention: the layout is that of {layout.grid[0]}x{layout.grid[1]} tokens, qkv"
            f" has {height}x{width}; window_layout(({height}, {width}), ...) makes the right one"
        )


def check_epilogue(epilogue: Epilogue | None, qkv: Tensor, num_heads: int) -> None:
    """Raises ValueError, in one line, for factors that are not those of qkv's heads."""
    for name in FACTORS:
        factor = None if epilogue is None else getattr(epilogue, name)
        if factor is None:
            continue
        if tuple(factor.shape) != (num_heads,) or not factor.is_floating_point():
            raise ValueError(
                f"window_attention: {name} is {tuple(factor.shape)} of {_name(factor)};"
                f" ({num_heads},) is needed, a real number for each head"
            )
        if not _together(factor.device, qkv.device):
            raise ValueError(f"window_attention: {name} is on {factor.device}, qkv on {qkv.device}")


def _check_term(
    name: str,
    table: Tensor,
    terms: OffsetTerms,
    layout: WindowLayout,
    heads: int,
    device: torch.device,
) -> None:
    """One of scale, bias and post: of a shape of `OffsetTerms`, for the windows of the layout."""
    if not _together(table.device, device):
        raise ValueError(f"window_attention: {name} is on {table.device}, qkv on {device}")
    if table.is_complex():
        raise ValueError(f"window_attention: {name} is {_name(table)}; real numbers are needed")
    rows = (2 * terms.window[0] - 1) * (2 * terms.window[1] - 1)
    if table.dim() == 2:
        fits = table.shape[0] in (1, rows + terms.repeats) and table.shape[1] in (1, heads)
    else:
        pairs = (1, layout.area)
        fits = table.dim() == 3 and table.shape[0] in (1, heads) and table.shape[2] in pairs
        fits = fits and table.shape[1] in pairs
    if not fits:
        raise ValueError(
            f"window_attention: {name} is {tuple(table.shape)}; ({rows} or 1, {heads}) is needed, a"
            f" row for each offset between two tokens of {terms.window[0]}x{terms.window[1]}, or"
            f" ({heads}, {layout.area}, {layout.area})"
        )
    if terms.prefix:  # the class tokens and the grid lie in one row
        same = terms.window[0] * terms.window[1] + terms.prefix == layout.area
    else:
        same = tuple(terms.window) == tuple(layout.window)
    if not same and table.dim() == 2 and table.shape[0] > 1:
        raise ValueError(
            f"window_attention: {name} is that of a window of"
            f" {terms.window[0]}x{terms.window[1]} tokens, the layout has windows of"
            f" {layout.window[0]}x{layout.window[1]}"
        )


def _together(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
