"""Plain weights and those of a model with qk_residual turn into each other, and are never mistaken
silently.
"""

import subprocess
import sys

import pytest
import torch

from checkpoint import (
    CheckpointError,
    from_qk_residual,
    load_weights,
    model_residual,
    read_weights,
    save_weights,
    to_qk_residual,
    unwrap,
    weights_metadata,
)
from checkpoint.residual import SOURCES, modifiers_residual
from config import KEYS
from models.attention import AttentionSpec
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from tests.checkpoint.builders import SMALL, randomise
from tests.helpers import ROOT

FAMILIES = pytest.mark.parametrize(
    "family", [SwinTransformer, SwinTransformerV2], ids=["swin", "swinv2"]
)
SIDES = pytest.mark.parametrize("which", ["both", "q", "k"])
BARE = pytest.mark.parametrize("rule", ["finetune", "exact"])


def build(family=SwinTransformer, *modifiers: str, **options):
    return randomise(
        family(
            img_size=32,
            window_size=4,
            **SMALL,
            attention=AttentionSpec(modifiers=modifiers),
            **options,
        )
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)))


def stripped(model) -> dict:
    """Tensors alone: no module names, no metadata."""
    return {key: value.clone() for key, value in model.state_dict().items()}


@FAMILIES
@SIDES
def test_plain_weights_load_into_a_residual_model_as_the_same_function(family, which):
    plain, residual = build(family), build(family, f"qk_residual(which={which})")
    report = load_weights(residual, plain.state_dict())
    assert torch.allclose(logits(residual), logits(plain), rtol=0, atol=1e-5)
    assert any("W - I" in note for note in report.notes) and report.coverage == 1


@FAMILIES
@SIDES
def test_residual_weights_load_into_a_plain_model_as_the_same_function(family, which):
    plain, residual = build(family), build(family, f"qk_residual(which={which})")
    expected = logits(residual)
    report = load_weights(plain, stripped(residual), source_residual=which)
    assert torch.allclose(logits(plain), expected, rtol=0, atol=1e-5) and any(
        "W + I" in note for note in report.notes
    )


@SIDES
def test_there_and_back_is_the_identity(which):
    state = stripped(build())
    back = from_qk_residual(to_qk_residual(state, which), which)
    assert all(torch.allclose(back[key], state[key], rtol=0, atol=1e-7) for key in state)
    changed = [
        key for key in state if not torch.equal(to_qk_residual(state, which)[key], state[key])
    ]
    assert changed and all(key.endswith("attn.qkv.weight") for key in changed)


def test_only_the_named_rows_change_and_half_precision_is_widened():
    key = "layers.0.blocks.0.attn.qkv.weight"
    state = {
        key: torch.zeros(6, 2, dtype=torch.float16),
        "head.weight": torch.zeros(2, 2, dtype=torch.float16),
    }
    converted = to_qk_residual(state, "k")
    assert torch.equal(
        converted[key], torch.tensor([[0.0, 0], [0, 0], [-1, 0], [0, -1], [0, 0], [0, 0]])
    )
    assert converted["head.weight"].dtype == torch.float16 and not state[key].any()


def test_one_sided_residuals_turn_into_each_other():
    source, target = (
        build(SwinTransformer, "qk_residual(which=q)"),
        build(SwinTransformer, "qk_residual(which=k)"),
    )
    expected = logits(source)
    load_weights(target, stripped(source), source_residual="q")
    assert torch.allclose(logits(target), expected, rtol=0, atol=1e-5)


@BARE
@pytest.mark.parametrize("way", ["state_dict", "pth", "safetensors", "config", "bare pth"])
def test_weights_of_a_residual_model_are_never_converted_twice(tmp_path, way, rule):
    model, again = build(SwinTransformer, "qk_residual"), build(SwinTransformer, "qk_residual")
    expected = logits(model)
    if way == "state_dict":
        weights = model.state_dict()
    elif way == "config":
        weights = {
            "model": stripped(model),
            "config": {"MODEL": {"ATTENTION": {"MODIFIERS": ["qk_residual", "crpw"]}}},
        }
    elif way == "bare pth":
        torch.save(model.state_dict(), tmp_path / "a.pth")
        weights = read_weights(tmp_path / "a.pth")
    else:
        weights = read_weights(
            save_weights(tmp_path / f"a.{way}", stripped(model), weights_metadata(model))
        )
    randomise(again, 5)
    report = load_weights(again, weights, rule=rule)
    assert torch.equal(logits(again), expected) and not any("W " in note for note in report.notes)


