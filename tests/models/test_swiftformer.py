"""SwiftFormer: published sizes, the original's and timm's outputs, training."""

import re

import pytest
import timm
import torch

from checkpoint import load_weights
from checkpoint.convert import from_swiftformer
from config import load_config
from models.attention.mixers.efficient_additive import EfficientAdditiveAttention
from models.build import ModelError, build_model
from models.swiftformer import SIZES, SwiftFormer, swiftformer
from tests.helpers import ROOT, golden, subtree
from tests.models.builders import randomise

SMALL = dict(num_classes=5, embed_dims=(8, 8, 12), depths=(2, 1, 2))
# parameters with and without the distillation head, 10^9 multiply-accumulates at 224 pixels
PUBLISHED = {
    "xs": (3_475_360, 3_254_360, 0.6024),
    "s": (6_092_128, 5_867_128, 0.9846),
    "l1": (12_057_920, 11_672_920, 1.5960),
    "l3": (28_494_736, 27_981_736, 4.0084),
}


def small(**options):
    torch.manual_seed(0)
    return SwiftFormer(**{**SMALL, **options})


def images(size=32, batch=4, seed=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def random_statistics(model):
    """Random values for every parameter and for the batch norms' running statistics."""
    randomise(model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_exact_and_macs_agree_to_the_printed_digits(size):
    with torch.device("meta"):
        models = swiftformer(size), swiftformer(size, distillation=False)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert (*counts, round(models[0].flops() / 1e9, 4)) == PUBLISHED[size]


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_has_timm_s_names_and_shapes(size):
    with torch.device("meta"):
        ours, theirs = swiftformer(size), timm.create_model(f"swiftformer_{size}")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize("size", [64, 70])
def test_timm_s_weights_give_timm_s_logits(size):
    torch.manual_seed(0)
    theirs = timm.create_model(
        "swiftformer_xs", num_classes=7, layers=[2, 1, 2, 1], embed_dims=[8, 12, 16, 20]
    )
    random_statistics(theirs).eval()
    ours = SwiftFormer(num_classes=7, depths=(2, 1, 2, 1), embed_dims=(8, 12, 16, 20)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    for mine, other in zip(
        ours.forward_features(x, return_stages=True),
        theirs.forward_intermediates(x, norm=True)[1],
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def own_name(key):
    """The original's state-dict name -> ours."""
    return next(iter(from_swiftformer({key: torch.zeros(0)})))


def test_released_weights_load_by_their_own_names():
    meta, tensors = golden("swiftformer_model")
    config = meta["config"]
    model = SwiftFormer(
        24,
        num_classes=config["num_classes"],
        embed_dims=config["embed_dims"],
        depths=config["layers"],
    ).eval()
    report = load_weights(model, {"model": subtree(tensors, "state_dict")}, rule="exact")
    assert report.format == "swiftformer" and report.coverage == 1 and not report.missing
    torch.testing.assert_close(model(tensors["input"]), tensors["logits"], rtol=0, atol=1e-5)


def configured(*opts, cfg="configs/digits/digits_swiftformer.yaml"):
    return build_model(load_config(ROOT / cfg, list(opts)))


def test_the_published_sizes_are_built_from_their_yamls():
    for size, (with_head, without, _) in PUBLISHED.items():
        with torch.device("meta"):
            models = [
                configured(cfg=f"configs/swiftformer/swiftformer_{size}{tail}.yaml")
                for tail in ("", "_no_teacher")
            ]
        assert [sum(p.numel() for p in model.parameters()) for model in models] == [
            with_head,
            without,
        ]


def test_another_mixer_is_taken_from_the_one_place_for_all_families():
    model = configured(
        "MODEL.ATTENTION.MIXER", "local(kernel_size=3)", "MODEL.SWIFTFORMER.NUM_HEADS", "[2, 4]"
    )
    assert [stage.blocks[-1].attn.num_heads for stage in model.stages] == [2, 4]
    assert isinstance(configured().stages[0].blocks[-1].attn, EfficientAdditiveAttention)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.ATTENTION.MIXER", "softmax", "too many tokens for N x N maps; leave it at auto"),
        ("MODEL.ATTENTION.MODIFIERS", "[qk_residual]", "swiftformer has no such part"),
        ("MODEL.ATTENTION.DROP", "0.1", "swiftformer has no such part: set it to 0.0"),
        ("MODEL.SWIFTFORMER.NUM_HEADS", "[2, 2]", "which has no heads; leave it out"),
        ("MODEL.PRE_MLP.WHERE", "stem", "swiftformer has no such part"),
        ("TRAIN.USE_CHECKPOINT", "True", "running statistics"),
    ],
)
def test_keys_without_a_meaning_are_refused_with_the_reason(key, value, message):
    with pytest.raises(ModelError, match=message):
        configured(key, value)


def test_logits_features_and_gradients_are_the_original_s():
    meta, tensors = golden("swiftformer_model")
    config = meta["config"]
    model = SwiftFormer(
        24,
        num_classes=config["num_classes"],
        embed_dims=config["embed_dims"],
        depths=config["layers"],
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == meta["num_trainable"]
    model.load_state_dict(
        {own_name(key): value for key, value in subtree(tensors, "state_dict").items()}, strict=True
    )
    features, expected = (
        {},
        {
            re.sub(r"\.$", "", own_name(f"{key}.")): value
            for key, value in subtree(tensors, "feature").items()
        },
    )
    for name in expected:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, y, name=name: features.__setitem__(name, y.detach())
        )
    x = tensors["input"].clone().requires_grad_()
    logits = model(x)
    (logits * tensors["loss_weight"]).sum().backward()

    def error(ours, theirs):
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    assert (logits - tensors["logits"]).abs().max() <= 1e-5
    assert (
        max(error(features[name], value) for name, value in expected.items()) <= 1e-5 and expected
    )
    assert error(x.grad, tensors["input_grad"]) <= 2e-5
    gradients = {own_name(key): value for key, value in subtree(tensors, "grad").items()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert max(error(p.grad, gradients[key]) for key, p in model.named_parameters()) <= 5e-5


def test_logits_are_the_mean_of_both_heads_and_each_learns():
    model = small().eval()
    torch.testing.assert_close(model(images()), sum(model.forward_heads(images())) / 2)
    model(images()).square().sum().backward()
    assert model.head.weight.grad.abs().max() > 0 and model.head_dist.weight.grad.abs().max() > 0


def test_without_distillation_there_is_one_head():
    model = small(distillation=False)
    assert not any("dist" in key for key in model.state_dict())
    assert torch.equal(*model.eval().forward_heads(images()))
    assert small(num_classes=0).eval()(images()).shape == (4, 12)


def before_a_norm(name):
    """Biases that a batch norm takes away again: their gradient is zero up to rounding."""
    return bool(re.search(r"(stem\.[03]|dwconv|downsample\.proj)\.bias$", name))


@pytest.mark.parametrize(
    "attention",
    [
        "efficient_additive",
        "efficient_additive(pool_norm=softmax, residual=none)",
        "separable",
        "local(kernel_size=3)",
    ],
)
def test_every_parameter_learns_within_three_steps(attention):
    heads = [2, 2, 2] if attention.startswith("local") else None
    model = small(attention=attention, num_heads=heads, drop_rate=0.1, drop_path_rate=0.1)
    optimizer, touched = torch.optim.AdamW(model.parameters(), lr=1e-2), set()
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images()), torch.arange(4))
        loss.backward()
        touched |= {key for key, p in model.named_parameters() if p.grad.abs().max() > 0}
        optimizer.step()
        assert loss.isfinite()
    names = {key for key, _ in model.named_parameters()}
    assert {key for key in names - touched if not before_a_norm(key)} == set()


def test_layer_scale_can_be_left_out_and_zero_leaves_the_convolutions_alone():
    assert not any("layer_scale" in key for key in small(layer_scale=None).state_dict())
    zero, other = (
        small(layer_scale=0.0).eval(),
        small(layer_scale=0.0, attention="separable").eval(),
    )
    other.load_state_dict(
        {key: value for key, value in zero.state_dict().items() if ".attn." not in key},
        strict=False,
    )
    assert torch.equal(zero(images()), other(images()))


def test_drop_path_grows_over_the_blocks():
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0)
        for stage in small(drop_path_rate=0.4).stages
        for block in stage.blocks
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_attention_stands_in_the_last_blocks_of_each_stage():
    def kinds(vit_num):
        return [
            [hasattr(block, "attn") for block in stage.blocks]
            for stage in small(vit_num=vit_num).stages
        ]

    assert kinds(1) == [[False, True], [True], [False, True]]
    assert kinds(0) == [[False, False], [False], [False, False]]
    assert kinds(9) == [[True, True], [True], [True, True]]


def test_bfloat16_autocast_is_close_and_finite():
    model = randomise(small(), std=0.2).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images())
        low.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(low.float(), model(images()), rtol=0.05, atol=0.05)


def test_compiles_to_one_graph_with_the_same_logits():
    model = randomise(small()).eval()
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(images()),
        model(images()),
        rtol=1e-4,
        atol=1e-5,
    )


def test_wrong_lengths_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"depths \[2, 1\].*must have one entry per stage each"):
        small(depths=(2, 1))
    with pytest.raises(ValueError, match="size is 'xl'; allowed are xs, s, l1, l3"):
        swiftformer("xl")
