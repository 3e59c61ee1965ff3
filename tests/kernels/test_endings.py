"""Epilogues and the log-sum-exp of `window_attention`, as PyTorch sees them, on every backend."""

import pytest
import torch

from kernels.window_attention import Epilogue, OffsetTerms, fused, window_attention, window_layout

HEADS, DIM = 2, 8
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
KINDS = ["affine", "exclusive"]
LAYOUTS = [
    window_layout((8, 8), (4, 4)),
    window_layout((8, 8), (7, 7), (3, 3)),
    window_layout((5, 6), (4, 4), (2, 1)),
]


@pytest.fixture(autouse=True)
def kernel():
    reason = fused.missing("cpu")
    if reason:
        pytest.skip(f"the CPU kernel is not here: {reason}")


def draw(layout, dtype=F32, post=False):
    """qkv, tables and (alpha, beta, exclusion), in `dtype`; all ask for gradients."""
    generator = torch.Generator().manual_seed(2)
    rows = (2 * layout.window[0] - 1) * (2 * layout.window[1] - 1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    drawn = [normal(2, *layout.grid, 3 * HEADS * DIM), normal(rows, HEADS) * 0.2 + 0.4]
    drawn += [normal(rows, HEADS), normal(rows, HEADS)][: 1 + post]
    factors = [normal(HEADS) for _ in range(3)]
    wide = F32 if dtype == BF16 else dtype
    qkv, *tables = (x.to(dtype if i == 0 else wide) for i, x in enumerate(drawn))
    leaves = [x.requires_grad_() for x in (qkv, *tables, *(f.to(wide) for f in factors))]
    return leaves[0], leaves[1:-3], leaves[-3:]


def epilogue_of(kind, factors):
    alpha, beta, exclusion = factors
    return {
        "": None,
        "affine": Epilogue(alpha, beta),
        "exclusive": Epilogue(exclusion=exclusion),
    }[kind]


def attend(layout, leaves, kind, backend, **options):
    qkv, tables, factors = leaves
    return window_attention(
        qkv,
        OffsetTerms(layout.window, *tables),
        layout,
        HEADS,
        backend=backend,
        epilogue=epilogue_of(kind, factors),
        **options,
    )


def with_gradients(results, leaves):
    """The results and the gradients of all leaves through both of them."""
    inputs = [leaves[0], *leaves[1], *leaves[2]]
    total = sum((r.double() * torch.linspace(-1, 2, r.numel()).view_as(r)).sum() for r in results)
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return [*results, *(g for g in grads if g is not None)]


def close(found, right, tolerance):
    assert len(found) == len(right)
    for number, (ours, theirs) in enumerate(zip(found, right, strict=True)):
        assert torch.isfinite(ours).all(), number
        scale = theirs.double().abs().max().clamp(min=0.1)
        assert (ours.double() - theirs.double()).abs().max() <= tolerance * scale, number


def pairs(layout):
    """For tokens of the grid in their order, (tokens, tokens) each: whether two lie in one window,
    whether the roll brought them together there, and their row in a table.
    """
    height, width = layout.grid
    places = torch.arange(height * width) // width, torch.arange(height * width) % width
    offset, same, apart = 0, True, False
    for place, side, shift, whole in zip(
        places, layout.window, layout.shift, layout.padded, strict=True
    ):
        rolled, before = (place - shift) % whole, place < shift
        same = same & (rolled[:, None] // side == rolled // side)
        apart = apart | (before[:, None] != before)
        step = rolled[:, None] - rolled + side - 1
        offset = offset * (2 * side - 1) + step
    return same, same & apart, offset.where(same, torch.zeros_like(offset))


def dense(layout, leaves, kind):
    """(y, lse) from the map of the whole grid, (heads, tokens, tokens), and matrices beside it."""
    qkv, (scale, bias), (alpha, beta, exclusion) = leaves
    same, apart, offset = pairs(layout)
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT) * scale[offset].permute(2, 0, 1) + bias[offset].permute(2, 0, 1)
    logits = (logits - 100.0 * apart).masked_fill(~same, -torch.inf)
    attn, eye = logits.softmax(-1), torch.eye(len(same), dtype=qkv.dtype)
    if kind == "affine":
        out = (alpha[:, None, None] * eye + beta[:, None, None] * attn) @ v
    else:
        out = attn @ v
        onto = v[..., :, None] * v[..., None, :] / (v * v).sum(-1)[..., None, None]  # v vᵀ / |v|^2
        out = out - exclusion[:, None, None] * (onto @ out[..., None])[..., 0]
    out = out.transpose(1, 2).flatten(2).unflatten(1, layout.grid)
    return out, logits.logsumexp(-1).transpose(1, 2).unflatten(1, layout.grid)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.grid}{layout.shift}")
