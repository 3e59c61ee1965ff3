"""Class tokens have no place on the grid: modifiers of the terms act on the pairs of patches alone,
on grids of a single patch too.
"""

import pytest
import torch

from kernels.window_attention import OffsetTerms
from models import PiT
from models.attention import AttentionSpec, Geometry, GlobalAttention
from models.attention.modifiers import MODIFIERS, TermModifier
from tests.models.builders import EVERYWHERE, randomise

GRIDS = [(1, 1), (1, 2), (2, 1), (3, 2)]
TERM_MODIFIERS = [name for name in EVERYWHERE if issubclass(MODIFIERS[name], TermModifier)]
SPECS = [
    *((name,) for name in TERM_MODIFIERS),
    ("self_bias", "self_exclude", "self_weight"),
    ("self_bias", "elementwise_mask", "self_exclude", "self_weight"),
    ("self_mask(temperature=False)",),
    ("crpw(source=table)",),
    ("crpw(mode=one_plus)",),
    ("crpw(mode=sigmoid16)",),
    ("crpw(apply=probs)",),
    ("crpw(apply=probs, renormalise=True)",),
    ("gaussian_mixture_mask(position=post)",),
    ("gaussian_mixture_mask(share_heads=True, num_kernels=1)",),
    ("crpw", "gaussian_mixture_mask"),
    ("gaussian_mixture_mask(position=post)", "crpw(apply=probs)"),
    ("elementwise_mask", "crpw"),
    ("crpw", "elementwise_mask"),
]


def attention_on(grid, modifiers, prefix):
    geometry = Geometry(8, 2, grid, prefix=prefix)
    attention = GlobalAttention(geometry, AttentionSpec(modifiers)).double()
    randomise(attention.modifiers, std=1.0)
    return attention


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("modifiers", SPECS, ids="+".join)
def test_pairs_of_a_class_token_are_neutral_and_those_of_patches_as_without_one(
    modifiers, grid, prefix
):
    """The modifiers are the same with and without class tokens, only the pairs are more."""
    attention, bare = (attention_on(grid, modifiers, count) for count in (prefix, 0))
    bare.load_state_dict(attention.state_dict())
    tokens = prefix + grid[0] * grid[1]
    for name, neutral in (("scale", 4**-0.5), ("bias", 0.0), ("post", 1.0)):
        term, patches = attention.terms().dense(name), bare.terms().dense(name)
        if patches is None or torch.equal(patches, torch.full_like(patches, neutral)):
            assert term is None or torch.equal(term, torch.full_like(term, neutral))
            continue
        area = grid[0] * grid[1]
        assert term.shape == (2, tokens, tokens)
        torch.testing.assert_close(term[:, prefix:, prefix:], patches.expand(2, area, area))
        for of_class in (term[:, :prefix], term[:, :, :prefix]):
            assert torch.equal(of_class, torch.full_like(of_class, neutral))


def test_a_table_of_one_offset_is_a_table():
    """Bias and factor have a row per offset, the scale may be one number per head."""
    row = torch.tensor([[2.0, 3.0]])
    terms = OffsetTerms((1, 1), row, bias=row, post=row, prefix=1)
    assert terms.dense("scale").shape == (2, 1, 1)
    assert terms.dense("bias")[0].tolist() == [[0, 0], [0, 2]]
    assert terms.dense("post")[1].tolist() == [[1, 1], [1, 3]]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_one_number_per_head_reaches_class_tokens_whatever_the_grid(grid):
    """As the temperature of a head does, which is no table over offsets."""
    terms = attention_on(grid, (), 1).terms()
    hotter = terms.replace(scale=terms.scale * torch.tensor([2.0, 3.0]))
    assert hotter.dense("scale").flatten().tolist() == [1.0, 1.5]


@pytest.mark.parametrize("name", ["crpw", "gaussian_mixture_mask"])
def test_the_last_stage_of_a_small_pit_ignores_the_modifier_where_the_head_reads_it(name):
    """At 16 pixels the last of three stages has a grid of one patch."""
    torch.manual_seed(0)
    model = PiT(
        16, 4, 3, 10, 24, (1, 1, 1), (1, 2, 4), attention=AttentionSpec((name,)), drop_path_rate=0.0
    )
    randomise(model, std=0.2)
    images = torch.randn(2, 3, 16, 16)
    before = model.eval()(images)
    randomise(model.transformers[2].blocks[0].attn.modifiers, std=3.0, seed=1)
    torch.testing.assert_close(model(images), before)
