"""What modifiers do to an N x N matrix, in multiply-accumulates."""

import copy
from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.window_attention import WindowLayout, window_layout

from .modifiers import MapModifier


def modifier_flops(
    parts: Sequence[nn.Module], heads: int, tokens: int, layout: WindowLayout | None = None
) -> int:
    """Multiply-accumulates of mixers of logits and modifiers of the map, one after the other, for
    the maps (nW, heads, tokens, tokens) of the windows of `layout`, or for one without.

    Counted by running copies of them on tensors that have a shape alone.
    """
    if not parts:
        return 0
    held = chain.from_iterable(chain(part.parameters(), part.buffers()) for part in parts)
    device = next((tensor.device for tensor in held), torch.device("cpu"))
    parts = [copy.deepcopy(part).eval() for part in parts]
    with (
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
    ):
        if layout is not None:
            options = (layout.grid, layout.window, layout.shift, layout.mask_value)
            layout = window_layout(*options, device)
        windows = 1 if layout is None else layout.num_windows
        matrices = torch.empty(windows, heads, tokens, tokens, device=device)
        for part in parts:
            pairs = isinstance(part, MapModifier) and part.mixes_pairs
            matrices = part(matrices, layout) if pairs else part(matrices)
    return counter.get_total_flops() // 2