def test_every_backend_gives_the_dense_formula_and_its_gradients(layout, kind):
    leaves = draw(layout, F64)
    right = with_gradients(dense(layout, leaves, kind), leaves)
    for backend, dtype, tolerance in (
        ("reference", F64, 1e-12),
        ("eager", F64, 1e-12),
        ("fused", F32, 5e-6),
    ):
        given = draw(layout, dtype)
        found = with_gradients(attend(layout, given, kind, backend, return_lse=True), given)
        close(found, right, tolerance)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_neutral_factors_are_no_epilogue_bit_for_bit(kind, dtype):
    layout = LAYOUTS[1]
    outcomes = []
    for given in ("", kind):
        leaves = draw(layout, dtype)
        with torch.no_grad():
            for factor, value in zip(leaves[2], (0.0, 1.0, 0.0), strict=True):
                factor.fill_(value)
        y = attend(layout, leaves, given, "fused")
        outcomes.append(with_gradients([y], (*leaves[:2], [])))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("shift", [(0, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", ["lone", "equal", "zero"])
def test_degenerate_values_stay_finite_and_agree(values, kind, shift):
    layout = window_layout((8, 8), (7, 7), shift)  # a corner is alone in its window
    assert pairs(layout)[0].sum(1).min() == 1
    outcomes = []
    for backend, dtype in (("reference", F64), ("eager", F32), ("fused", F32), ("reference", F32)):
        leaves = draw(layout, dtype)
        with torch.no_grad():
            v = leaves[0][..., 2 * HEADS * DIM :]
            if values == "equal":
                v.copy_(v[:, :1, :1].expand_as(v))
            if values == "zero":
                v[:, ::2] = 0
                v[:, 1::3] *= 1e-6
            leaves[2][2].fill_(1.0)
        results = attend(layout, leaves, kind, backend, return_lse=True)
        if values == "equal" and kind == "exclusive":
            assert results[0].abs().max() < 1e-5
        outcomes.append(with_gradients(results, leaves))
    for found in outcomes[1:]:
        close(found, outcomes[0], 1e-5)


def test_the_exclusive_result_has_nothing_along_its_own_value():
    layout = LAYOUTS[2]
    qkv, tables, factors = draw(layout)
    factors[2] = torch.ones(HEADS)
    y = attend(layout, (qkv, tables, factors), "exclusive", "fused")
    heads = y.unflatten(-1, (HEADS, DIM))
    own = qkv[..., 2 * HEADS * DIM :].unflatten(-1, (HEADS, DIM))
    assert (heads * own).sum(-1).abs().max() < 2e-6


@pytest.mark.parametrize("backend", ["fused", "eager", "reference", "sdpa"])
def test_the_log_sum_exp_of_equal_logits_is_that_of_what_a_token_sees(backend):
    layout = window_layout((8, 8), (7, 7), (3, 3), mask_value=-1e4)
    qkv = torch.zeros(1, 8, 8, 3 * HEADS * DIM)
    terms = OffsetTerms(layout.window, torch.ones(1, HEADS))
    _, lse = window_attention(qkv, terms, layout, HEADS, backend=backend, return_lse=True)
    same, apart, _ = pairs(layout)
    seen = (same & ~apart).sum(1).view(1, 8, 8, 1).float()
    torch.testing.assert_close(lse.exp(), seen.expand_as(lse))
    assert lse.shape == (1, 8, 8, HEADS) and lse.dtype == F32


@pytest.mark.parametrize("kind", ["", *KINDS])
@pytest.mark.parametrize("backend", ["fused", "eager"])
def test_the_log_sum_exp_alone_has_its_gradient(backend, kind):
    layout = LAYOUTS[2]
    grads = []
    for name, dtype in ((backend, F32), ("reference", F64)):
        leaves = draw(layout, dtype)
        lse = attend(layout, leaves, kind, name, return_lse=True)[1]
        grads.append(torch.autograd.grad(lse.sin().sum(), [leaves[0], *leaves[1]]))
        assert not grads[-1][0][..., 2 * HEADS * DIM :].any()
    close(*grads, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_graph_with_an_ending_gives_the_bits_of_the_eager_call(kind):
    layout = LAYOUTS[2]
    leaves = draw(layout)

    def function(qkv, tables, factors):
        return attend(layout, (qkv, tables, factors), kind, "auto", return_lse=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, right = (with_gradients(f(*leaves), leaves) for f in (compiled, function))
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def test_autocast_leaves_factors_and_log_sum_exp_in_float32():
    layout = LAYOUTS[1]
    leaves = draw(layout)
    with torch.autocast("cpu", BF16):
        y, lse = attend(layout, leaves, "exclusive", "fused", return_lse=True)
    assert (y.dtype, lse.dtype) == (BF16, F32)
    grads = torch.autograd.grad(y.sum() + lse.sum(), [leaves[0], leaves[2][2]])
    assert [g.dtype for g in grads] == [F32, F32]


@pytest.mark.parametrize("backend", ["fused", "eager", "reference", "sdpa"])
@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.ones(1), r"exclusion is \(1,\) of float32; \(2,\) is needed"),
        (torch.ones(2, dtype=torch.int64), "of int64"),
        (torch.ones(2, device="meta"), "exclusion is on meta, qkv on cpu"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_factors_of_other_heads_are_refused_in_one_line(backend, factor, message):
    layout = LAYOUTS[0]
    terms = OffsetTerms(layout.window, torch.ones(1, HEADS))
    qkv, epilogue = torch.zeros(1, 8, 8, 3 * HEADS * DIM), Epilogue(exclusion=factor)
    with pytest.raises(ValueError, match=message) as error:
        window_attention(qkv, terms, layout, HEADS, backend=backend, epilogue=epilogue)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_empty_results_and_zero_gradients(kind):
    qkv, tables, factors = draw(LAYOUTS[0])
    leaves = (qkv.detach()[:0].requires_grad_(), tables, factors)
    y, lse, *grads = with_gradients(
        attend(LAYOUTS[0], leaves, kind, "fused", return_lse=True), leaves
    )
    assert (y.shape, lse.shape) == ((0, 8, 8, HEADS * DIM), (0, 8, 8, HEADS))
    assert not any(grad.any() for grad in grads)


def test_an_epilogue_is_of_one_kind():
    one = torch.ones(HEADS)
    for given in ({"alpha": one}, {}, {"alpha": one, "beta": one, "exclusion": one}):
        with pytest.raises(ValueError, match="alpha and beta, or exclusion alone"):
            Epilogue(**given)
