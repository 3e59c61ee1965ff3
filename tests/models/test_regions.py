"""What the mask of shifted and padded windows keeps apart does not meet in another way: a property
of every modifier and mixer.
"""

from itertools import product

import pytest
import torch

from kernels.window_attention import window_layout
from models.attention import AttentionSpec, Geometry, WindowAttention, WindowAttentionV2
from models.attention.mixed import WindowMixer
from models.attention.mixers import MIXERS
from models.attention.modifiers import MODIFIERS
from models.attention.regions import axis_kinds, by_region, zero_masked
from models.layers.sw_mlp import WindowTokenMix
from tests.models.builders import EVERYWHERE, randomise

LAYOUTS = [  # grid, window, shift
    ((8, 8), (4, 4), (2, 2)),
    ((6, 7), (4, 4), (2, 2)),
    ((5, 9), (3, 4), (1, 2)),
    ((6, 7), (4, 4), (0, 0)),
    ((8, 3), (4, 3), (2, 0)),
    ((9, 9), (5, 5), (3, 4)),
]
SPECS = [
    *EVERYWHERE,
    *(
        f"refiner({options})"
        for options in (
            "expand=1, reduce=False",
            "expand=2, reduce=False",
            "kernel=2",
            "kernel=5, expand=1",
            "renorm=row",
            "preset=release",
            "preset=release, geometry=key_grid",
            "preset=release, geometry=query_grid",
            "geometry=key_grid",
            "geometry=query_grid",
            "cls=exclude, rescale=True",
        )
    ),
    "talking_heads(init=normal, bias=True)",
    "re_attention(init=uniform, bias=True)",
    "crpw(apply=probs, renormalise=True)",
    "gaussian_mixture_mask(position=post, renormalise=True)",
]
GEOMETRY = dict(dim=8, num_heads=2)


def regions(grid, window, shift):
    """{region: (rows, columns) bool}: tokens that share a window and came there from one side."""
    found = {}
    for place in product(*map(range, grid)):
        key = []
        for at, length, side, moved in zip(place, grid, window, shift, strict=True):
            padded = -(-length // side) * side
            key.append(((at - moved) % padded // side, at < moved))
        found.setdefault(tuple(key), torch.zeros(grid, dtype=torch.bool))[place] = True
    return list(found.values())


def assert_regions_are_apart(module, grid, window, shift):
    """The results of all tokens but those of a region stay the same when its input changes."""
    torch.manual_seed(0)
    module = randomise(module, std=0.4).double().eval()
    parts = torch.stack(regions(grid, window, shift))[..., None]  # (regions, rows, columns, 1)
    x = torch.randn(1, *grid, GEOMETRY["dim"], dtype=torch.float64)
    images = torch.cat([x, torch.where(parts, torch.randn_like(x), x)])
    with torch.no_grad():
        y = module(images, window_layout(grid, window, shift))
    moved = (y[1:] - y[0]).abs()
    assert moved.masked_fill(parts, 0).max() < 1e-13
    assert all(moved[k][parts[k].squeeze(-1)].max() > 1e-6 for k in range(len(parts)))


def attention(layout, *modifiers, kind=WindowAttention):
    return kind(Geometry(**GEOMETRY, window=layout[1]), AttentionSpec(modifiers))


@pytest.mark.parametrize("modifier", SPECS)
def test_no_modifier_lets_regions_of_a_window_meet(modifier):
    for layout in LAYOUTS[:3]:
        assert_regions_are_apart(attention(layout, modifier), *layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("modifier", SPECS)
def test_no_modifier_of_swinv2_lets_regions_of_any_window_meet(modifier, layout):
    for kind in (WindowAttention, WindowAttentionV2):
        assert_regions_are_apart(attention(layout, modifier, kind=kind), *layout)


def test_modifiers_together_let_no_regions_meet():
    together = ("qk_residual", "crpw", "talking_heads", "re_attention", "refiner")
    assert_regions_are_apart(attention(LAYOUTS[1], *together), *LAYOUTS[1])


@pytest.mark.parametrize("mixer", [*MIXERS.names(), "local(pad=zero, kernel_size=3)"])
def test_no_mixer_lets_regions_of_a_window_meet(mixer):
    for layout in LAYOUTS:
        geometry = Geometry(**GEOMETRY, window=layout[1])
        assert_regions_are_apart(WindowMixer(geometry, AttentionSpec(mixer=mixer)), *layout)


def test_the_mlp_over_the_tokens_of_a_window_lets_no_regions_meet():
    for layout in LAYOUTS:
        area = layout[1][0] * layout[1][1]
        assert_regions_are_apart(WindowTokenMix(area, 2), *layout)


@pytest.mark.parametrize("plane", ["raster", "key_grid", "query_grid"])
@pytest.mark.parametrize("options", ["expand=2", "preset=release, expand=2"])
def test_a_convolution_beside_padding_is_that_of_the_map_without_it(options, plane):
    """A window of 4 x 4 whose last row is padding refines like one of 3 x 4, though the norm in
    front gives masked pairs a value.
    """
    spec = f"refiner({options}, geometry={plane})"
    small, padded = (
        MODIFIERS.create(spec, Geometry(8, 2, window)).eval() for window in ((3, 4), (4, 4))
    )
    randomise(small, std=1.0)
    padded.load_state_dict(small.state_dict())
    layout = window_layout((3, 4), (4, 4))
    maps = torch.randn(2, 2, 16, 16)
    refined = padded(zero_masked(maps, layout.mask), layout)
    torch.testing.assert_close(refined[..., :12, :12], small(maps[..., :12, :12]))


def test_windows_of_one_region_are_mixed_once_and_the_last_of_a_shifted_map_region_by_region():
    layout = window_layout((12, 12), (4, 4), (2, 2))
    batches = []

    def count(maps):
        batches.append(len(maps))
        return maps

    maps = torch.randn(9, 1, 16, 16)
    assert torch.equal(by_region(maps, None, count), maps)
    torch.testing.assert_close(
        by_region(maps, layout, count), zero_masked(maps, layout.mask), rtol=0, atol=0
    )
    assert batches == [9, 4, 2, 2, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("axis", [(8, 4, 2), (7, 4, 2), (9, 5, 4), (5, 4, 0), (8, 4, 0)])
def test_the_regions_of_an_axis_are_those_of_the_mask(axis):
    length, window, shift = axis
    layout = window_layout((length, 1), (window, 1), (shift, 0))
    kinds = [kind for count, kind in axis_kinds(*axis) for _ in range(count)]
    region = torch.tensor(kinds)
    same = region[:, :, None] == region[:, None]
    mask = torch.zeros(len(kinds), window, window) if layout.mask is None else layout.mask
    assert torch.equal(same, mask == 0)
