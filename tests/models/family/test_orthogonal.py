"""Orthonormal starts: the matrices, their norms, and what they share."""

import math

import pytest
import torch

from models.attention import AttentionSpec, Geometry, WindowAttention
from models.attention.modifiers.orthogonal import cosine_matrix

DIM = 12


def started(*texts, std=0.02, seed=0):
    """Rows (C, C) of q, k and v, and as the family drew them."""
    torch.manual_seed(seed)
    attention = WindowAttention(Geometry(DIM, 3, (4, 4)), AttentionSpec(texts)).double()
    torch.nn.init.normal_(attention.qkv.weight, std=std)
    drawn = attention.qkv.weight.detach().clone().split(DIM)
    attention.initialise_modifiers("test")
    return attention.qkv.weight.detach().split(DIM), drawn


def assert_orthonormal(matrix):
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(DIM).double(), rtol=0, atol=1e-12)


def test_a_row_of_the_cosine_matrix_is_a_frequency_summed_by_definition():
    signal = torch.randn(DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(DIM):
        total = sum(signal[n] * math.cos(math.pi * k * (n + 0.5) / DIM) for n in range(DIM))
        expected = total * math.sqrt((1 if k == 0 else 2) / DIM)
        torch.testing.assert_close(cosine_matrix(DIM)[k] @ signal, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis", ["dct", "random", "identity"])
def test_the_named_rows_are_one_orthonormal_matrix_and_the_others_stay(basis):
    (q, k, v), drawn = started(f"orthogonal(which=qk, basis={basis}, norm=none)")
    assert_orthonormal(q)
    assert torch.equal(q, k) and torch.equal(v, drawn[2])
    expected = {"dct": cosine_matrix(DIM), "identity": torch.eye(DIM).double()}.get(basis)
    assert expected is None or torch.equal(q, expected)
    torch.testing.assert_close(q.mT @ k, torch.eye(DIM).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_matched_rows_have_the_norm_that_the_family_gave_them_each_its_own(std):
    rows, drawn = started("orthogonal(which=qkv)", std=std)
    for found, before in zip(rows, drawn, strict=True):
        torch.testing.assert_close(found.norm(), before.norm(), rtol=1e-12, atol=0)
        assert_orthonormal(found * DIM**0.5 / before.norm())
    assert len({float(found.norm()) for found in rows}) == 3


def test_a_random_basis_is_drawn_without_preference_of_a_sign():
    """The raw factor of a QR decomposition by LAPACK has a diagonal of one sign."""
    signs = [
        started("orthogonal(basis=random)", seed=seed)[0][1].diagonal()[: DIM - 1].sign()
        for seed in range(8)
    ]
    share = (torch.stack(signs) > 0).double().mean().item()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / (8 * (DIM - 1)) ** 0.5)
