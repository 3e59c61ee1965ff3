"""Counted multiply-accumulates: the known totals to the digit, by definition, whatever computes the
attention.
"""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from kernels.linear import mlp, precision
from kernels.window_attention import fused, operations
from models import CaiT, PiT, SwinTransformer, SwinTransformerV2, T2TViT, VisionTransformer
from models.attention import AttentionSpec
from models.attention.mixers import MIXERS
from models.counting import Macs, count_macs
from models.layers.mlp import Mlp
from models.swiftformer import SIZES, SwiftFormer
from tests.models.builders import ATTENTION_FAMILIES, small

SMALL = dict(mlp_ratio=2.0, img_size=32, num_classes=10)
BARE = dict(qkv_bias=False, norm_eps=1e-5)
# The small-image models of the Gaussian mixture mask's paper, CIFAR-10: model, millions without and
# with attention products. The first are the paper's table by its definition (which gives PiT 239.1
# and CaiT 305.9), the second have been worked out by hand.
PAPER = {
    "vit": (
        VisionTransformer,
        dict(
            SMALL,
            **BARE,
            patch_size=4,
            embed_dim=192,
            depth=9,
            num_heads=12,
            class_token=False,
            pool="mean",
        ),
        170.904,
        184.6,
    ),
    "swin": (
        SwinTransformer,
        dict(
            SMALL,
            patch_size=2,
            embed_dim=96,
            depths=(2, 6, 4),
            num_heads=(3, 6, 12),
            window_size=4,
            ape=True,
        ),
        236.953,
        240.9,
    ),
    "pit": (
        PiT,
        dict(
            SMALL,
            **BARE,
            patch_size=2,
            embed_dim=96,
            depths=(2, 6, 4),
            num_heads=(2, 4, 8),
            head_dim=48,
            pointwise=True,
            class_position=True,
        ),
        239.005,
        274.4,
    ),
    "t2t": (T2TViT, dict(img_size=32, num_classes=10, preset="release"), 417.432, 450.1),
    "cait": (
        CaiT,
        dict(
            BARE,
            img_size=32,
            num_classes=10,
            patch_size=4,
            embed_dim=108,
            num_heads=4,
            head_dim=64,
            mlp_ratio=384 / 108,
            mixing="normal",
            mixing_bias=False,
            class_context="patches",
            class_mixing=True,
            layer_scale="depth",
        ),
        305.623,
        None,
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_macs_of_the_mask_s_paper_are_met(name):
    model, options, without, with_products = PAPER[name]
    macs = count_macs(model(**options), torch.zeros(1, 3, 32, 32))
    assert round(macs.without_attention / 1e6, 3) == without
    assert with_products is None or round(macs.with_attention / 1e6, 1) == with_products


@pytest.mark.parametrize("name", PAPER)
def test_a_family_s_own_formula_is_the_count_and_once_the_norms(name):
    model, options, *_ = PAPER[name]
    model = model(**options)
    macs = count_macs(model, torch.zeros(1, 3, 32, 32))
    assert model.flops() - macs.with_attention == pytest.approx(macs.norm / 2, rel=0.2)


def small_swin(**options) -> nn.Module:
    return SwinTransformer(
        16,
        2,
        num_classes=10,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        **options,
    )


def test_kinds_of_one_layer_each_are_told_apart():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.linear = (
                nn.Conv2d(3, 5, 2, 2),
                nn.LayerNorm(5),
                nn.Linear(5, 7),
            )

        def forward(self, x):
            tokens = self.norm(self.conv(x).flatten(2).mT)  # (B, 6, 5)
            tokens = (tokens @ tokens.mT).softmax(-1) @ tokens
            q, k, v = (self.linear(tokens) for _ in range(3))
            return nn.functional.scaled_dot_product_attention(q, k, v)

    expected = Macs(
        linear=6 * 5 * 12 + 3 * 6 * 5 * 7, attention=2 * 6 * 6 * 5 + 2 * 6 * 6 * 7, norm=2 * 6 * 5
    )
    assert count_macs(Net(), torch.zeros(1, 3, 4, 6)) == expected


def test_a_linear_layer_on_tokens_of_any_memory_order_is_linear():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 7)

        def forward(self, x):
            return self.linear(x.flatten(2).mT)

    assert count_macs(Net(), torch.zeros(1, 3, 4, 4)) == Macs(16 * 3 * 7)


@pytest.mark.parametrize("backend", ["auto", "reference", "eager", "sdpa"])
def test_the_count_is_that_of_the_plain_formula_whatever_computes_it(backend):
    model, images = small_swin(attention=AttentionSpec(backend=backend)), torch.zeros(1, 3, 16, 16)
    assert count_macs(model, images) == count_macs(small_swin(), images)
    assert {module.spec.backend for module in model.modules() if hasattr(module, "spec")} == {
        backend
    }


def test_an_mlp_worked_on_in_chunks_counts_as_one(monkeypatch):
    model, images = small_swin(), torch.zeros(1, 3, 16, 16)
    whole = count_macs(model, images)
    monkeypatch.setattr(mlp, "WHOLE_BYTES", 0)
    monkeypatch.setattr(mlp, "PLAIN_BYTES", {True: 0, False: 0})
    monkeypatch.setattr(precision, "CHUNK_BYTES", 1)
    assert count_macs(model, images) == whole


def test_what_is_worked_out_once_for_a_batch_is_not_counted_even_before_it_is_kept():
    model = SwinTransformerV2(
        img_size=16,
        patch_size=2,
        num_classes=10,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 4),
        window_size=4,
        pretrained_window_sizes=(0, 0),
    )
    images = torch.zeros(1, 3, 16, 16)
    fresh = count_macs(model, images)
    model.eval()(images)
    with torch.no_grad():
        model(images)
    assert count_macs(model, images) == fresh
    assert (
        model.flops() - fresh.with_attention < 0.05 * model.flops()
    )  # norms alone: no position MLP in either


