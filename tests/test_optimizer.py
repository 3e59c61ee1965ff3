"""Parameter groups, optimizers, and the weight decay of query and key rows, on a small net with the
models' parameter names.
"""

import copy
import json
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace as Node

import pytest
import torch
from torch import nn

from config import ConfigError, load_config
from models import (
    CaiT,
    PiT,
    RefinedViT,
    SasaResNet,
    SwiftFormer,
    SwinMLP,
    SwinTransformer,
    SwinTransformerV2,
    T2TViT,
    VisionTransformer,
    timm_model,
)
from optimizer import (
    OPTIMIZERS,
    LayerIds,
    OptimizerError,
    build_optimizer,
    decay_coupled,
    find_optimizer,
    parameter_groups,
    register_optimizer,
)
from tests.helpers import ROOT, golden


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.attn.qkv = nn.Linear(width, 3 * width)
        self.attn.modifiers = nn.ModuleDict({"crpw": nn.Linear(2, 8)})
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, -1)
        return x + self.mlp(q * k.sigmoid() + v)


class Stage(nn.Module):
    def __init__(self, width, depth, last):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.downsample = None if last else nn.Linear(width, width, bias=False)
        self.pre_mlp = nn.Linear(width, width)

    def forward(self, x):
        x = self.pre_mlp(x)
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Net(nn.Module):
    """depths [2, 1]; a bias table and an absolute position embedding that must not decay."""

    def __init__(self, width=6):
        super().__init__()
        self.absolute_pos_embed = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embed = nn.Conv2d(1, width, 2, 2)
        self.layers = nn.ModuleList([Stage(width, 2, False), Stage(width, 1, True)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).mT + self.absolute_pos_embed
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))

    def no_weight_decay(self):
        return {"absolute_pos_embed"}

    def layer_groups(self):
        first = ["layers.0.blocks.0", "layers.0.pre_mlp"]
        second = ["layers.0.blocks.1", "layers.0.downsample"]
        return [["patch_embed"], first, second, ["layers.1.blocks.0", "layers.1.pre_mlp"]]

    def hidden_names(self):
        return ["layers"]

    def query_key_weights(self):
        return [name for name, _ in self.named_parameters() if name.endswith("qkv.weight")]

    def no_weight_decay_keywords(self):
        return {"relative_position_bias_table"}


def make_config(name="adamw", *, decay=0.05, layer_decay=1.0, qk=1.0, betas=(0.9, 0.999)):
    settings = Node(NAME=name, EPS=1e-8, BETAS=betas, MOMENTUM=0.9)
    return Node(
        TRAIN=Node(
            OPTIMIZER=settings,
            WEIGHT_DECAY=decay,
            LAYER_DECAY=layer_decay,
            QK_WEIGHT_DECAY=qk,
            DECAY_ALL=False,
        )
    )


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def set_gradients(model, value):
    for p in model.parameters():
        p.grad = torch.full_like(p, value)


def train(model, optimizer, updates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = model.head.weight.dtype
    for _ in range(updates):
        optimizer.zero_grad()
        model(torch.randn(2, 1, 4, 4, generator=generator).to(dtype)).square().sum().backward()
        optimizer.step()


def names_of(model, groups):
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in groups]


# ---- groups


def build_reference_model(spec):
    return {"swin": SwinTransformer, "swinv2": SwinTransformerV2, "swin_mlp": SwinMLP}[
        spec["family"]
    ](**spec["model_config"])


@pytest.mark.parametrize(
    "label",
    ["swin", "swinv2", "swin_mlp", "swin_sgd", "simmim_finetune_swin", "simmim_finetune_swinv2"],
)
def test_groups_are_the_references(label):
    meta, _ = golden("param_groups")
    spec = next(m for m in meta["models"] if m["label"] == label)
    settings = spec["config"]
    config = make_config(
        settings.get("TRAIN.OPTIMIZER.NAME", "adamw"),
        layer_decay=settings.get("TRAIN.LAYER_DECAY", 1.0),
    )
    model = build_reference_model(spec)
    built = build_optimizer(config, model, settings.get("TRAIN.BASE_LR", 5e-4))
    assert type(built).__name__ == spec["optimizer"]
    assert (
        list(built.defaults.get("betas", [])) == spec["betas"]
        and built.defaults.get("eps") == spec["eps"]
    )
    keys = ("lr", "weight_decay", "lr_scale", "group_name")
    for group, names, want in zip(
        built.param_groups,
        names_of(model, built.param_groups),
        with_positions_beside_the_patches(spec["groups"]),
        strict=True,
    ):
        assert names == want["params"]
        assert {key: group.get(key) for key in keys} == {key: want[key] for key in keys}


