"""Local attention and its stem against their formulas pixel by pixel, their special cases, and what
they keep in memory.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import neighbourhood
from models.attention.local import LocalAttention
from models.attention.local_stem import AttentionStem
from models.attention.mixers.local import LocalTokenAttention
from tests.helpers import ROOT
from tests.models.builders import randomise


def maps(dim=8, height=6, width=7, batch=2, seed=1, dtype=torch.float64):
    return torch.randn(
        batch, dim, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def layer(dim=8, heads=2, **options):
    return randomise(LocalAttention(dim, heads, **options).double())


def pixel_by_hand(module, q, k, v, i, j, head):
    """y of one pixel (i, j) and head from (D, H, W) maps, one neighbour after the other."""
    half, logits, values = module.kernel_size // 2, [], []
    for a in range(i - half, i + half + 1):
        for b in range(j - half, j + half + 1):
            inside = 0 <= a < q.shape[1] and 0 <= b < q.shape[2]
            if not inside and module.pad == "mask":
                continue
            logit = q[:, i, j] @ k[:, a, b] if inside else q.new_zeros(())
            if module.rel_row is not None:
                own = head if module.rel == "per_head" else 0
                logit = logit + q[:, i, j] @ torch.cat(
                    [module.rel_row[own, a - i + half], module.rel_col[own, b - j + half]]
                )
            logits.append(logit)
            values.append(v[:, a, b] if inside else torch.zeros_like(v[:, 0, 0]))
    weights = torch.stack(logits).softmax(0)
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def attention_by_hand(module, x):
    q, k, v = (
        F.conv2d(x, conv.weight, groups=conv.groups).unflatten(1, (module.num_heads, -1))
        for conv in (module.query, module.key, module.value)
    )
    q = q * module.scale
    heads = range(module.num_heads)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.cat(
                                [
                                    pixel_by_hand(module, q[b, h], k[b, h], v[b, h], i, j, h)
                                    for h in heads
                                ]
                            )
                            for j in range(x.shape[3])
                        ],
                        -1,
                    )
                    for i in range(x.shape[2])
                ],
                -2,
            )
            for b in range(len(x))
        ]
    )


CASES = [
    dict(kernel_size=3),
    dict(kernel_size=5, rel="per_head"),
    dict(kernel_size=3, pad="zero"),
    dict(kernel_size=3, rel="none"),
    dict(kernel_size=5, rel="none", pad="zero"),
    dict(kernel_size=7, scale="sqrt_d"),
    dict(kernel_size=1),
    dict(kernel_size=3, grouped=True, out_dim=12),
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("size", [(5, 6), (4, 4), (2, 9), (1, 1)], ids=str)
def test_values_and_gradients_are_the_formula_s(options, size):
    module, x = layer(**options), maps(8, *size).requires_grad_()
    ours, theirs = module(x), attention_by_hand(module, x)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(theirs)
    leaves = [x, *module.parameters()]
    gradients = [
        torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
        for y in (ours, theirs)
    ]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("rel", ["shared", "none"])
def test_a_neighbourhood_of_one_pixel_is_the_value_projection(rel):
    module, x = layer(kernel_size=1, rel=rel), maps()
    torch.testing.assert_close(module(x), module.value(x))


@pytest.mark.parametrize("size", [(4, 6), (5, 5)], ids=str)
def test_a_neighbourhood_of_the_whole_image_is_full_attention(size):
    module, x = layer(kernel_size=2 * max(size) - 1, rel="none"), maps(8, *size)
    q, k, v = (
        conv(x).unflatten(1, (2, -1)).flatten(3).mT
        for conv in (module.query, module.key, module.value)
    )
    full = F.scaled_dot_product_attention(q, k, v, scale=1.0).mT.flatten(1, 2).unflatten(2, size)
    torch.testing.assert_close(module(x), full)


@pytest.mark.parametrize("pad", ["mask", "zero"])
def test_a_moved_image_gives_a_moved_result_away_from_the_border(pad):
    module, x = layer(kernel_size=3, pad=pad), maps(8, 12, 12)
    for move in [(1, 0), (0, 1), (2, 3)]:
        moved = module(x.roll(move, (2, 3)))
        inside = (..., slice(move[0] + 1, -1), slice(move[1] + 1, -1))
        torch.testing.assert_close(moved[inside], module(x).roll(move, (2, 3))[inside])


def test_padding_counts_at_the_border_only():
    x, masked, zero = maps(8, 9, 9), layer(kernel_size=3), layer(kernel_size=3, pad="zero")
    different = (masked(x) - zero(x)).abs().amax((0, 1)) > 1e-9
    assert not different[1:-1, 1:-1].any() and different[0].all() and different[:, -1].all()


@pytest.mark.parametrize("projection", ["query", "key", "value"])
def test_a_head_s_projection_changes_its_own_channels_alone(projection):
    module, x = layer(dim=12, heads=3, kernel_size=3), maps(12)
    before = module(x)
    with torch.no_grad():
        getattr(module, projection).weight[4:8] += 0.5
    changed = (module(x) - before).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_heads_with_equal_values_differ_since_each_has_its_own_map():
    module, x = layer(kernel_size=5), maps()
    with torch.no_grad():
        module.value.weight[4:] = module.value.weight[:4]
    first, second = module(x).chunk(2, 1)
    assert not torch.allclose(first, second, rtol=1e-2)


def test_a_grouped_head_sees_its_own_channels_alone():
    module, x = layer(kernel_size=3, grouped=True), maps().requires_grad_()
    module(x)[:, :4].sum().backward()
    assert x.grad[:, :4].abs().max() > 0 and x.grad[:, 4:].abs().max() == 0


@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=str)
def test_stride_pools_what_attention_gives_at_full_resolution(size):
    x, full, strided = maps(8, *size), layer(kernel_size=3), layer(kernel_size=3, stride=2)
    y, pooled = full(x), strided(x)
    rows, cols = pooled.shape[-2:]
    assert (rows, cols) == F.conv2d(x, torch.ones(1, 8, 3, 3).double(), stride=2, padding=1).shape[
        -2:
    ]
    torch.testing.assert_close(pooled[..., 0, 0], y[..., :2, :2].mean((2, 3)))
    torch.testing.assert_close(
        pooled[..., -1, -1], y[..., 2 * (rows - 1) :, 2 * (cols - 1) :].mean((2, 3))
    )


@pytest.mark.parametrize(
    ("rel", "positions"), [("none", 0), ("shared", 7 * 8), ("per_head", 7 * 64)]
)
@pytest.mark.parametrize(("grouped", "projections"), [(False, 3 * 64 * 64), (True, 3 * 64 * 8)])
def test_parameter_counts_are_the_closed_forms(rel, positions, grouped, projections):
    assert (
        sum(p.numel() for p in LocalAttention(64, 8, rel=rel, grouped=grouped).parameters())
        == projections + positions
    )


def kept_bytes(module, x):
    """Bytes that the backward keeps, without what is kept twice."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(kept.values())