@pytest.mark.parametrize(
    "modifier, per_pair",
    [
        ("gaussian_mixture_mask", 0),
        ("crpw", 0),
        ("qk_residual", 0),
        ("talking_heads", 2 * 4 * 4),
        ("refiner(expand=2, kernel=3)", 2 * 4 * 8 + 8 * 9),
    ],
)
def test_what_modifiers_do_to_the_map_counts_as_attention(modifier, per_pair):
    options = dict(
        img_size=16,
        patch_size=4,
        num_classes=5,
        embed_dim=16,
        depth=2,
        num_heads=4,
        class_token=False,
        pool="mean",
    )
    images = torch.zeros(1, 3, 16, 16)
    plain, modified = (
        count_macs(VisionTransformer(**options, attention=AttentionSpec(names)), images)
        for names in ((), (modifier,))
    )
    assert modified - plain == Macs(0, 2 * 16 * 16 * per_pair)


@pytest.mark.parametrize("mixer", ["efficient_additive", "separable"])
def test_mixers_without_a_map_count_their_projections(mixer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = MIXERS.create(mixer, 16, 4)

        def forward(self, x):
            return self.mixer(x.flatten(2).mT, (4, 4))

    net = Net()
    macs = count_macs(net, torch.zeros(1, 16, 4, 4))
    assert (
        macs.attention == macs.norm == 0 and 0 <= net.mixer.flops(16) - macs.linear <= 16 * 16
    )  # but the element-wise sum


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 2)
    )
    model[1].eval()
    model[0].bias.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert count_macs(model, torch.ones(4, 3, 4, 4)) == Macs(9 * 4 * 12 + 36 * 2)
    assert model.training and not model[1].training and model[2].training
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    ) and torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "size, gmacs",
    [
        ("xs", 0.6024),
        ("s", 0.9846),
        ("l1", 1.5960),
        pytest.param("l3", 4.0084, marks=pytest.mark.slow),
    ],
)
def test_swiftformer_s_count_is_the_known_one_but_for_the_product_with_w_g(size, gmacs):
    """q w_g is worked out element by element here, so only the formula counts it."""
    model = SwiftFormer(**SIZES[size])
    sides = zip((56, 28, 14, 7), SIZES[size]["embed_dims"], strict=True)
    macs = count_macs(model, torch.zeros(1, 3, 224, 224))
    assert round(model.flops() / 1e9, 4) == gmacs
    assert macs == Macs(linear=model.flops() - sum(side * side * dim for side, dim in sides))


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("swin", "cait") else pytest.param(name, marks=pytest.mark.slow)
        for name in ATTENTION_FAMILIES
        if name != "timm"  # which counts by running
    ],
)
def test_flops_are_the_count_and_the_norms_whatever_works_on_the_map(family):
    for names in ((), ("re_attention",), ("crpw", "talking_heads", "refiner")):
        model = small(family, attention=AttentionSpec(names))
        macs = count_macs(model, torch.zeros(1, 3, 16, 16))
        norms = model.flops() - macs.with_attention
        assert norms == pytest.approx(macs.norm / 2, rel=0.2), names  # of the class token alone


def flops(model: nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """What PyTorch's counter says of a forward, and of both passes."""
    with FlopCounterMode(display=False) as counter:
        y = model(images)
        forward = counter.get_total_flops()
        y.square().sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("backend", ["fused", "eager", "sdpa"])
@pytest.mark.parametrize("chunked", [False, True])
def test_pytorch_s_counter_sees_the_products_of_every_backend(backend, chunked, monkeypatch):
    if backend == "fused" and fused.missing("cpu"):
        pytest.skip(f"the CPU kernel is not here: {fused.missing('cpu')}")
    images = torch.zeros(2, 3, 18, 20)  # 9 x 10 tokens, padded to windows of 4

    def network(backend):
        spec = AttentionSpec(backend=backend)
        return small("swin", embed_dim=32, img_size=(18, 20), attention=spec)

    plain = flops(network("reference"), images)
    if chunked:
        monkeypatch.setattr(mlp, "WHOLE_BYTES", 0)
        monkeypatch.setattr(mlp, "PLAIN_BYTES", {True: 0, False: 0})
        monkeypatch.setattr(precision, "CHUNK_BYTES", 1)
    assert flops(network(backend), images) == plain


def test_a_counter_that_runs_when_the_kernel_is_loaded_counts_it():
    if fused.missing("cpu"):
        pytest.skip(f"the CPU kernel is not here: {fused.missing('cpu')}")
    model = small("swin", embed_dim=32, attention=AttentionSpec(backend="fused"))
    right = flops(model, torch.zeros(1, 3, 16, 16))
    operation = torch.ops.idsw.window_attention_forward
    formula = flop_registry.pop(operation)
    with FlopCounterMode(display=False) as counter:
        flop_registry[operation] = formula
        operations.register_flops()  # as loading does
        model(torch.zeros(1, 3, 16, 16))
    assert counter.get_total_flops() == right[0]


def test_the_backward_of_an_mlp_alone_counts_its_four_products(monkeypatch):
    monkeypatch.setattr(mlp, "PLAIN_BYTES", {True: 0, False: 0})
    y = Mlp(8, 32)(torch.zeros(200, 8, requires_grad=True))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 200 * 8 * 32