def with_positions_beside_the_patches(groups):
    """The reference's groups with one difference: under layer decay it counts the absolute position
    embedding, the first of all parameters, with the head; here it counts with the patches.
    """
    lone, *others = groups
    if lone["group_name"] != "layer_4_no_decay":
        return groups
    position, *rest = lone["params"]
    weight, patches, *blocks, head = others
    patches = {**patches, "params": [position, *patches["params"]]}
    return [patches, weight, *blocks, {**lone, "params": rest}, head]


class Named(nn.Module):
    """Parameters of given names; what Swin decays by shape gets two dimensions."""

    def __init__(self, matrices, vectors, skip, keywords):
        super().__init__()
        self.parts = {name: nn.Parameter(torch.zeros(2, 2)) for name in matrices} | {
            name: nn.Parameter(torch.zeros(2)) for name in vectors
        }
        self.skip, self.keywords = skip, keywords

    def named_parameters(self):
        return iter(self.parts.items())

    def no_weight_decay(self):
        return self.skip

    def no_weight_decay_keywords(self):
        return self.keywords


@pytest.mark.parametrize("label", ["simmim_pretrain_swin", "simmim_pretrain_swinv2"])
def test_prefixed_keywords_never_match_as_in_the_reference_and_plain_ones_do(label):
    meta, _ = golden("param_groups")
    decayed, spared = (
        group["params"]
        for group in next(m for m in meta["models"] if m["label"] == label)["groups"]
    )
    keywords = {"relative_position_bias_table", "cpb_mlp", "logit_scale"}
    skip = {"encoder.mask_token", "encoder.absolute_pos_embed"}
    trapped = Named(decayed, spared, skip, {"encoder." + keyword for keyword in keywords})
    assert names_of(trapped, parameter_groups(trapped, 1e-3, 0.05)) == [decayed, spared]
    mended = Named(decayed, spared, skip, keywords)
    moved = [name for name in decayed if any(keyword in name for keyword in keywords)]
    groups = names_of(mended, parameter_groups(mended, 1e-3, 0.05))
    assert (
        moved
        and groups[0] == [name for name in decayed if name not in moved]
        and set(groups[1]) == {*spared, *moved}
    )


def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none(net):
    net.patch_embed.requires_grad_(False)
    for layer_decay in (1.0, 0.75):
        names = chain.from_iterable(names_of(net, parameter_groups(net, 1e-3, 0.05, layer_decay)))
        assert sorted(names) == sorted(
            name for name, p in net.named_parameters() if p.requires_grad
        )


def test_decay_spares_vectors_biases_named_parameters_and_keywords(net):
    decayed, spared = names_of(net, parameter_groups(net, 1e-3, 0.05))
    assert (
        "absolute_pos_embed" in spared
        and "layers.0.blocks.1.attn.relative_position_bias_table" in spared
    )
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert "layers.1.blocks.0.attn.qkv.weight" in decayed and "head.weight" in decayed


