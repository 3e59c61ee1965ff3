"""The Refiner: its identities, the meaning of its convolution, its planes, the mask, and vectors of
the original's layer.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.window_attention import window_layout
from models.attention import AttentionSpec
from models.attention.geometry import Geometry
from models.attention.modifiers import MODIFIERS
from tests.helpers import golden, subtree
from tests.models.builders import WINDOW_FAMILIES, randomise, small

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
PLANES = ("raster", "key_grid", "query_grid")


def refiner(options="", window=(3, 4), heads=2, prefix=0):
    return MODIFIERS.create(
        f"refiner({options})", Geometry(12 * heads, heads, window, prefix=prefix)
    )


def draw_maps(heads=2, tokens=12, batch=3):
    return torch.randn(
        batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(1)
    ).softmax(-1)


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def captured_map(attention, x, layout):
    maps = []
    handle = attention.map_tap.register_forward_hook(
        lambda _module, _inputs, attn: maps.append(attn)
    )
    attention(x, layout)
    handle.remove()
    return maps[0]


@pytest.mark.parametrize("family", WINDOW_FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        "",
        "expand=1",
        "expand=2, kernel=4",
        "reduce=False, expand=2",
        "reduce=False, expand=1",
        "residual=True",
        "residual=True, reduce=False, expand=1",
        "act=relu6",
        "renorm=row",
        "geometry=key_grid",
        "geometry=query_grid",
        "preset=release, bn=False, init=identity",
    ],
)
def test_a_fresh_one_is_the_plain_model(family, options):
    plain = randomise(small(family))
    model = small(family, attention=AttentionSpec((f"refiner({options})",)))
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_the_convolution_aggregates_values_locally_for_neighbouring_queries(side):
    """(conv(A) V)_i = sum_a sum_j A_{i+a, j} (sum_b w_ab V_{j-b}), with zeros beyond both ends."""
    modifier = randomise(refiner(f"expand=1, reduce=False, kernel={side}"))
    maps, values, before = draw_maps(), torch.randn(3, 2, 12, 5), (side - 1) // 2
    expected = torch.zeros(3, 2, 12, 5)
    for a in range(-before, side - before):
        for i in (i for i in range(12) if 0 <= i + a < 12):
            for j in range(12):
                for b in (b for b in range(-before, side - before) if 0 <= j - b < 12):
                    w = modifier.kernel[:, 0, a + before, b + before]
                    expected[:, :, i] += (
                        maps[:, :, i + a, j, None] * w[:, None] * values[:, :, j - b]
                    )
    torch.testing.assert_close(modifier(maps) @ values, expected, rtol=1e-4, atol=1e-5)


def test_expansion_and_reduction_act_on_the_heads_and_have_the_stated_sizes():
    modifier = randomise(refiner("expand=3, kernel=1"))
    expanded = torch.einsum(
        "gh,bhij->bgij", modifier.expansion, draw_maps()
    ) * modifier.kernel.view(-1, 1, 1)
    torch.testing.assert_close(
        modifier(draw_maps()), torch.einsum("hg,bgij->bhij", modifier.reduction, expanded)
    )
    for heads, ratio, side in ((12, 3, 3), (4, 2, 5)):
        counted = sum(
            p.numel() for p in refiner(f"expand={ratio}, kernel={side}", heads=heads).parameters()
        )
        assert counted == ratio * heads * heads + ratio * heads * side**2 + heads * ratio * heads
    counted = sum(p.numel() for p in refiner("preset=release", heads=12).parameters())
    assert counted == (12 * 36 + 72 + 36 * 9 + 72 + 36 * 12 + 24) + 24


def test_the_release_has_a_norm_after_each_step_two_activations_and_the_map_added():
    modifier, maps = randomise(refiner("preset=release, expand=2"), std=1.0), draw_maps()

    def norm(name, x):
        return F.batch_norm(
            x, None, None, modifier.norms[name].weight, modifier.norms[name].bias, training=True
        )

    local = F.relu6(norm("expanded", torch.einsum("gh,bhij->bgij", modifier.expansion, maps)))
    local = F.relu6(norm("local", F.conv2d(local, modifier.kernel, padding=1, groups=4)))
    reduced = norm("reduced", torch.einsum("hg,bgij->bhij", modifier.reduction, local))
    torch.testing.assert_close(
        modifier(maps), norm("refined", reduced + maps), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("plane", PLANES)
def test_each_plane_has_its_own_neighbours(plane):
    """A map with one entry spreads over its 3 x 3 neighbourhood in that plane."""
    modifier = refiner(f"expand=1, reduce=False, geometry={plane}")
    torch.nn.init.ones_(modifier.kernel)
    query, key = 6, 3  # on a grid of 3 x 4: (1, 2) and (0, 3)
    point = torch.zeros(1, 2, 12, 12)
    point[..., query, key] = 1
    reached = {tuple(pair) for pair in modifier(point)[0, 0].nonzero().tolist()}
    neighbours = {
        "key_grid": {(query, j) for j in (2, 3, 6, 7)},
        "query_grid": {(i, key) for i in (1, 2, 3, 5, 6, 7, 9, 10, 11)},
        "raster": {(i, j) for i in (5, 6, 7) for j in (2, 3, 4)},
    }  # 4 begins the next row of keys
    assert reached == neighbours[plane]


@pytest.mark.parametrize("plane", PLANES)
def test_excluded_class_tokens_pass_the_convolution_and_change_nobody_s(plane):
    options = f"expand=1, reduce=False, geometry={plane}"
    modifier, without = (
        randomise(refiner(f"{options}, cls=exclude", prefix=1)),
        randomise(refiner(options)),
    )
    maps = draw_maps(tokens=13)
    refined = modifier(maps)
    torch.testing.assert_close(
        refined[..., 1:, 1:], without(maps[..., 1:, 1:]), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(refined[..., 0, :], maps[..., 0, :])
    assert torch.equal(refined[..., 0], maps[..., 0])


def test_an_included_class_token_is_the_neighbour_of_the_first_patch():
    modifier = refiner("expand=1, reduce=False", prefix=1)
    torch.nn.init.ones_(modifier.kernel)
    point = torch.zeros(1, 2, 13, 13)
    point[..., 0, 0] = 1
    assert modifier(point)[0, 0, 1, 1] == 1


@pytest.mark.parametrize(
    "options", ["", "preset=release", "geometry=key_grid", "renorm=row", "reduce=False, expand=2"]
)
@pytest.mark.parametrize("family", WINDOW_FAMILIES)
def test_masked_pairs_are_exactly_zero_in_shifted_windows(options, family):
    attention = (
        randomise(small(family, attention=AttentionSpec((f"refiner({options})",))))
        .layers[0]
        .blocks[1]
        .attn
    )
    layout = window_layout((8, 8), (4, 4), (2, 2))
    attn = captured_map(attention, torch.randn(3, 8, 8, 8), layout)
    forbidden = (layout.mask != 0)[None, :, None].expand(3, -1, attn.shape[1], -1, -1).flatten(0, 1)
    assert forbidden.any()
    assert not attn[forbidden].any()
    assert attn[~forbidden].abs().min() > 0


def test_normalised_rows_sum_to_1_within_the_mask_too():
    attention = (
        small("swin", attention=AttentionSpec(("refiner(renorm=row)",))).layers[0].blocks[1].attn
    )
    with torch.no_grad():
        for parameter in attention.modifiers["refiner"].parameters():
            parameter.uniform_(0.1, 1)
    attn = captured_map(attention, torch.randn(3, 8, 8, 8), window_layout((8, 8), (4, 4), (2, 2)))
    torch.testing.assert_close(attn.sum(-1), torch.ones_like(attn.sum(-1)))


def test_a_row_that_sums_to_nothing_stays_finite():
    modifier = refiner("renorm=row")
    assert modifier.after_mask(torch.zeros(1, 2, 12, 12)).eq(0).all()


def test_rescaling_multiplies_by_the_scale_of_the_logits():
    modifier, rescaled = randomise(refiner("")), randomise(refiner("rescale=True"))
    torch.testing.assert_close(rescaled(draw_maps()), modifier(draw_maps()) * 12**-0.5)


def test_without_a_reduction_values_are_cut_into_as_many_heads_as_maps():
    attention = (
        randomise(small("swin", attention=AttentionSpec(("refiner(reduce=False, expand=2)",))))
        .layers[0]
        .blocks[0]
        .attn
    )
    x, layout = torch.randn(1, 4, 4, 8), window_layout((4, 4), (4, 4))
    attn = captured_map(attention, x, layout)
    assert attn.shape == (1, 4, 16, 16)
    values = attention.project(x)[..., 16:].view(16, 4, 2)  # 4 heads of 2 channels
    expected = torch.einsum("gij,jgd->igd", attn[0], values).reshape(1, 4, 4, 8)
    torch.testing.assert_close(attention(x, layout), attention.proj(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("preset=draft", "allowed are paper, release"),
        ("act=gelu", "allowed are none, relu6"),
        ("geometry=disc", "allowed are raster, key_grid"),
        ("expand=0", "at least 1"),
        ("kernel=0", "at least 1"),
        ("expand=5, reduce=False", "choose expand"),
        ("expand=2, reduce=False, residual=True", "fewer heads"),
        ("geometry=key_grid", "add cls=exclude"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        refiner(options, prefix=1)


# ---- vectors of the original

NAMES = {
    "conv_exp.weight": "expansion",
    "depth_sep_conv.weight": "kernel",
    "conv_pro.weight": "reduction",
    "bn1": "norms.expanded",
    "bn2": "norms.local",
    "bn3": "norms.reduced",
}


def renamed(key):
    module, _, leaf = key.partition(".")
    return NAMES[key] if key in NAMES else f"{NAMES[module]}.{leaf}"


def compare(modifier, tensors, gradients):
    maps = tensors["input"].clone().requires_grad_()
    output = modifier(maps)
    (output * tensors["loss_weight"]).sum().backward()
    assert (output - tensors["output"]).abs().max() <= 1e-5 * tensors["output"].abs().max().clamp(
        min=1
    )
    assert relative(maps.grad, tensors["input_grad"]) <= 2e-5
    for key, (ours, theirs) in gradients(modifier).items():
        assert relative(ours, theirs.view(ours.shape)) <= 5e-5, key


@pytest.mark.parametrize("name", ["refiner_dla", "refiner_dla_train"])
def test_the_released_layer_has_the_original_s_outputs_gradients_and_statistics(name):
    """Without the release's last norm, which stands outside this layer."""
    meta, tensors = golden(name)
    options = meta["config"]
    modifier = refiner(
        f"preset=release, expand={options['expand_ratio']}, kernel={options['kernel_size']}",
        heads=options["inp"],
    )
    del modifier.norms["refined"]
    state = {renamed(key): value for key, value in subtree(tensors, "state_dict").items()}
    modifier.load_state_dict(
        {key: state[key].view(value.shape) for key, value in modifier.state_dict().items()}
    )
    modifier.train(meta["mode"] == "train")
    theirs = {renamed(key): value for key, value in subtree(tensors, "grad").items()}
    compare(
        modifier, tensors, lambda m: {key: (p.grad, theirs[key]) for key, p in m.named_parameters()}
    )
    assert sum(p.numel() for p in modifier.parameters()) == meta["num_trainable"]
    for key, value in subtree(tensors, "after").items():
        torch.testing.assert_close(modifier.state_dict()[renamed(key)], value, rtol=1e-5, atol=1e-5)


def test_a_dense_convolution_over_heads_is_an_expansion_by_their_number():
    """Expanded head (o, i) is head i, its kernel that from i to o, and the reduction sums over
    i.
    """
    meta, tensors = golden("refiner_dla_dense")
    modifier = dense(tensors["state_dict/conv.weight"])
    heads = meta["config"]["inp"]
    compare(
        modifier,
        tensors,
        lambda m: {
            "conv.weight": (m.kernel.grad.view(heads, heads, 3, 3), tensors["grad/conv.weight"])
        },
    )


def dense(weight):
    heads, eye = len(weight), torch.eye(len(weight))
    modifier = refiner(f"expand={heads}, kernel={weight.shape[-1]}", heads=heads)
    with torch.no_grad():
        modifier.expansion.copy_(eye.repeat(heads, 1))
        modifier.kernel.copy_(weight.flatten(0, 1)[:, None])
        modifier.reduction.copy_(eye.repeat_interleave(heads, 1))
    return modifier


def test_the_dense_convolution_is_pytorch_s():
    weight = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(
        dense(weight)(draw_maps()), F.conv2d(draw_maps(), weight, padding=1), rtol=1e-4, atol=1e-5
    )