@pytest.mark.parametrize("pad", ["mask", "zero"])
def test_what_the_backward_keeps_does_not_grow_with_the_neighbourhood(pad):
    x = maps(32, 16, 16, batch=4, dtype=torch.float32).requires_grad_()
    image = x.numel() * 4
    small, large = (
        kept_bytes(LocalAttention(32, 4, kernel_size=size, pad=pad), x) for size in (3, 11)
    )
    assert (
        small <= 5.5 * image and large <= 5.5 * image
    )  # x, q, k, v and a little; an unfold would keep 2 * 121 images


class LargestTensor(TorchDispatchMode):
    """Notes the number of bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_no_tensor_of_forward_or_backward_is_larger_than_the_input_or_a_chunk(monkeypatch):
    monkeypatch.setitem(neighbourhood.CHUNK_BYTES, "cpu", 1 << 20)
    x = maps(
        64, 16, 16, batch=32, dtype=torch.float32
    ).requires_grad_()  # 2 MiB; logits of all heads would be 26 MiB
    module = LocalAttention(64, 8)
    with LargestTensor() as largest:
        module(x).sum().backward()
    assert largest.bytes <= max(x.numel() * 4, 1 << 20)


MEASURE = """
import resource, torch
from models.attention.local import LocalAttention
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x, module = torch.randn(64, 64, 32, 32, requires_grad=True), LocalAttention(64, 8, kernel_size=11)
start = peak()
module(x).sum().backward()
print(peak() - start)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux alone"
)
def test_a_training_step_on_small_images_takes_the_memory_of_a_few_inputs():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    )
    assert (
        float(run.stdout) < 16 * 16
    )  # MiB; the input has 16, an unfold of keys and values would have 2 * 121 * 16


@pytest.mark.parametrize("budget", [1, 20_000, 1 << 30])
def test_the_size_of_the_chunks_changes_nothing(budget, monkeypatch):
    module, x = layer(kernel_size=3, rel="per_head"), maps().requires_grad_()
    whole = module(x), torch.autograd.grad(module(x).square().sum(), x)[0]
    monkeypatch.setitem(neighbourhood.CHUNK_BYTES, "cpu", budget)
    torch.testing.assert_close(
        (module(x), torch.autograd.grad(module(x).square().sum(), x)[0]), whole
    )


@pytest.mark.parametrize("learning", ["query.weight", "value.weight", "rel_row"])
def test_a_parameter_learns_the_same_where_all_others_are_frozen(learning):
    def gradient(module):
        module(maps()).square().sum().backward()
        return module.get_parameter(learning).grad

    frozen = layer(kernel_size=3).requires_grad_(False)
    frozen.get_parameter(learning).requires_grad_()
    torch.testing.assert_close(gradient(frozen), gradient(layer(kernel_size=3)))


