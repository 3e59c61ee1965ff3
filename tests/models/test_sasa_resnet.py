"""ResNet with local attention: published sizes and costs, torchvision's and timm's ResNet,
training, memory.
"""

import os
import resource
import subprocess
import sys

import pytest
import timm
import torch

from models.sasa_resnet import DEPTHS, SasaResNet, sasa_resnet
from tests.helpers import ROOT
from tests.models.builders import randomise
from tools.sasa_cost import ALL_GROUPS, layer_flops, paper_flops

SMALL = dict(
    img_size=16, num_classes=10, width=8, depths=(1, 1), num_heads=2, kernel_size=3, stem="small"
)
LAYERS = tuple(DEPTHS)
# Parameters: convolutions alone, then attention behind the convolution stem without positions,
# shared, per head.
COUNTED = {
    26: (13_696_552, 10_329_640, 10_331_264, 10_342_632),
    38: (19_626_792, 14_170_920, 14_173_384, 14_190_632),
    50: (25_557_032, 18_012_200, 18_015_504, 18_038_632),
}
# 10^9 FLOPs: convolutions alone and attention behind the convolution stem, counted; and the same as
# published.
FLOPS = {26: (4.685, 4.428, 4.7, 4.5), 38: (6.431, 5.650, 6.5, 5.7), 50: (8.178, 6.873, 8.2, 7.0)}
# Groups that stay convolutions: published 10^9 FLOPs, counted 10^6 parameters (paper, table 3).
PLACEMENTS = {
    (): (7.0, 18.016),
    (1,): (7.3, 18.089),
    (1, 2): (7.5, 18.482),
    (1, 2, 3): (8.0, 20.840),
    ALL_GROUPS: (8.2, 25.557),
    (2, 3, 4): (7.9, 25.483),
    (3, 4): (7.8, 25.091),
    (4,): (7.2, 22.733),
}


def meta(layers=50, **options):
    with torch.device("meta"):
        return sasa_resnet(layers, **options)


def count(model):
    return sum(p.numel() for p in model.parameters())


def small(**options):
    torch.manual_seed(0)
    return SasaResNet(**{**SMALL, **options})


def images(side=16, batch=4):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", LAYERS)
def test_parameters_are_exact(layers):
    kinds = dict(conv_groups=ALL_GROUPS), dict(rel="none"), {}, dict(rel="per_head")
    assert tuple(count(meta(layers, **options)) for options in kinds) == COUNTED[layers]
    assert abs(count(meta(layers, stem="attention")) - count(meta(layers))) < 10_000


def test_grouped_projections_and_positions_alone_have_their_exact_sizes():
    assert count(meta(grouped=True, rel="none")) == 14_711_336
    assert count(meta(content=False)) == 16_758_032


@pytest.mark.parametrize("layers", LAYERS)
def test_flops_are_the_counted_ones_and_the_published_ones_within_their_rounding(layers):
    ours = [
        paper_flops(meta(layers, **options)) / 1e9 for options in (dict(conv_groups=ALL_GROUPS), {})
    ]
    assert [round(each, 3) for each in ours] == pytest.approx(FLOPS[layers][:2], abs=1.1e-3)
    assert ours == pytest.approx(FLOPS[layers][2:], rel=0.025)


@pytest.mark.parametrize("groups", PLACEMENTS, ids=str)
def test_convolutions_in_some_groups_cost_what_table_3_says(groups):
    flops, millions = PLACEMENTS[groups]
    model = meta(conv_groups=groups)
    assert paper_flops(model) / 1e9 == pytest.approx(flops, rel=0.025) and count(
        model
    ) / 1e6 == pytest.approx(millions, abs=6e-4)


@pytest.mark.parametrize(
    ("options", "flops"),
    [
        (dict(kernel_size=3), 6.6),
        (dict(kernel_size=5), 6.7),
        (dict(kernel_size=9), 7.3),
        (dict(kernel_size=11), 7.7),
        (dict(content=False), 6.1),
    ],
    ids=str,
)
def test_other_extents_and_positions_alone_cost_what_the_paper_says(options, flops):
    assert paper_flops(meta(**options)) / 1e9 == pytest.approx(flops, rel=0.025)


def test_nineteen_by_nineteen_pixels_cost_a_convolution_without_positions_and_seventeen_with():
    assert layer_flops(128, 3, attention=False) == 294_912
    assert (layer_flops(128, 19), layer_flops(128, 20)) == (283_136, 303_104)
    assert layer_flops(128, 17, 5) < 294_912 < layer_flops(128, 18, 5)


