"""A look at the compiled kernel before it is trusted on a GPU: once a card in each process, small
windows, against the specification.
"""

import torch
from torch import Tensor

from kernels.modes import real_tensors

from .epilogue import Epilogue
from .layout import window_layout
from .reference import window_attention_reference, with_endings
from .terms import OffsetTerms

CASES = (
    ((4, 4), (2, 2), torch.float16, ()),
    ((7, 7), (3, 3), torch.float16, ()),
    ((12, 12), (0, 0), torch.float16, ()),
    ((7, 7), (3, 3), torch.float32, ()),
    # with the log-sum-exp and these factors of an epilogue
    ((7, 7), (3, 3), torch.float16, ("alpha", "beta")),
    ((7, 7), (3, 3), torch.float16, ("exclusion",)),
    ((12, 12), (0, 0), torch.float16, ("exclusion",)),
)
# Of the largest entry: a wrong kernel errs by its whole size, rounding to float16 by 1e-3.
ALLOWED = 2e-2


def find_fault(kernel, device: str) -> str | None:
    """What is wrong with `kernel`, called as `window_attention` is, on `device`: "gradient of bias
    is off by ...", or None.

    Output and gradients of a shifted, padded grid with a scale and a bias per offset are compared,
    and those of the epilogues together with the log-sum-exp. Waits for the device.
    """
    with real_tensors():
        return _find_fault(kernel, device)


def _find_fault(kernel, device: str) -> str | None:
    for window, shift, dtype, factors in CASES:
        generator = torch.Generator().manual_seed(0)
        grid = (window[0] + 3, 2 * window[1])
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        shapes = {"qkv": (2, *grid, 3 * 64), "scale": (rows, 2), "bias": (rows, 2)}
        shapes |= dict.fromkeys(factors, (2,))
        shapes |= {"output": (2, *grid, 64), "log-sum-exp": (2, *grid, 2)}
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        layout = window_layout(grid, window, shift, device=torch.device(device))
        found = _outcome(kernel, drawn, factors, layout, device, dtype)
        expected = _outcome(_specification, drawn, factors, layout, device, torch.float32)
        for name, right in expected.items():
            error = ((found[name].float() - right).abs().max() / right.abs().max()).item()
            if not error < ALLOWED:
                return (
                    f"{name} is off by {error:.1g} with {dtype} and windows of"
                    f" {window[0]}x{window[1]}" + (f" ({', '.join(factors)})" if factors else "")
                )
    return None


def _specification(qkv, terms, layout, heads, epilogue=None, return_lse=False):
    y = window_attention_reference(qkv, terms, layout, heads)
    return with_endings(y, qkv, terms, layout, heads, False, epilogue, return_lse)


def _outcome(
    function, drawn: dict[str, Tensor], factors, layout, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The results, and the gradients of all inputs for results with the gradients drawn."""
    kind = torch.device(device).type
    with torch.enable_grad(), torch.inference_mode(False), torch.autocast(kind, enabled=False):
        leaves = {name: drawn[name].to(device) for name in ("qkv", "scale", "bias", *factors)}
        leaves |= {"qkv": leaves["qkv"].to(dtype), "scale": 0.2 * leaves["scale"]}
        for leaf in leaves.values():
            leaf.requires_grad_()
        terms = OffsetTerms(layout.window, leaves["scale"], leaves["bias"])
        if factors:
            epilogue = Epilogue(**{name: leaves[name] for name in factors})
            y, lse = function(leaves["qkv"], terms, layout, 2, epilogue=epilogue, return_lse=True)
            results = {"output": y, "log-sum-exp": lse}
        else:
            results = {"output": function(leaves["qkv"], terms, layout, 2)}
        given = [drawn[name].to(device, y.dtype) for name, y in results.items()]
        grads = torch.autograd.grad([*results.values()], [*leaves.values()], given)
    return {name: y.detach() for name, y in results.items()} | {
        f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)
    }