SMALL = dict(img_size=16, num_classes=3)
TREES = {  # a model, and parameters in the order of the forward pass, each with its depth
    "swin": (
        lambda: SwinTransformer(
            **SMALL,
            patch_size=1,
            embed_dim=4,
            depths=(2, 12),
            num_heads=(1, 1),
            window_size=4,
            pre_mlp="stage",
            ape=True,
        ),
        {
            "absolute_pos_embed": 0,
            "patch_embed.proj.weight": 0,
            "layers.0.pre_mlp.mlp.fc1.weight": 1,
            "layers.0.blocks.0.attn.qkv.weight": 1,
            "layers.0.blocks.1.mlp.fc1.bias": 2,
            "layers.0.downsample.reduction.weight": 2,
            "layers.1.pre_mlp.norm.bias": 3,
            "layers.1.blocks.0.norm1.weight": 3,
            "layers.1.blocks.1.norm1.weight": 4,
            "layers.1.blocks.11.norm1.weight": 14,
            "norm.weight": 15,
            "head.weight": 15,
        },
    ),
    "swinv2": (
        lambda: SwinTransformerV2(
            **SMALL,
            patch_size=2,
            embed_dim=4,
            depths=(0, 1, 0),
            num_heads=(1, 1, 1),
            window_size=4,
            pretrained_window_sizes=(0, 0, 0),
            pre_mlp="stage",
        ),
        {
            "layers.0.downsample.reduction.weight": 0,
            "layers.0.pre_mlp.norm.weight": 1,
            "layers.1.blocks.0.attn.qkv.weight": 1,
            "layers.1.downsample.norm.weight": 1,
            "layers.2.pre_mlp.norm.weight": 2,
            "head.bias": 2,
        },
    ),
    "swin_mlp": (
        lambda: SwinMLP(
            **SMALL, patch_size=2, embed_dim=4, depths=(1,), num_heads=(1,), pre_mlp="stem"
        ),
        {"pre_mlp.norm.weight": 0, "layers.0.blocks.0.spatial_mlp.weight": 1, "norm.weight": 2},
    ),
    "vit": (
        lambda: VisionTransformer(**SMALL, embed_dim=4, depth=11, num_heads=1),
        {
            "cls_token": 0,
            "pos_embed": 0,
            "patch_embed.proj.weight": 0,
            "blocks.0.norm1.weight": 1,
            "blocks.1.norm1.weight": 2,
            "blocks.10.mlp.fc1.bias": 11,
            "norm.weight": 12,
            "head.weight": 12,
        },
    ),
    "cait": (
        lambda: CaiT(**SMALL, embed_dim=4, depth=2, num_heads=1),
        {
            "cls_token": 0,
            "blocks.0.gamma_1": 1,
            "blocks.1.attn.proj_l.weight": 2,
            "blocks_token_only.0.gamma_1": 3,
            "blocks_token_only.1.attn.q.weight": 4,
            "norm.weight": 5,
        },
    ),
    "pit": (
        lambda: PiT(
            **SMALL,
            patch_size=4,
            embed_dim=4,
            depths=(2, 1),
            num_heads=(1, 1),
            distilled=True,
            class_position=True,
        ),
        {
            "pos_embed": 0,
            "cls_pos": 0,
            "patch_embed.conv.weight": 0,
            "transformers.0.blocks.0.norm1.bias": 1,
            "transformers.0.blocks.1.norm1.bias": 2,
            "transformers.1.pool.conv.weight": 2,
            "transformers.1.blocks.0.norm1.bias": 3,
            "head.bias": 4,
            "head_dist.bias": 4,
        },
    ),
    "t2t": (
        lambda: T2TViT(**SMALL, embed_dim=4, depth=1, num_heads=1),
        {
            "patch_embed.attention1.attn.qkv.weight": 0,
            "blocks.0.attn.qkv.weight": 1,
            "norm.bias": 2,
        },
    ),
    "refined_vit": (
        lambda: RefinedViT(**SMALL, embed_dim=4, depth=2, num_heads=1, aux_head=True),
        {"patch_embed.proj.0.weight": 0, "blocks.1.attn.v.weight": 2, "aux_head.weight": 3},
    ),
    "swiftformer": (
        lambda: SwiftFormer(num_classes=3, embed_dims=(4, 4), depths=(1, 1)),
        {
            "stem.0.weight": 0,
            "stages.0.blocks.0.linear.norm1.weight": 1,
            "stages.1.downsample.proj.weight": 1,
            "stages.1.blocks.0.linear.norm1.weight": 2,
            "norm.weight": 3,
            "head_dist.bias": 3,
        },
    ),
    "resnet": (
        lambda: SasaResNet(num_classes=3, width=8, depths=(2, 1), conv_groups=(1, 2)),
        {
            "conv1.weight": 0,
            "bn1.weight": 0,
            "layer1.0.conv1.weight": 1,
            "layer1.1.bn1.weight": 2,
            "layer2.0.conv1.weight": 3,
            "fc.weight": 4,
        },
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_layer_ids_grow_with_depth_in_every_family(tree):
    build, expected = TREES[tree]
    model = build()
    layers, names = LayerIds(model), dict(model.named_parameters())
    assert expected.keys() <= names.keys()
    assert {name: layers[name] for name in expected} == expected


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "cait_xxs24_224", "beit_base_patch16_224"]
)
def test_layer_decay_reaches_every_layer_of_timms_trees_once(name):
    with torch.device("meta"):
        model = timm_model(name)
    layers = LayerIds(model)
    ids = [layers[key] for key, _ in model.named_parameters()]
    assert sorted(set(ids)) == list(range(layers.last + 1))
    assert ids == sorted(ids)


