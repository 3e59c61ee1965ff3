"""Layouts of other people's files: one network is found under its names, and which one is said."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from checkpoint import CheckpointError, load_weights, read_weights, unwrap
from checkpoint.layouts import ENTRIES, WRAPPERS
from checkpoint.openmmlab import swin_order
from models import SwinTransformer, SwinTransformerV2, build_model
from models.layers.patch_embed import PatchMerging
from tests.checkpoint.builders import randomise
from tests.wiring.cases import FAMILIES, config_of
from tests.wiring.models import model_settings

TINY = dict(
    img_size=16,
    patch_size=2,
    embed_dim=8,
    depths=(1, 1),
    num_heads=(1, 2),
    window_size=4,
    num_classes=5,
)


@pytest.fixture(scope="module")
def model():
    return randomise(SwinTransformer(**TINY))


@pytest.fixture(scope="module")
def state(model):
    return {key: value for key, value in model.state_dict().items() if "index" not in key}


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def loaded(content, entry: str | None = None, **options):
    """The report of loading into a new model, which must then be whole."""
    options = {"rule": "exact"} | options
    return load_weights(SwinTransformer(**TINY), unwrap(content, "file.pth", entry), **options)


def refused(content, entry: str | None = None, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(content, entry, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


INSIDE = (
    "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module",
    "layers.0._checkpoint_wrapped_module",
    "layers.0._orig_mod",
    "module.layers.0.blocks.0.module",
)


@pytest.mark.parametrize("place", INSIDE)
def test_wrappers_components_are_removed_anywhere(state, place):
    plain = ".".join(part for part in place.split(".") if part not in WRAPPERS)
    wrapped = {
        key.replace(f"{plain}.", f"{place}.", 1) if key.startswith(f"{plain}.") else key: value
        for key, value in state.items()
    }
    assert wrapped.keys() != state.keys()
    assert loaded(wrapped).coverage == 1


@pytest.mark.parametrize(
    "prefix",
    ["net.", "backbone.", "network.", "model.net.", "module.model.backbone.", "ema_model.module."],
)
@pytest.mark.parametrize("extra", [{}, {"criterion.weight": torch.ones(5)}], ids=["", "criterion"])
def test_a_lightning_modules_prefix_goes_and_its_criterion_is_left_out_by_name(
    state, prefix, extra
):
    content = {"state_dict": under(prefix, state) | extra, "epoch": 3, "hyper_parameters": {}}
    report = loaded(content)
    assert report.coverage == 1
    assert any("criterion.weight" in note for note in report.notes) == bool(extra)


def test_a_head_beside_the_backbone_is_the_networks(state):
    body = {key: value for key, value in state.items() if not key.startswith("head.")}
    head = {key: value for key, value in state.items() if key.startswith("head.")}
    content = {"state_dict": under("backbone.", body) | head}
    assert loaded(content, rule="finetune", head="evaluate").coverage == 1
    other = {"classifier.1.weight": head["head.weight"], "classifier.1.bias": head["head.bias"]}
    message = refused(under("backbone.", body) | other, rule="finetune", head="evaluate")
    assert "no classifier" in message and "classifier.1.weight" in message
    assert "'head.weight'" in refused(under("backbone.", state) | head)
    assert loaded(under("backbone.", state) | head, "backbone").coverage == 1


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_usual_entry_is_found_alone(state, entry):
    assert loaded({entry: state, "epoch": 1, "optimizer": {"state": {}}}).coverage == 1
    assert loaded({"my_own_name": state, "epoch": 1}).coverage == 1


@pytest.mark.parametrize(
    ("trained", "copy"),
    [
        ("module", "ema"),
        ("params", "params_ema"),
        ("state_dict", "ema_state_dict"),
        ("model", "teacher"),
        ("state_dict", "state_dict_ema"),
    ],
)
def test_the_trained_network_is_taken_with_a_word_about_the_other(state, trained, copy):
    content = {copy: {key: value + 1 for key, value in state.items()}, trained: state}
    report = loaded(content)
    assert any(copy in note and "MODEL.ENTRY" in note for note in report.notes)
    chosen = unwrap(content, entry=copy)
    assert torch.equal(chosen["norm.weight"], state["norm.weight"] + 1)


@pytest.mark.parametrize("inside", [False, True], ids=["entries", "prefixes"])
@pytest.mark.parametrize(
    ("trained", "copy"),
    [("base_encoder", "momentum_encoder"), ("swin", "ema"), ("mine", "teacher")],
)
def test_a_copy_is_not_taken_where_the_trained_network_has_a_name_of_its_own(
    state, trained, copy, inside
):
    other = {key: value + 1 for key, value in state.items()}
    content = {trained: state, copy: other, "epoch": 3, "rng": {"torch": torch.zeros(5)}}
    if inside:
        both = under(f"module.{trained}.", state) | under(f"module.{copy}.", other)
        content = {"state_dict": both | {"module.predictor.0.weight": torch.ones(2)}}
    for options in ({}, {"rule": "finetune"}):
        message = refused(content, **options)
        assert trained in message and copy in message and "MODEL.ENTRY" in message
    for entry, step in [(trained, 0), (copy, 1)]:
        weights = unwrap(content, entry=entry)
        assert torch.equal(weights["norm.weight"], state["norm.weight"] + step)


@pytest.mark.parametrize("inside", [False, True], ids=["entries", "prefixes"])
def test_between_student_and_teacher_the_user_chooses(state, inside, tmp_path):
    other = {key: value + 1 for key, value in state.items()}
    content = {"student": under("backbone.", state), "teacher": under("backbone.", other)}
    if inside:
        content = {"state_dict": under("student.", state) | under("teacher.", other)}
    message = refused(content)
    assert "student, teacher" in message and "MODEL.ENTRY" in message
    for entry, step in [("student", 0), ("teacher", 1)]:
        weights = unwrap(content, entry=entry)
        assert torch.equal(weights["norm.weight"], state["norm.weight"] + step)
    assert "did you mean 'teacher'" in refused(content, "techer")
    save_file(under("student.", state) | under("teacher.", other), tmp_path / "a.safetensors")
    weights = read_weights(tmp_path / "a.safetensors", "teacher")
    assert torch.equal(weights["norm.weight"], state["norm.weight"] + 1)


def test_several_networks_of_unusual_names_are_listed(state):
    assert "net_g, net_d" in refused({"net_g": state, "net_d": state})
    assert "model, net" in refused(under("model.", state) | under("net.", state))
    assert loaded({"net_g": state, "net_d": state}, "net_d").coverage == 1


def test_weights_of_unknown_names_are_not_said_to_lack_a_classifier(state):
    message = refused(under("body.", state), rule="finetune", head="evaluate")
    assert "classifier" not in message and "no key is one of this model's" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_no_familys_own_names_are_taken_for_wrappers(family):
    with torch.device("meta"):
        names = build_model(config_of(model_settings(family))).state_dict()
    assert list(unwrap(names)) == list(names)


# ---- mmpretrain


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The pixels of each 2 x 2 square as nn.Unfold gathers them: (B, H, W, C) -> (B, n, 4C)."""
    return F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)


