"""The rows' log-sum-exp as a second output of window attention: value, dtype and gradients in every
backend, against a formula over the whole grid.
"""

import math

import pytest
import torch

from kernels.window_attention import OffsetTerms, window_attention, window_layout
from tests.models.family.dense import distance, visible

HEADS, CHANNELS = 2, 16
LAYOUTS = [
    ((8, 8), (4, 4), (0, 0)),
    ((8, 8), (4, 4), (2, 2)),
    ((6, 6), (4, 4), (2, 2)),
    ((5, 7), (2, 3), (1, 1)),
    ((8, 8), (7, 7), (0, 0)),  # a token alone in its window
    ((8, 8), (7, 7), (1, 1)),
    ((8, 8), (4, 4), (1, 1)),  # and alone among forbidden ones
]
QUICK = LAYOUTS[2:4] + LAYOUTS[5:6]
# each with what its result must come near to, over the largest number
BACKENDS = {
    "reference": (torch.float64, 1e-12),
    "eager": (torch.float64, 1e-12),
    "sdpa": (torch.float64, 1e-12),
    "fused": (torch.float32, 2e-5),
}


LAYOUT_TIERS = [
    pytest.param(layout, marks=() if layout in QUICK else pytest.mark.slow) for layout in LAYOUTS
]


def draw(layout, tables, seed=0):
    """qkv, scale, bias and post of the default case, in float64."""
    generator = torch.Generator().manual_seed(seed)
    grid, window, _ = layout
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "qkv": normal(2, *grid, 3 * CHANNELS),
        "scale": 0.4 + 0.1 * normal(rows if tables else 1, HEADS),
        "bias": normal(rows, HEADS),
    }


def formula(inputs, layout, cosine):
    """y and L from one map over all tokens of the grid."""
    grid, window, shift = layout
    places = torch.cartesian_prod(*map(torch.arange, grid))
    seen = visible(grid, window, shift)
    offset = torch.where(seen[..., None], places[:, None] - places, 0)
    line = (offset[..., 0] + window[0] - 1) * (2 * window[1] - 1) + offset[..., 1] + window[1] - 1
    parts = inputs["qkv"].flatten(1, 2).unflatten(-1, (3, HEADS, -1)).movedim(1, -2)
    q, k, v = parts.unbind(1)  # (B, heads, L, D)
    if cosine:
        q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    scale = inputs["scale"]
    scale = scale[line] if len(scale) > 1 else scale.expand(*line.shape, -1)
    logits = q @ k.mT * scale.movedim(-1, 0) + inputs["bias"][line].movedim(-1, 0)
    logits = logits.masked_fill(~seen, -math.inf)
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(1, grid)
    return y, logits.logsumexp(-1).transpose(1, 2).unflatten(1, grid)


def outputs_and_gradients(call, inputs, used):
    """Both outputs, and the gradients of a random sum over those in `used`."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = dict(zip("yL", call(leaves), strict=True))
    generator = torch.Generator().manual_seed(7)
    loss = 0
    for name in used:
        weights = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        loss = loss + (outputs[name] * weights).sum()
    gradients = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in leaves.values()]
    filled = (zero if g is None else g for g, zero in zip(gradients, zeros, strict=True))
    return outputs | dict(zip(leaves, filled, strict=True))


def operation(layout, cosine, backend):
    """window_attention on the leaves."""

    def call(leaves):
        terms = OffsetTerms(layout[1], leaves["scale"], leaves["bias"])
        return window_attention(
            leaves["qkv"],
            terms,
            window_layout(*layout),
            HEADS,
            cosine,
            backend=backend,
            return_lse=True,
        )

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUT_TIERS, ids=str)
def test_value_and_gradients_are_the_formulas_in_every_backend(layout, backend):
    dtype, tolerance = BACKENDS[backend]
    for tables, cosine, used in ((False, False, "L"), (True, False, "yL"), (True, True, "L")):
        inputs = draw(layout, tables and backend != "sdpa")
        expected = outputs_and_gradients(lambda x, c=cosine: formula(x, layout, c), inputs, used)
        given = {name: value.to(dtype) for name, value in inputs.items()}
        found = outputs_and_gradients(operation(layout, cosine, backend), given, used)
        assert found["L"].dtype == dtype
        for name, value in expected.items():
            error = distance(found[name], value)
            assert error <= tolerance, f"{name}, {tables=}, {cosine=}, {used}: {error:.1e}"


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_it_is_float32_and_as_exact_as_the_rounded_inputs_allow(backend, dtype):
    layout = LAYOUTS[2]
    inputs = draw(layout, False)
    inputs["qkv"] = inputs["qkv"].to(dtype)
    given = {name: value if name == "qkv" else value.float() for name, value in inputs.items()}
    y, found = operation(layout, False, backend)(given)
    _, expected = formula({**inputs, "qkv": inputs["qkv"].double()}, layout, False)
    assert y.dtype == dtype and found.dtype == torch.float32
    assert distance(found, expected) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_factors_and_dropout_behind_the_softmax_do_not_touch_it(backend):
    layout = LAYOUTS[1]
    inputs = {name: value.float() for name, value in draw(layout, True).items()}
    terms = OffsetTerms(layout[1], inputs["scale"], inputs["bias"], post=1 + inputs["bias"])
    arguments = window_layout(*layout), HEADS, False, 0.5, backend
    _, found = window_attention(inputs["qkv"], terms, *arguments, return_lse=True)
    _, expected = operation(layout, False, "reference")(inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_give_the_logarithm_of_the_count(backend):
    layout = LAYOUTS[5]
    counts = visible(*layout).sum(1).view(layout[0])
    inputs = {name: torch.zeros_like(v).float() for name, v in draw(layout, False).items()}
    _, found = operation(layout, False, backend)(inputs)
    expected = counts.log()[None, ..., None].expand(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert counts.min() == 1