def test_decay_all_spares_nothing(net):
    (group,) = parameter_groups(net, 1e-3, 0.05, decay_all=True)
    assert len(group["params"]) == len(list(net.parameters())) and group["weight_decay"] == 0.05
    config = make_config()
    config.TRAIN.DECAY_ALL = True
    assert [group["weight_decay"] for group in build_optimizer(config, net, 1e-3).param_groups] == [
        0.05
    ]
    decays = {
        group["weight_decay"] for group in parameter_groups(net, 1e-3, 0.05, 0.5, decay_all=True)
    }
    assert decays == {0.05}


def test_layer_decay_scales_the_rate_once_per_layer(net):
    for group, names in zip(
        groups := parameter_groups(net, 2.0, 0.05, 0.5), names_of(net, groups), strict=True
    ):
        (layer,) = {LayerIds(net)[name] for name in names}
        assert group["lr"] == 2.0 * 0.5 ** (4 - layer) == 2.0 * group["lr_scale"]


def test_layer_decay_without_stages_is_refused():
    with pytest.raises(OptimizerError, match="TRAIN.LAYER_DECAY: Linear names no blocks"):
        parameter_groups(nn.Linear(2, 2), 1e-3, 0.05, 0.9)


# ---- optimizers

ALL_NAMES = [
    "adamw",
    "sgd",
    "lamb",
    "muon",
    "fused_adam",
    "fused_lamb",
    "timm:lion",
    "timm:adan",
    "timm:nadamw",
]


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_optimizer_keeps_the_groups_rates_and_lowers_a_loss(name, net):
    built = build_optimizer(make_config(name, layer_decay=0.9), net, 1e-3)
    images, targets = torch.randn(8, 1, 4, 4), torch.arange(8) % 3
    losses = []
    for _ in range(20):
        built.zero_grad()
        losses.append(nn.functional.cross_entropy(net(images), targets))
        losses[-1].backward()
        built.step()
    assert losses[-1] < losses[0]
    ours = {
        p: group["lr"] for group in parameter_groups(net, 1e-3, 0.05, 0.9) for p in group["params"]
    }
    assert {p: group["lr"] for group in built.param_groups for p in group["params"]} == ours