def test_the_calculator_prints_the_published_networks():
    done = subprocess.run(
        [sys.executable, "tools/sasa_cost.py", "--kernel", "19"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        "25,557,032 parameters  8.178 GFLOPs" in done.stdout
        and "283,136 (4 k² d) or 329,344 (5 k² d)" in done.stdout
    )


def test_without_attention_it_is_timm_s_and_so_torchvision_s_resnet():
    torch.manual_seed(0)
    theirs = randomise(timm.create_model("resnet50", num_classes=7), std=0.1).eval()
    ours = SasaResNet(num_classes=7, conv_groups=ALL_GROUPS).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        x = images(65, 2)
        expected = theirs(x)
        torch.testing.assert_close(
            ours(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )


def test_keys_are_torchvision_s():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        theirs = models.resnet50().state_dict()
    assert {k: v.shape for k, v in meta(conv_groups=ALL_GROUPS).state_dict().items()} == {
        k: v.shape for k, v in theirs.items()
    }


OPTIONS = [
    {},
    dict(conv_groups=[1]),
    dict(rel="per_head"),
    dict(rel="none"),
    dict(grouped=True),
    dict(content=False, pad="zero"),
    dict(stem="attention", stem_heads=2),
    dict(stem="conv", scale="sqrt_d", drop_path_rate=0.2, drop_rate=0.1),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_learns_within_three_steps(options):
    model, touched = small(**options), set()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images()), torch.arange(4))
        loss.backward()
        touched |= {key for key, p in model.named_parameters() if p.grad.abs().max() > 0}
        optimizer.step()
        assert loss.isfinite()
    assert touched == {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "options", [{}, dict(content=False), dict(stem="attention", stem_heads=2)], ids=str
)
def test_bfloat16_autocast_is_finite_and_it_compiles_to_one_graph(options):
    model = randomise(small(**options), std=0.2).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images())
        low.float().square().sum().backward()
    assert low.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, dict(stem="conv"), dict(stem="attention", stem_heads=2)], ids=str
)
def test_maps_and_any_image_size(options):
    model = small(**options).eval()
    maps = model.forward_features(images(24), return_stages=True)
    first = 24 if options == {} else 6
    assert [tuple(each.shape[1:]) for each in maps] == [
        (32, first, first),
        (64, first // 2, first // 2),
    ]
    assert small(**options, num_classes=0).eval()(images(24)).shape == (4, 64)


def test_flops_follow_the_image_s_size():
    model = small(stem="conv", img_size=(33, 40))
    maps, features = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda m, _i, y, name=name: maps.__setitem__(
                    name, y.shape[-2:].numel() * m.weight.numel()
                )
            )
        if hasattr(module, "kernel_size") and hasattr(module, "rel"):
            module.register_forward_pre_hook(
                lambda m, i: features.append(
                    i[0].shape[-2:].numel() * 2 * m.kernel_size**2 * m.out_dim
                )
            )
    model(torch.randn(2, 3, 33, 40))
    assert model.flops() == sum(maps.values()) + sum(features) + model.fc.weight.numel()


def test_position_embeddings_are_not_decayed():
    names = small(stem="attention", stem_heads=2).no_weight_decay()
    assert {"conv1.row", "conv1.col", "layer1.0.conv2.rel_row", "layer2.0.conv2.rel_col"} <= names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(conv_groups=[3]), r"conv_groups names \[3\]; there are groups 1 to 2"),
        (dict(stem="cifar"), "stem is 'cifar'"),
        (dict(kernel_size=4), "it must be odd"),
        (dict(content=False, rel="none"), "content=False leaves q · r alone"),
        (dict(num_heads=3), "cannot be split into 3 heads"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
    with pytest.raises(ValueError, match="there are 26, 38, 50 layers, not 101"):
        sasa_resnet(101)


STEP = """
import resource, torch
from models.sasa_resnet import sasa_resnet
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = sasa_resnet(26, img_size=32, num_classes=10, stem="small")
images = torch.randn(BATCH, 3, 32, 32)
start = peak()
torch.nn.functional.cross_entropy(model(images), torch.zeros(BATCH, dtype=torch.long)).backward()
print(peak() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux alone"
)
def test_a_training_step_of_resnet_26_takes_less_than_a_quarter_of_the_memory_of_unfolding():
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    done = subprocess.run(
        [sys.executable, "-c", STEP.replace("BATCH", "16")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # Keys and values of 49 pixels for each of the 8 layers, (image pixels, channels), 4 bytes each,
    # kept for the backward.
    pixels = [
        (1024, 64),
        (1024, 128),
        (256, 128),
        (256, 256),
        (64, 256),
        (64, 256),
        (64, 256),
        (64, 512),
    ]
    unfolded = 16 * 2 * 49 * 4 * sum(count * channels for count, channels in pixels) / 2**20
    print(f"{float(done.stdout):.0f} MiB; unfolding alone would take {unfolded:.0f} MiB")
    assert float(done.stdout) < unfolded / 4
