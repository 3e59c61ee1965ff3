"""The models against vectors of the Swin repository and of the original identity-sharpened
models.
"""

import hashlib
import re

import pytest
import torch

from checkpoint import load_weights
from models import SwinTransformer, SwinTransformerV2
from models.attention import AttentionSpec
from models.attention.geometry import relative_coords_table
from tests.helpers import golden, golden_names, subtree
from tests.models.builders import FAMILIES

CASES = [name for pattern in ("v1_*", "v2_*", "mlp_*") for name in golden_names(pattern)]
# logits (absolute), features, input gradient, parameter gradients (relative to the largest entry)
TOLERANCE = {
    "swin": (1e-5, 1e-5, 2e-5, 5e-5),
    "swin_mlp": (1e-5, 1e-5, 2e-5, 5e-5),
    "swinv2": (5e-5, 4e-4, 3e-3, 4e-3),
}


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def record_features(model, names):
    features, handles = {}, []
    for name in names:
        if name != "pooled":
            module = model.get_submodule(name)
            handles.append(
                module.register_forward_hook(
                    lambda _m, _i, out, name=name: features.__setitem__(name, out.detach())
                )
            )
    return features, handles


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_are_the_reference_s(name):
    meta, tensors = golden(name)
    model = FAMILIES[meta["family"]](**meta["config"])
    assert list(model.state_dict()) == meta["state_dict_keys"]
    model.load_state_dict(subtree(tensors, "state_dict"), strict=True)
    model.train(meta["mode"] == "train")
    logits_tolerance, feature_tolerance, input_tolerance, gradient_tolerance = TOLERANCE[
        meta["family"]
    ]

    expected = subtree(tensors, "feature")
    features, handles = record_features(model, expected)
    images = tensors["input"].clone().requires_grad_()
    logits = model(images)
    (logits * tensors["loss_weight"]).sum().backward()
    for handle in handles:
        handle.remove()
    features["pooled"] = model.forward_features(tensors["input"]).detach()

    assert (logits - tensors["logits"]).abs().max() <= logits_tolerance
    for key, value in expected.items():
        assert relative(features[key], value) <= feature_tolerance, key
    assert relative(images.grad, tensors["input_grad"]) <= input_tolerance
    for key, parameter in model.named_parameters():
        theirs = tensors[f"grad/{key}"]
        if theirs.abs().max() > 1e-6:
            assert relative(parameter.grad, theirs) <= gradient_tolerance, key


@pytest.mark.parametrize("name", CASES)
def test_counts_blocks_and_rates_are_the_reference_s(name):
    meta, _ = golden(name)
    model = FAMILIES[meta["family"]](**meta["config"])
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    assert model.flops() == meta["flops"]
    blocks = [
        [
            {
                "input_resolution": list(b.input_resolution),
                "window_size": b.window_size,
                "shift_size": b.shift_size,
            }
            for b in layer.blocks
        ]
        for layer in model.layers
    ]
    assert blocks == meta["blocks"]
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0)
        for layer in model.layers
        for block in layer.blocks
    ]
    assert rates == pytest.approx(meta["drop_path_rates"], rel=1e-6)
    assert model.no_weight_decay() == set(meta["no_weight_decay"])
    assert model.no_weight_decay_keywords() == set(meta["no_weight_decay_keywords"])


def test_float64_logits_are_the_reference_s():
    meta, tensors = golden("v1_shift")
    model = SwinTransformer(**meta["config"])
    model.load_state_dict(subtree(tensors, "state_dict"))
    logits = model.double().eval()(tensors["input"].double())
    assert (logits - tensors["logits_float64"]).abs().max() <= 1e-7


def test_coordinate_tables_are_the_reference_s():
    meta, tensors = golden("windows")
    for case in meta["relative_coords_table"]:
        side, pretrained = case["window_size"], case["pretrained_window_size"]
        expected = tensors[f"relative_coords_table/{side}_{pretrained}"]
        assert (relative_coords_table(side, pretrained) - expected).abs().max() <= 1e-6