def their_order(value: torch.Tensor) -> torch.Tensor:
    """The last axis (4C) as nn.Unfold orders it; found by unfolding its own numbers."""
    width = value.shape[-1] // 4
    order = torch.arange(4 * width).reshape(2, 2, width)  # (column, row, C): Swin's order
    places = gathered(order.transpose(0, 1)[None].float()).long().flatten()
    return value[..., places]


def their_names(state: dict) -> dict:
    """mmpretrain's state dict of the same network."""
    renamed = {}
    for key, value in state.items():
        if ".downsample." in key and ("reduction" in key or value.shape[-1] % 32 == 0):
            value = their_order(value) if value.shape[-1] == 32 else value
        key = key.replace("patch_embed.proj.", "patch_embed.projection.")
        key = key.replace("layers.", "stages.", 1).replace(".attn.", ".attn.w_msa.")
        key = key.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        key = "norm1." + key[5:] if key.startswith("norm.") else key
        renamed["head.fc." + key[5:] if key.startswith("head.") else f"backbone.{key}"] = value
    return renamed


def test_merging_by_unfold_is_swins_with_its_rows_in_another_order():
    x = torch.randn(1, 4, 4, 8)
    value = torch.randn(3, 32)
    assert torch.equal(swin_order(their_order(value)), value)
    merging = PatchMerging((4, 4), 8, norm_first=True)
    nn.init.normal_(merging.norm.weight)
    theirs = F.layer_norm(gathered(x), (32,), *map(their_order, merging.norm.parameters()))
    theirs = F.linear(theirs, their_order(merging.reduction.weight))
    ours = merging(x.flatten(1, 2)).flatten(1, -2)
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("family", [SwinTransformer, SwinTransformerV2], ids=["swin", "swinv2"])
def test_mmpretrains_names_load_exactly(family):
    model, other = randomise(family(**TINY)), family(**TINY)
    state = {"meta": {"epoch": 3}, "state_dict": their_names(model.state_dict())}
    report = load_weights(other, state, rule="exact")
    assert report.coverage == 1 and report.format == "openmmlab"
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(other.eval()(images), model(images))
