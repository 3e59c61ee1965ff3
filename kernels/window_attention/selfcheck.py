"""A look at the compiled kernel before it is trusted on a GPU: once a card in each process, small
windows, against the specification.
"""

import torch
from torch import Tensor

from kernels.modes import real_tensors

from .layout import window_layout
from .reference import window_attention_reference
from .terms import OffsetTerms

CASES = (
    ((4, 4), (2, 2), torch.float16),
    ((7, 7), (3, 3), torch.float16),
    ((12, 12), (0, 0), torch.float16),
    ((7, 7), (3, 3), torch.float32),
)
# Of the largest entry: a wrong kernel errs by its whole size, rounding to float16 by 1e-3.
ALLOWED = 2e-2
RESULTS = ("output", "gradient of qkv", "gradient of scale", "gradient of bias")


def find_fault(kernel, device: str) -> str | None:
    """What is wrong with `kernel`, called as a backend is, on `device`: "gradient of bias is off by
    ...", or None.

    Output and gradients of a shifted, padded grid with a scale and a bias per offset are compared.
    Waits for the device.
    """
    with real_tensors():
        return _find_fault(kernel, device)


def _find_fault(kernel, device: str) -> str | None:
    for window, shift, dtype in CASES:
        generator = torch.Generator().manual_seed(0)
        grid = (window[0] + 3, 2 * window[1])
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        shapes = ((2, *grid, 3 * 64), (rows, 2), (rows, 2), (2, *grid, 64))
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        layout = window_layout(grid, window, shift, device=torch.device(device))
        found = _outcome(kernel, drawn, layout, device, dtype)
        expected = _outcome(window_attention_reference, drawn, layout, device, torch.float32)
        for name, ours, right in zip(RESULTS, found, expected, strict=True):
            error = ((ours.float() - right).abs().max() / right.abs().max()).item()
            if not error < ALLOWED:
                return (
                    f"{name} is off by {error:.1g} with {dtype} and windows of"
                    f" {window[0]}x{window[1]}"
                )
    return None


def _outcome(
    function, drawn: list[Tensor], layout, device: str, dtype: torch.dtype
) -> list[Tensor]:
    qkv, scale, bias, grad = (tensor.to(device) for tensor in drawn)
    kind = torch.device(device).type
    with torch.enable_grad(), torch.inference_mode(False), torch.autocast(kind, enabled=False):
        leaves = [
            qkv.to(dtype).requires_grad_(),
            (0.2 * scale).requires_grad_(),
            bias.requires_grad_(),
        ]
        y = function(leaves[0], OffsetTerms(layout.window, *leaves[1:]), layout, 2)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]