@BARE
def test_recorded_names_turn_residual_weights_into_plain_ones(rule):
    model, plain = build(SwinTransformer, "qk_residual"), build()
    expected = logits(model)
    load_weights(plain, model.state_dict(), rule=rule)
    assert torch.allclose(logits(plain), expected, rtol=0, atol=1e-5)


def test_unmarked_released_weights_are_taken_as_plain_for_fine_tuning_and_said_so():
    model, plain = build(SwinTransformer, "qk_residual"), build()
    report = load_weights(model, stripped(plain))
    assert any("does not say" in note for note in report.notes) and torch.allclose(
        logits(model), logits(plain), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "rule, modifiers", [("exact", ["qk_residual"]), ("finetune", ["qk_residual", "crpw"])]
)
def test_where_a_guess_could_be_wrong_the_loader_asks(rule, modifiers):
    model = build(SwinTransformer, *modifiers)
    before = stripped(model)
    with pytest.raises(CheckpointError, match="source_residual"):
        load_weights(model, stripped(model), rule=rule)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    load_weights(model, before, rule=rule, source_residual="qk_residual")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "modifiers, side",
    [
        ([], "none"),
        (["crpw"], "none"),
        (["qk_residual"], "both"),
        (["qk_residual(which=q)"], "q"),
        (["crpw", "qk_residual(which='k')"], "k"),
        (["qk_residual(which=qk, drop_bias=True)"], "both"),
        (["init_identity"], "none"),
    ],
)
def test_the_stored_config_tells_the_side(modifiers, side):
    assert modifiers_residual(modifiers) == side
    if modifiers:
        assert model_residual(build(SwinTransformer, *modifiers)) == side


def test_the_references_own_config_means_plain():
    weights = unwrap({"model": stripped(build()), "config": {"MODEL": {"TYPE": "swin"}}})
    report = load_weights(build(SwinTransformer, "qk_residual"), weights, rule="exact")
    assert any("W - I" in note for note in report.notes)


def test_dropped_biases_are_reported_as_a_change_of_function():
    report = load_weights(
        build(SwinTransformer, "qk_residual(drop_bias=True)"), build().state_dict()
    )
    assert any("not the same" in note for note in report.notes)


def test_an_unknown_side_lists_the_allowed_ones():
    with pytest.raises(CheckpointError, match="both, q, k, none"):
        to_qk_residual({}, "v")


def test_the_setting_offers_what_the_loader_takes():
    assert tuple(KEYS["MODEL.SOURCE"].kind.choices) == SOURCES


def run_tool(*argv) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *map(str, argv)]
    return subprocess.run(command, text=True, capture_output=True, check=False)


def test_the_command_line_tool_converts_and_refuses_to_overwrite(tmp_path):
    model, residual = build(), build(SwinTransformer, "qk_residual")
    torch.save({"model": model.state_dict()}, tmp_path / "in.pth")
    done = run_tool(tmp_path / "in.pth", tmp_path / "out.safetensors", "--to", "qk_residual")
    assert done.returncode == 0 and "W - I" in done.stdout
    load_weights(residual, read_weights(tmp_path / "out.safetensors"), rule="exact")
    assert torch.allclose(logits(residual), logits(model), rtol=0, atol=1e-5)
    again = run_tool(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert again.returncode == 2 and "--force" in again.stderr and again.stderr.count("\n") == 1


def test_the_tool_turns_its_own_output_back_without_being_told(tmp_path):
    from tools.convert_checkpoint import main

    state = stripped(build())
    save_weights(tmp_path / "a.pth", state)
    assert (
        main(
            [
                str(tmp_path / "a.pth"),
                str(tmp_path / "b.pth"),
                "--to",
                "qk_residual",
                "--which",
                "q",
            ]
        )
        == 0
    )
    assert main([str(tmp_path / "b.pth"), str(tmp_path / "c.safetensors"), "--to", "plain"]) == 0
    back = read_weights(tmp_path / "c.safetensors")
    assert all(torch.allclose(back[key], value, rtol=0, atol=1e-7) for key, value in state.items())
    assert main([str(tmp_path / "missing.pth"), str(tmp_path / "d.pth")]) == 2