@pytest.mark.parametrize("tile", [1, 3, 8])
def test_the_size_of_the_tiles_changes_nothing(tile, monkeypatch):
    module, x = layer(kernel_size=5), maps(8, 7, 10)
    whole = module(x)
    monkeypatch.setattr(neighbourhood, "TILE", tile)
    torch.testing.assert_close(module(x), whole)


def test_recording_a_gradient_does_not_change_the_result():
    module, x = layer(), maps()
    with torch.no_grad():
        torch.testing.assert_close(
            module(x), module(x.clone().requires_grad_()).detach(), rtol=0, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pad", ["mask", "zero"])
def test_sixteen_bits_stay_finite_and_close(dtype, pad):
    module, x = layer(kernel_size=5, pad=pad), maps(8, 5, 5)
    exact = module(x)
    low = module.to(dtype)(x.to(dtype).requires_grad_())
    low.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    torch.testing.assert_close(low.double(), exact, rtol=0.05, atol=0.05)


def test_tokens_give_what_the_map_gives_and_a_class_token_is_refused():
    tokens = LocalTokenAttention(8, 2, kernel_size=3).double()
    module, x = layer(kernel_size=3), maps()
    tokens.load_state_dict(module.state_dict())
    torch.testing.assert_close(tokens(x.flatten(2).mT, (6, 7)), module(x).flatten(2).mT)
    with pytest.raises(ValueError, match="43 tokens are not a grid of 6x7"):
        tokens(torch.zeros(1, 43, 8).double(), (6, 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kernel_size=4), "kernel_size is 4; it must be odd"),
        (dict(num_heads=3), "8 -> 8 channels cannot be split into 3 heads"),
        (dict(num_heads=8), "1 channels a head cannot be halved"),
        (dict(stride=0), "stride is 0"),
        (dict(rel="perhead"), "did you mean 'per_head'"),
        (dict(pad="reflect"), "pad is 'reflect'; allowed are mask, zero"),
        (dict(scale="d"), "allowed are none, sqrt_d"),
    ],
    ids=str,
)
def test_sizes_and_words_that_cannot_be_are_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        LocalAttention(8, **{"num_heads": 2, **options})


def stem(**options):
    return randomise(AttentionStem(3, 8, 2, **options).double())


def stem_by_hand(module, x):
    """The attention of the first block of the first image, (block², dim)."""
    side = module.block
    pixels = [(a, b) for a in range(side) for b in range(side)]
    q, k, v = [], [], []
    for a, b in pixels:
        mixture = ((module.row[a] + module.col[b]) @ module.nu.T).softmax(0)
        q.append(module.query(x[0, :, a, b]))
        k.append(module.key(x[0, :, a, b]))
        v.append(
            sum(weight * matrix for weight, matrix in zip(mixture, module.value, strict=True))
            @ x[0, :, a, b]
        )
    q, k, v = (torch.stack(each).unflatten(1, (2, -1)) for each in (q, k, v))
    return torch.cat(
        [(q[:, head] @ k[:, head].mT).softmax(-1) @ v[:, head] for head in range(2)], 1
    )


def test_the_stem_is_its_formula():
    module, x = stem(), maps(3, 8, 12)
    ours = module.attend(x)[0, :, :4, :4].flatten(1).mT
    torch.testing.assert_close(ours, stem_by_hand(module, x))


def test_the_stem_works_block_by_block_and_pools_each():
    module, x = stem().eval(), maps(3, 8, 12)
    y = module(x)
    assert y.shape == (2, 8, 2, 3)
    torch.testing.assert_close(y[..., 1:2, 2:], module(x[..., 4:, 8:]))
    torch.testing.assert_close(
        y, module.norm(module.attend(x)).unflatten(3, (3, 4)).unflatten(2, (2, 4)).amax((3, 5))
    )


def test_the_stem_s_values_vary_with_the_place_only_through_the_mixture():
    module = stem()
    assert module.value_weights().std(0).max() > 0.01
    with torch.no_grad():
        module.nu.zero_()
    torch.testing.assert_close(module.value_weights(), module.value.mean(0).expand(16, -1, -1))
    assert stem(mixtures=1).row is None  # one matrix: plain attention


def test_the_stem_trains_every_parameter():
    module = stem()
    module(maps(3, 8, 8)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters())


def test_the_stem_names_an_image_that_it_cannot_cut():
    with pytest.raises(ValueError, match="10x8 pixels; both sides must be multiples of 4"):
        stem()(maps(3, 10, 8))
    with pytest.raises(ValueError, match="9 channels cannot be split into 2 heads"):
        AttentionStem(3, 9, 2)
