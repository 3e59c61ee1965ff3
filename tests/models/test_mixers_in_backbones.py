"""Mixers instead of softmax attention: windows without a mask, class tokens, what is refused,
counts.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.window_attention import relative_position_index, window_layout
from models.attention import AttentionSpec, Geometry, WindowAttention
from models.attention.build import global_attention, window_attention
from models.attention.mixed import WindowMixer, axis_regions, by_regions
from models.attention.mixers import MIXERS
from tests.models.builders import randomise, small

NAMES = ("efficient_additive", "separable", "local(kernel_size=3)")
FAMILIES = ("swin", "swinv2", "vit", "pit")
LAYOUTS = [
    ((8, 8), (4, 4), (2, 2)),
    ((8, 8), (4, 4), (0, 0)),
    ((9, 7), (4, 4), (2, 2)),
    ((9, 7), (3, 2), (1, 1)),
    ((5, 8), (5, 4), (0, 2)),
    ((6, 10), (4, 4), (0, 0)),
    ((7, 7), (7, 7), (0, 0)),
    ((9, 9), (4, 4), (3, 2)),
]


def takes(family, mixer):
    """The changes that let a family take a mixer, or None where it cannot."""
    if family == "pit" and mixer.startswith("local"):
        return None
    return (
        dict(class_token=False, pool="mean")
        if family == "vit" and mixer.startswith("local")
        else {}
    )


CASES = [
    (family, mixer) for family in FAMILIES for mixer in NAMES if takes(family, mixer) is not None
]


def model(family, mixer, **changes):
    torch.manual_seed(0)
    return small(family, attention=AttentionSpec(mixer=mixer), **takes(family, mixer), **changes)


def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def softmax_of_a_region(module, window):
    """(tokens, (rows, columns)) -> Swin's attention among them, without a mask; biases by their
    offsets in the full window.
    """

    def attend(x, side):
        index = (
            relative_position_index(window)
            .view(*window, *window)[: side[0], : side[1], : side[0], : side[1]]
            .flatten(2)
            .flatten(0, 1)
        )
        bias = module.relative_position_bias_table[index].permute(2, 0, 1)
        q, k, v = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return module.proj(
            F.scaled_dot_product_attention(q, k, v, bias, scale=module.scale)
            .transpose(1, 2)
            .flatten(2)
        )

    return attend


@pytest.mark.parametrize(("grid", "window", "shift"), LAYOUTS, ids=str)
def test_softmax_attention_region_by_region_is_masked_window_attention(grid, window, shift):
    module = randomise(WindowAttention(Geometry(8, 2, window), AttentionSpec())).eval()
    x, layout = (
        torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(2)),
        window_layout(grid, window, shift),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            by_regions(x, layout, softmax_of_a_region(module, window)),
            module(x, layout),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("length", range(3, 20))
@pytest.mark.parametrize(("window", "shift"), [(3, 0), (3, 1), (4, 2), (7, 3)])
def test_the_regions_of_an_axis_cover_it_in_at_most_three_sizes(length, window, shift):
    regions = axis_regions(length, window, shift if length > window else 0)
    assert sum(size * count for size, count in regions) == length and 1 <= len(regions) <= 3
    assert all(0 < size <= window for size, _ in regions)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("grid", "window", "shift"), LAYOUTS[:4], ids=str)
def test_a_token_changes_exactly_the_tokens_that_the_mask_lets_it_meet(name, grid, window, shift):
    layout, geometry = window_layout(grid, window, shift), Geometry(8, 2, window)
    name = (
        "local(kernel_size=13)" if name.startswith("local") else name
    )  # the neighbourhood is the whole window
    module = randomise(WindowMixer(geometry, AttentionSpec(mixer=name)).double())
    x = torch.randn(1, *grid, 8, generator=torch.Generator().manual_seed(3)).double()
    swin = randomise(WindowAttention(geometry, AttentionSpec()).double())
    for place in [(0, 0), (grid[0] - 1, grid[1] - 1), (grid[0] // 2, 1)]:
        moved = x.clone()
        moved[0, place[0], place[1]] += 1
        ours, theirs = (
            (layer(moved, layout) - layer(x, layout)).abs().amax(-1) > 1e-12
            for layer in (module, swin)
        )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("family", "mixer"), CASES)
def test_every_parameter_learns_within_three_steps(family, mixer):
    network, touched = model(family, mixer), set()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images()), torch.arange(4))
        loss.backward()
        touched |= {
            key
            for key, p in network.named_parameters()
            if p.grad is not None and p.grad.abs().max() > 0
        }
        optimizer.step()
        assert loss.isfinite()
    assert touched == {key for key, _ in network.named_parameters()}


@pytest.mark.parametrize(
    ("family", "mixer"), [("swin", NAMES[0]), ("swinv2", NAMES[1]), ("vit", NAMES[2])]
)
def test_compiles_to_one_graph_with_the_same_logits(family, mixer):
    torch.compiler.reset()
    network = randomise(model(family, mixer)).eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), network(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "mixer"), CASES)
def test_bfloat16_autocast_is_finite(family, mixer):
    network = randomise(model(family, mixer), std=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = network(images())
        low.float().square().sum().backward()
    assert low.isfinite().all() and all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("mixer", "numbers"),
    [
        ("efficient_additive", 4 * 64 + 5 * 8),
        ("separable", 3 * 64 + 4 * 8 + 1),
        ("local(kernel_size=3)", 3 * 64 + 3 * 4),
    ],
)
def test_a_mixer_brings_its_own_parameters_and_no_others(mixer, numbers):
    module = window_attention(
        WindowAttention,
        Geometry(8, 2, (4, 4)),
        AttentionSpec(mixer=mixer),
        qkv_bias=True,
        proj_drop=0.1,
    )
    assert sum(p.numel() for p in module.parameters()) == numbers


@pytest.mark.parametrize("mixer", NAMES)
def test_flops_of_windows_count_every_token_once(mixer):
    geometry, spec = Geometry(8, 2, (4, 4)), AttentionSpec(mixer=mixer)
    module, whole = WindowMixer(geometry, spec), MIXERS.create(mixer, 8, 2)
    assert module.map_flops(window_layout((9, 7), (4, 4), (2, 2))) == whole.flops(63)
    plain, mixed = small("swin").flops(), model("swin", mixer).flops()
    attention = [(64, 8, 2), (64, 8, 2), (16, 16, 4)]  # tokens, channels, heads of each block
    softmax = sum(4 * n * c * c + 2 * n * 16 * c for n, c, _ in attention)
    assert mixed == plain - softmax + sum(
        MIXERS.create(mixer, c, h).flops(n) for n, c, h in attention
    )


def test_a_pooling_mixer_takes_the_class_token_as_a_token_like_others():
    module = randomise(
        global_attention(Geometry(8, 2, (2, 3), prefix=1), AttentionSpec(mixer="separable"))
    )
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(module(x), module.mixer(x))
    torch.testing.assert_close(module(x).roll(1, 1), module(x.roll(1, 1)))


def test_local_attention_refuses_a_class_token_and_says_what_to_do():
    with pytest.raises(
        ValueError,
        match="a class token or register has none: leave it out .CLASS_TOKEN False and POOL mean",
    ):
        small("vit", attention=AttentionSpec(mixer="local"))


@pytest.mark.parametrize("family", ["swin", "swinv2", "vit"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            dict(modifiers=("qk_residual",)),
            "which mixer separable does not form; set MODEL.ATTENTION.MODIFIERS",
        ),
        (dict(drop=0.1), "MODEL.ATTENTION.DROP: only softmax attention has that"),
        (dict(backend="sdpa"), "MODEL.ATTENTION.BACKEND: only softmax"),
        (dict(bias_sigmoid=False), "BIAS_SIGMOID: only"),
    ],
    ids=str,
)
def test_what_only_softmax_attention_has_is_refused(family, spec, message):
    with pytest.raises(ValueError, match=message):
        small(family, attention=AttentionSpec(mixer="separable", **spec))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("swin", dict(qkv_bias=False), "qkv_bias"),
        ("swin", dict(qk_scale=0.3), "qk_scale"),
        ("vit", dict(head_dim=8), "head_dim"),
        ("swinv2", dict(pretrained_window_sizes=(6, 0)), "a pretrained window"),
    ],
)
def test_arguments_of_softmax_attention_are_refused_not_ignored(family, options, message):
    with pytest.raises(
        ValueError, match=f"{message}: only softmax attention has that, mixer separable does not"
    ):
        small(family, attention=AttentionSpec(mixer="separable"), **options)


def test_other_image_sizes_are_cut_into_regions_too():
    network = model("swin", "separable", dynamic_img_size=True).eval()
    assert network(torch.randn(2, 3, 20, 28)).shape == (2, 10)


def test_position_embeddings_of_local_attention_are_not_decayed():
    names = model("swin", "local(kernel_size=3)").no_weight_decay()
    assert {"layers.0.blocks.1.attn.mixer.rel_row", "layers.1.blocks.0.attn.mixer.rel_col"} <= names
