"""Mimetic starts: the products of the weights as they are stored, (out, in), and the map they
give.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.window_attention import window_layout
from models.attention import AttentionSpec, Geometry, GlobalAttention, WindowAttention
from models.attention.modifiers.mimetic import balanced_factors
from tests.models.builders import small

SIDE = (8, 8)


def started(text="mimetic", dim=96, heads=3, kind=WindowAttention, seed=0, **options):
    torch.manual_seed(seed)
    attention = kind(Geometry(dim, heads, SIDE, **options), AttentionSpec((text,)))
    for parameter in attention.parameters():
        torch.nn.init.zeros_(parameter)
    attention.initialise_modifiers("test")
    return attention


def products(attention):
    """W_q W_kᵀ of each head (H, C, C) and W_v W_o (C, C), for row vectors, float64."""
    inner, heads = attention.geometry.inner, attention.num_heads
    q, k, v = attention.qkv.weight.detach().double().split(inner)
    q, k = (part.unflatten(0, (heads, -1)) for part in (q, k))  # (H, D, C)
    return q.mT @ k, v.mT @ attention.proj.weight.detach().double().mT


@pytest.mark.parametrize("rank", [3, 8, 11])
def test_the_factors_are_the_best_approximation_and_share_the_singular_values(rank):
    target = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right = balanced_factors(target, rank)
    u, s, vt = torch.linalg.svd(target)
    kept = min(rank, 8)
    expected = u[:, :kept] * s[:kept] @ vt[:kept]
    assert left.shape == right.shape == (rank, 8)
    torch.testing.assert_close(left.mT @ right, expected, rtol=0, atol=1e-12)
    for part in (left, right):
        found = torch.linalg.svdvals(part)[:kept]
        torch.testing.assert_close(found, s[:kept].sqrt(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_q_and_k_have_the_trace_and_the_distance_of_the_truncated_target(seed):
    """For D = C / 3: tr = 0.39 C, distance to 0.7 I over its size 1.11 (measured with 192)."""
    target, _ = products(started(dim=96, heads=3, seed=seed))
    traces = target.diagonal(dim1=-2, dim2=-1).sum(-1) / 96
    distances = (target - 0.7 * torch.eye(96)).flatten(1).norm(dim=1) / (0.7 * 96**0.5)
    # tr(0.7 Z) / C has a standard deviation of 0.7 / C
    assert (traces - 0.395).abs().max() < 4 * 0.7 / 96
    assert (distances - 1.115).abs().max() < 0.03
    assert all(torch.linalg.matrix_rank(head) == 32 for head in target)


@pytest.mark.parametrize("kind", [WindowAttention, GlobalAttention])
def test_v_and_the_projection_give_noise_minus_the_identity(kind):
    """With one of the two stored the wrong way round the diagonal would have a deviation of about
    0.24 in place of 0.4 C^-1/2.
    """
    _, found = products(started(dim=96, kind=kind))
    noise = (found + 0.4 * torch.eye(96)) / 0.4 * 96**0.5  # of N(0, 1)
    assert found.diagonal().mean().item() == pytest.approx(-0.4, abs=4 * 0.4 / 96)
    assert noise.std().item() == pytest.approx(1, abs=4 / 96 / 2**0.5)
    assert noise.diagonal().std().item() == pytest.approx(1, abs=4 / (2 * 96) ** 0.5)


def test_a_result_of_another_width_than_the_input_is_refused():
    spec = AttentionSpec(("mimetic",))
    attention = GlobalAttention(Geometry(12, 3, SIDE), spec, out_dim=8)
    with pytest.raises(ValueError, match="v 12 and the result 8.*set vo=none"):
        attention.initialise_modifiers("test")


def test_factors_scale_the_products():
    weak, strong = (products(started(f"mimetic(qk={n}, vo={n})", 12)) for n in (0.5, 1.0))
    for half, whole in zip(weak, strong, strict=True):
        torch.testing.assert_close(2 * half, whole, rtol=1e-5, atol=1e-6)


def test_a_head_wider_than_the_tokens_has_the_whole_product_and_no_dead_channel():
    """T2T's token transformers: 27 channels, one head of 64."""
    attention = started("mimetic(vo=none)", 27, 1, GlobalAttention, head_dim=64)
    found, _ = products(attention)
    noise = (found[0] / 0.7 - torch.eye(27)) * 27**0.5
    assert noise.std().item() == pytest.approx(1, abs=4 / 27 / 2**0.5)
    assert attention.qkv.weight[:128].abs().amax(1).min() > 0
    small("t2t", attention=AttentionSpec(("mimetic(vo=none)",)))


def diagonal_mass(attention):
    """Mean of A_ii over random normalised tokens, 64 in a window."""
    dim, kept = attention.dim, []
    handle = attention.map_tap.register_forward_hook(lambda _m, _i, attn: kept.append(attn))
    with torch.no_grad():
        attention(F.layer_norm(torch.randn(16, *SIDE, dim), (dim,)), window_layout(SIDE, SIDE))
    handle.remove()
    return kept[0].diagonal(dim1=-2, dim2=-1).mean().item()


@pytest.mark.parametrize(
    ("text", "dim", "expected"),
    [
        ("mimetic", 96, 0.77),
        ("mimetic", 192, 0.97),
        ("init_identity", 96, 0.70),
        ("orthogonal(which=qk, norm=none)", 96, 0.70),
        ("orthogonal(which=qk, basis=random, norm=none)", 192, 0.95),
    ],
)
def test_the_first_map_is_as_near_to_the_identity_as_computed(text, dim, expected):
    """Three heads, so D = 32 and 64; over seeds the mean moves by 0.01."""
    assert diagonal_mass(started(text, dim)) == pytest.approx(expected, abs=0.02)