def test_default_initial_values_are_the_reference_s():
    meta, _ = golden("default_init")
    for entry in meta["models"]:
        torch.manual_seed(1)
        parameters = dict(FAMILIES[entry["family"]](**entry["config"]).named_parameters())
        assert set(parameters) == set(entry["parameters"])
        for name, value in parameters.items():
            expected = entry["parameters"][name]
            if "constant" in expected:
                assert torch.allclose(
                    value, torch.full_like(value, expected["constant"]), atol=1e-6
                ), name
            elif expected["n"] >= 64:
                assert value.std().item() == pytest.approx(expected["std"], rel=0.35), name
                assert (
                    abs(value.mean().item()) <= 5 * expected["std"] / expected["n"] ** 0.5 + 1e-6
                ), name


def key_line(name, tensor):
    return f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def digests(lines):
    """SHA-256 of the lines with the dtype written short and long."""
    forms = lines, [re.sub(r" (\w+)$", r" torch.\1", line) for line in lines]
    return {hashlib.sha256("\n".join(form).encode()).hexdigest() for form in forms}


def test_every_named_configuration_has_the_reference_s_state_dict():
    meta, _ = golden("zoo")
    checked = 0
    for entry in meta["models"]:
        if entry["simmim_pretrain"]:
            continue  # masked image modelling has no model here
        with torch.device("meta"):  # shapes alone
            model = FAMILIES[entry["family"]](**entry["model"])
        lines = sorted(key_line(*item) for item in model.state_dict().items())
        assert len(lines) == entry["num_keys"], entry["yaml"]
        assert sum(p.numel() for p in model.parameters()) == entry["num_params"], entry["yaml"]
        assert model.flops() == entry["flops"], entry["yaml"]
        assert entry["keys_sha256"] in digests(lines), entry["yaml"]
        checked += 1
    assert checked >= 31


@pytest.mark.parametrize("name", golden_names("identity_*"))
def test_the_original_identity_sharpened_models_give_the_same_logits_and_gradients(name):
    meta, tensors = golden(name)
    options = dict(meta["config"])
    pre_mlp, family = options.pop("pre_mlp", False), meta["family"]
    if family == "swin":
        model = SwinTransformer(
            **options,
            attention=AttentionSpec(("qk_residual", "crpw(source=table)")),
            pre_mlp="stem",
            pre_mlp_ratio=options.get("mlp_ratio", 4.0),
        )
    else:
        model = SwinTransformerV2(
            **options,
            attention=AttentionSpec(("qk_residual", "crpw"), bias_sigmoid=False),
            pre_mlp="stage" if pre_mlp else "off",
            pre_mlp_ratio=options.get("mlp_ratio", 4.0),
        )
    load_weights(model, subtree(tensors, "state_dict"), rule="exact")
    model.eval()
    images = tensors["input"].clone().requires_grad_()
    logits = model(images)
    (logits * tensors["loss_weight"]).sum().backward()
    assert (logits - tensors["logits"]).abs().max() <= 1e-5
    assert relative(images.grad, tensors["input_grad"]) <= 5e-5
    theirs = {
        key: value for key, value in subtree(tensors, "grad").items() if value.abs().max() > 1e-6
    }
    ours = {key: p.grad for key, p in model.named_parameters()}
    for key, value in theirs.items():
        mine = ours.get(key, ours.get(renamed(key, family)))
        assert mine is not None, key
        assert relative(mine, value) <= 5e-5, key


def renamed(key, family):
    key = key.replace("attn.rp_affine.relative_position_weight_table", "attn.modifiers.crpw.table")
    key = key.replace(
        "attn.rp_affine.relative_position_bias_table", "attn.relative_position_bias_table"
    )
    key = key.replace("attn.cpw_mlp", "attn.modifiers.crpw.mlp")
    return re.sub(r"(^|\.)pre_(norm|mlp)\.", lambda m: f"{m[1]}pre_mlp.{m[2]}.", key)