@pytest.mark.parametrize("name", ALL_NAMES)
def test_resumed_optimizer_continues_bit_for_bit_from_a_weights_only_file(name, net, tmp_path):
    config = (
        make_config(name, qk=2.0)
        if name in ("adamw", "sgd", "muon", "fused_adam")
        else make_config(name)
    )
    built = build_optimizer(config, net, 1e-3)
    train(net, built, 3)
    torch.save({"model": net.state_dict(), "optimizer": built.state_dict()}, tmp_path / "state.pth")
    train(net, built, 3, seed=1)
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    other = Net()
    other.load_state_dict(state["model"])
    resumed = build_optimizer(config, other, 1e-3)
    resumed.load_state_dict(state["optimizer"])
    train(other, resumed, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_sgd_is_nesterov(net):
    assert all(
        group["nesterov"] and group["momentum"] == 0.9
        for group in build_optimizer(make_config("sgd"), net, 0.1).param_groups
    )


def test_fused_adam_takes_the_steps_of_adamw(net):
    other = copy.deepcopy(net)
    train(net, build_optimizer(make_config("adamw", qk=3.0), net, 1e-3), 5)
    train(other, build_optimizer(make_config("fused_adam", qk=3.0), other, 1e-3), 5)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_takes_hidden_matrices_and_adamw_the_rest(net):
    built = build_optimizer(make_config("muon"), net, 1e-3)
    muon = chain.from_iterable(
        names_of(net, [group for group in built.param_groups if not group["use_fallback"]])
    )
    depth = {"layers.0.blocks.0.", "layers.0.blocks.1.", "layers.1.blocks.0."}
    expected = {block + part for block in depth for part in ("attn.qkv.weight", "mlp.weight")}
    assert set(muon) == expected | {
        "layers.0.downsample.weight",
        "layers.0.pre_mlp.weight",
        "layers.1.pre_mlp.weight",
    }


def test_muons_update_of_a_matrix_is_nearly_orthogonal_and_adamws_share_is_adamw(net):
    other = copy.deepcopy(net)
    weight, before = net.layers[0].blocks[0].attn.qkv.weight, rows(net)[0]
    gradients = [torch.randn_like(p) for p in net.parameters()]
    for model, name in ((net, "muon"), (other, "adamw")):
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        build_optimizer(make_config(name, decay=0.0), model, 1e-3).step()
    singular = torch.linalg.svdvals((before - weight).detach())
    assert singular.max() < 1.6 * singular.min()  # a random 18 x 6 gradient has a spread of about 3
    torch.testing.assert_close(net.head.weight, other.head.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name, words",
    [
        ("adamww", ["TRAIN.OPTIMIZER.NAME 'adamww'", "did you mean 'adamw'", "timm:<name>"]),
        ("timm:lamp", ["no optimizer 'lamp'", "did you mean 'lamb'"]),
        ("timm:adahessian", ["second derivatives"]),
        ("timm:lookahead_adamw", ["lookahead", "cannot be saved and resumed"]),
    ],
)
def test_unknown_optimizers_are_refused_with_the_nearest_name(name, words, net):
    with pytest.raises(OptimizerError) as error:
        build_optimizer(make_config(name), net, 1e-3)
    assert all(word in str(error.value) for word in words), error.value


def test_a_new_optimizer_is_one_entry_with_its_row_decay(net, monkeypatch):
    class Halving(torch.optim.SGD):
        """Halves every gradient."""

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(0.5)
            return super().step(closure)

    monkeypatch.setattr(OPTIMIZERS, "_entries", dict(OPTIMIZERS._entries))

    @register_optimizer("halving", row_decay=decay_coupled)
    def halving(request):
        return Halving(request.groups, lr=request.lr, momentum=request.momentum)

    config = load_config(None, ["TRAIN.OPTIMIZER.NAME", "halving", "TRAIN.QK_WEIGHT_DECAY", 2.0])
    before = [p.detach().clone() for p in net.parameters()]
    built = build_optimizer(config, net, 1e-2)
    train(net, built, 1)
    assert {group["optimizer"] for group in built.param_groups} == {"Halving"}
    for old, p in zip(before, net.parameters(), strict=True):
        assert p.grad is None or not torch.equal(old, p)
    with pytest.raises(ConfigError, match="halvin.*did you mean 'halving'"):
        load_config(None, ["TRAIN.OPTIMIZER.NAME", "halvin"])


@pytest.mark.parametrize("name", ["timm:adamw", "timm:muon", "timm:sgd"])
def test_timms_names_of_the_same_updates_share_the_row_decay(name):
    assert find_optimizer(name).row_decay is find_optimizer(name[5:]).row_decay is not None
    assert find_optimizer("timm:nadamw").row_decay is None
    assert find_optimizer("timm:bnbadam").row_decay is None  # of a package that may be missing


def test_importing_the_optimizers_names_does_not_load_timm():
    code = "import sys, optimizer; print('timm' in sys.modules, list(optimizer.OPTIMIZERS))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("False ['adamw',")


# ---- resuming


def test_resuming_follows_the_configs_settings_and_keeps_the_state(net, caplog):
    old = build_optimizer(make_config(decay=0.05), net, 1e-3)
    train(net, old, 2)
    new = build_optimizer(make_config(decay=0.1, betas=(0.8, 0.99)), net, 5e-4)
    new.load_state_dict(old.state_dict())
    assert [group["weight_decay"] for group in new.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in new.param_groups} == {5e-4} and new.param_groups[0][
        "betas"
    ] == (0.8, 0.99)
    assert "weight_decay is 0.05 in the checkpoint and 0.1 in the config" in caplog.text
    head = net.head.weight
    assert (
        torch.equal(new.state[head]["exp_avg"], old.state[head]["exp_avg"])
        and new.state[head]["step"] == 2
    )


FOLLOWED = {
    "adamw": {"lr", "weight_decay", "betas", "eps", "lr_scale", "group_name", "fused", "foreach"}
    | {"amsgrad", "maximize", "capturable", "differentiable"},
    "sgd": {"lr", "weight_decay", "momentum", "nesterov", "lr_scale", "group_name", "foreach"},
    "muon": {"lr", "weight_decay", "betas", "eps", "momentum", "nesterov", "use_fallback"},
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_resumed_groups_have_every_setting_of_this_run(name, net):
    built = build_optimizer(make_config(name, layer_decay=0.5), net, 1e-3)
    state = built.state_dict()
    expected = [dict(group) for group in state["param_groups"]]
    for group in state["param_groups"]:
        assert FOLLOWED[name] <= group.keys()
        group.update(dict.fromkeys(FOLLOWED[name], 7))  # another run's
    built.load_state_dict(state)
    assert built.state_dict()["param_groups"] == expected


def test_timms_optimizers_have_the_settings(net):
    config = make_config("muon", betas=(0.7, 0.8))
    config.TRAIN.OPTIMIZER.EPS = 1e-3
    config.TRAIN.OPTIMIZER.MOMENTUM = 0.6
    for name, keys in {"muon": ("betas", "eps", "momentum"), "lamb": ("betas", "eps")}.items():
        config.TRAIN.OPTIMIZER.NAME = name
        expected = {"betas": (0.7, 0.8), "eps": 1e-3, "momentum": 0.6}
        for group in build_optimizer(config, net, 1e-3).param_groups:
            assert {key: group[key] for key in keys} == {key: expected[key] for key in keys}


def test_resuming_with_nothing_changed_is_silent(net, caplog, tmp_path):
    old = build_optimizer(make_config(), net, 1e-3)
    torch.save(old.state_dict(), tmp_path / "state.pth")
    build_optimizer(make_config(), net, 1e-3).load_state_dict(torch.load(tmp_path / "state.pth"))
    assert not caplog.text


def test_another_optimizers_state_is_refused(net):
    state = build_optimizer(make_config("sgd"), net, 1e-3).state_dict()
    with pytest.raises(OptimizerError, match="holds the state of SGD, this run uses AdamW"):
        build_optimizer(make_config("adamw"), net, 1e-3).load_state_dict(state)


def test_other_groups_are_refused_before_anything_changes(net):
    built = build_optimizer(make_config(), net, 1e-3)
    state = build_optimizer(make_config(layer_decay=0.5), net, 1e-3).state_dict()
    with pytest.raises(OptimizerError, match="TRAIN.LAYER_DECAY has changed"):
        built.load_state_dict(state)
    assert json.dumps(built.state_dict()["param_groups"]).count("0.001") == 2


# ---- query and key rows


def rows(model):
    return [
        block.attn.qkv.weight.detach().clone() for stage in model.layers for block in stage.blocks
    ]


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("name", ["adamw", "fused_adam", "muon"])
def test_a_step_with_zero_gradient_shrinks_q_and_k_by_lr_wd_m_and_v_by_lr_wd(name, multiplier, net):
    net.double()
    built = build_optimizer(make_config(name, decay=0.1, qk=multiplier), net, 0.01)
    before = rows(net)
    set_gradients(net, 0.0)
    built.step()
    for old, new in zip(before, rows(net), strict=True):
        torch.testing.assert_close(
            new[:12], old[:12] * (1 - 0.01 * 0.1 * multiplier), rtol=1e-14, atol=0
        )
        torch.testing.assert_close(new[12:], old[12:] * (1 - 0.01 * 0.1), rtol=1e-14, atol=0)


def test_zero_gradient_pulls_the_effective_query_weight_towards_the_identity(net):
    """With the QK residual the effective weight is W + I, so that the decay of W is a decay towards
    I.
    """
    built = build_optimizer(make_config(decay=0.1, qk=5.0), net, 0.01)
    before = rows(net)[0]
    set_gradients(net, 0.0)
    built.step()
    distance = [
        torch.linalg.norm(w[:6] + torch.eye(6) - torch.eye(6)) for w in (before, rows(net)[0])
    ]
    assert distance[1] / distance[0] == pytest.approx(1 - 0.01 * 0.1 * 5, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_rows_follow_an_optimizer_that_gives_them_a_group_of_their_own(name, net):
    """The oracle: q, k rows and v rows as two parameters with weight decay 3 wd and wd in PyTorch's
    own optimizer.
    """
    net.double()
    built = build_optimizer(make_config(name, decay=0.1, qk=3.0), net, 0.01)
    weight = net.layers[0].blocks[0].attn.qkv.weight
    parts = [nn.Parameter(weight[:12].detach().clone()), nn.Parameter(weight[12:].detach().clone())]
    kind, options = (
        (torch.optim.AdamW, {})
        if name == "adamw"
        else (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})
    )
    witness = kind(
        [{"params": parts[:1], "weight_decay": 0.3}, {"params": parts[1:], "weight_decay": 0.1}],
        lr=0.01,
        **options,
    )
    for update in range(4):
        for group in built.param_groups + witness.param_groups:
            group["lr"] = 0.01 / (1 + update)
        set_gradients(net, 0.0)
        weight.grad = torch.randn(18, 6, generator=torch.Generator().manual_seed(update)).double()
        parts[0].grad, parts[1].grad = weight.grad[:12].clone(), weight.grad[12:].clone()
        built.step()
        witness.step()
    torch.testing.assert_close(weight, torch.cat(parts), rtol=1e-12, atol=1e-14)


def test_multiplier_one_is_bitwise_the_plain_optimizer(net):
    other = copy.deepcopy(net)
    train(net, build_optimizer(make_config(qk=1.0), net, 1e-3), 3)
    train(other, torch.optim.AdamW(parameter_groups(other, 1e-3, 0.05), lr=1e-3, fused=True), 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_rows_without_gradient_and_skipped_fused_steps_are_left_alone(net):
    built = build_optimizer(make_config("fused_adam", qk=3.0), net, 0.1)
    before = rows(net)
    built.step()  # no gradients at all
    set_gradients(net, 1.0)
    built.found_inf = torch.tensor(
        1.0
    )  # what GradScaler sets where the fused kernel decides itself
    built.step()
    assert all(torch.equal(a, b) for a, b in zip(before, rows(net), strict=True))


@pytest.mark.parametrize("name", ["lamb", "timm:lion"])
def test_optimizers_without_an_exact_row_decay_are_refused(name, net):
    with pytest.raises(OptimizerError, match="TRAIN.QK_WEIGHT_DECAY 2.0: .* has no exact form"):
        build_optimizer(make_config(name, qk=2.0), net, 1e-3)


def test_row_decay_needs_query_rows_and_a_multiplier_of_zero_or_more(net):
    with pytest.raises(OptimizerError, match="no trainable qkv weights"):
        build_optimizer(make_config(qk=2.0), nn.Linear(2, 2), 1e-3)
    with pytest.raises(OptimizerError, match="-1.0 is negative"):
        build_optimizer(make_config(qk=-1.0), net, 1e-3)
