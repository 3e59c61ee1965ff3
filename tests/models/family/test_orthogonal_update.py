"""orthogonal_update: attention adds nothing along the residual stream."""

import pytest
import torch

from models.attention import AttentionSpec, Geometry
from models.attention.modifiers import MODIFIERS
from tests.models.builders import small

from .blocks import compare_stage, each_case


def update():
    return MODIFIERS.create("orthogonal_update", Geometry(16, 2, (4, 4)))


def drawn(seed):
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(seed))


def test_what_is_left_is_orthogonal_to_the_stream_and_no_longer():
    o, stream = drawn(0), drawn(1)
    left = update()(o, stream)
    assert (left * stream).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(update()(left, stream), left)
    torch.testing.assert_close(update()(o, 7 * stream), left)  # the direction alone counts
    assert update()(3 * stream, stream).abs().max() < 1e-5


def test_without_a_stream_the_branch_stays_and_gradients_are_finite():
    o, stream = drawn(0).requires_grad_(), torch.zeros(2, 9, 16, requires_grad=True)
    left = update()(o, stream)
    assert torch.equal(left, o)
    left.sum().backward()
    assert torch.equal(o.grad, torch.ones_like(o))
    assert stream.grad.isfinite().all()


def test_16_bit_branches_are_projected_in_float32():
    o, stream = drawn(0).bfloat16(), drawn(1)
    left = update()(o, stream)
    assert left.dtype == torch.float32
    assert torch.equal(left, update()(o.float(), stream))
    assert update()(o, stream.bfloat16()).dtype == torch.bfloat16


@each_case
def test_is_its_formula(case):
    def orthogonal(attention, o, stream):
        along = (o * stream).sum(-1, keepdim=True) / stream.norm(dim=-1, keepdim=True) ** 2
        return o - along * stream

    compare_stage(case, "orthogonal_update", branch=orthogonal)


def test_timms_blocks_keep_the_stream_to_themselves():
    with pytest.raises(ValueError, match=r"orthogonal_update edits .*blocks\.0\.attn.*MODEL.TYPE"):
        small("timm", attention=AttentionSpec(("orthogonal_update",)))
