"""Loading into a model: Swin's rules (golden kind load), coverage, refusals that destroy
nothing.
"""

import logging

import pytest
import torch

from checkpoint import CheckpointError, load_weights, read_weights
from checkpoint.convert import is_rebuilt
from models.attention import AttentionSpec
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from tests.checkpoint.builders import SMALL, randomise
from tests.helpers import GOLDEN, golden, golden_names, subtree

FAMILIES = {"swin": SwinTransformer, "swinv2": SwinTransformerV2}
RULES = {
    "load_pretrained": {"rule": "finetune"},
    "simmim_load_pretrained": {"rule": "finetune", "resize": "geometric"},
    "simmim_resume": {"rule": "exact"},
}


def before_of(meta: dict, tensors: dict) -> dict:
    """The checkpoint of a golden; the 22k head is too large to be stored and follows a formula."""
    state = subtree(tensors, "before")
    if meta["name"] == "load_v1_22k_to_1k":
        rows, columns = torch.arange(21841.0), torch.arange(16.0)
        state |= {"head.bias": rows, "head.weight": rows[:, None] + columns / 32}
    return state


def expected_of(meta: dict, tensors: dict, state: dict) -> dict:
    initial = subtree(tensors, "target_init")
    return (
        {key: state[key] for key in meta["after_equals_before"]}
        | {key: initial[key] for key in meta["after_equals_target_init"]}
        | {key: tensors[f"after/{key}"] for key in meta["after_is_new"]}
    )


@pytest.mark.parametrize("name", golden_names("load_*"))
def test_loading_follows_the_references_rules(name):
    meta, tensors = golden(name)
    model = FAMILIES[meta["target_family"]](**meta["target_config"]).eval()
    model.load_state_dict(
        {k: v for k, v in subtree(tensors, "target_init").items() if not is_rebuilt(k)},
        strict=False,
    )
    state = before_of(meta, tensors)
    report = load_weights(model, {"model": state}, **RULES[meta["rule"]])
    after = model.state_dict()
    assert list(after) == meta["after_keys"] and report.coverage == 1
    for key, value in expected_of(meta, tensors, state).items():
        resized = key.endswith(
            ("relative_position_bias_table", "absolute_pos_embed", "relative_coords_table")
        )
        assert (
            torch.allclose(after[key], value, rtol=0, atol=1e-5)
            if resized
            else torch.equal(after[key], value)
        ), key
    with torch.no_grad():
        features = model.forward_features(tensors["input"])
        logits = model.head(features)
    # The 22k head's weights reach 2e4 and its products cancel, in another order on each processor.
    rounding = torch.finfo(torch.float32).eps * (features.abs() @ model.head.weight.abs().T)
    tolerance = (1e-4 if meta["target_family"] == "swinv2" else 2e-5) + rounding
    assert ((logits - tensors["logits_after"]).abs() <= tolerance).all()


def test_the_golden_checkpoint_file_gives_its_logits():
    meta, tensors = golden("checkpoint_file_v1")
    model = SwinTransformer(**meta["config"]).eval()
    report = load_weights(model, read_weights(GOLDEN / meta["file"]), rule="exact")
    assert report.coverage == 1 and report.format == "reference"
    with torch.no_grad():
        assert torch.allclose(model(tensors["input"]), tensors["logits"], rtol=0, atol=1e-5)


def build(family=SwinTransformer, modifiers=(), seed=0, **options):
    options = {**SMALL, "img_size": 32, "window_size": 4, **options}
    return randomise(family(**options, attention=AttentionSpec(modifiers=modifiers)), seed)


def stripped(model) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def refused(model, state, **options) -> str:
    """The one-line message of a refused load, which left every tensor of the model as it was."""
    before = stripped(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("rule", ["finetune", "exact"])
def test_a_models_own_weights_cover_it_and_buffers_are_not_counted(rule):
    source, model = build(seed=1), build(seed=2)
    report = load_weights(
        model, {k: v for k, v in stripped(source).items() if not is_rebuilt(k)}, rule=rule
    )
    assert report.coverage == 1 and set(report.loaded) == {
        name for name, _ in model.named_parameters()
    }
    assert (
        f"{sum(p.numel() for p in model.parameters()):,}" in report.text and "100 %" in report.text
    )
    assert all(
        torch.equal(p, q) for p, q in zip(source.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("rule", ["finetune", "exact"])
def test_a_missing_or_misspelt_key_is_refused_by_name(rule):
    state = stripped(build())
    state["layers.0.blocks.0.norm1.weigth"] = state.pop("layers.0.blocks.0.norm1.weight")
    message = refused(build(seed=1), state, rule=rule)
    assert "missing or of another shape: layers.0.blocks.0.norm1.weight;" in message
    assert "unexpected: layers.0.blocks.0.norm1.weigth" in message
    assert "MODEL.PARTIAL_LOAD" in message and "% of the parameters" in message


def test_partial_loading_is_possible_when_asked_for_and_is_a_warning(caplog):
    state = stripped(build())
    del state["norm.weight"]
    model = build(seed=1)
    with caplog.at_level(logging.INFO):
        report = load_weights(model, state, allow_partial=True, logger=logging.getLogger("test"))
    assert (
        report.missing == ["norm.weight"]
        and 0.9 < report.coverage < 1
        and torch.equal(model.head.weight, state["head.weight"])
    )
    assert caplog.records[-1].levelno == logging.WARNING and "missing: norm.weight" in caplog.text


def test_names_of_a_file_stay_in_one_short_line():
    message = refused(build(), {"two\nlines": torch.ones(1), "x" * 10**6: torch.ones(1)})
    assert r"'two\nlines'" in message and len(message) < 1000


def test_almost_all_is_not_called_all():
    state = stripped(build())
    del state["layers.0.blocks.0.norm1.bias"]
    text = load_weights(build(embed_dim=12), state, allow_partial=True).text
    assert "100 %" not in text and "(99." in text


def test_other_weights_in_the_file_are_mentioned():
    state = stripped(build())
    assert (
        "also has ema, to be chosen with MODEL.ENTRY"
        in load_weights(build(), {"model": state, "ema": state, "epoch": 1}).text
    )


def test_weights_with_nothing_in_common_are_refused_even_when_partial():
    assert "no key is one of this model's" in refused(
        build(), {"conv1.weight": torch.ones(2)}, allow_partial=True
    )


def test_a_file_of_the_other_version_is_called_by_its_name():
    assert "it holds SwinV2, the model is Swin" in refused(
        build(), stripped(build(SwinTransformerV2))
    )
    assert "it holds Swin, the model is SwinV2" in refused(
        build(SwinTransformerV2), stripped(build())
    )


def test_a_deeper_files_blocks_are_unexpected_not_ignored():
    assert "unexpected: layers.1.blocks.2." in refused(build(), stripped(build(depths=(2, 3))))


def test_exact_loading_refuses_another_shape_and_points_to_fine_tuning():
    message = refused(build(window_size=8), stripped(build()), rule="exact")
    assert "(file (49, 2), model (225, 2))" in message and "MODEL.PRETRAINED" in message
    assert "head.weight (file (7, 24), model (5, 24))" in refused(
        build(num_classes=5), stripped(build()), rule="exact"
    )
    headless = {
        key: value for key, value in stripped(build()).items() if not key.startswith("head.")
    }
    assert "head.weight" in refused(build(), headless, rule="exact")


def test_a_classifier_of_other_classes_is_not_called_missing_in_an_evaluation():
    message = refused(build(num_classes=5), stripped(build()), rule="exact", head="evaluate")
    assert "head.weight (file (7, 24), model (5, 24))" in message
    assert "other classes" in message and "no classifier" not in message


def test_a_head_of_another_class_count_starts_at_zero_and_says_so():
    model = build(num_classes=5)
    report = load_weights(model, stripped(build()))
    assert not model.head.weight.any() and not model.head.bias.any()
    assert (
        report.fresh == ["head.weight", "head.bias"]
        and report.coverage == 1
        and "7 classes, the model 5" in report.text
    )


def test_the_head_can_be_reset_or_insisted_on():
    model = build(seed=1)
    load_weights(model, stripped(build()), head="reset")
    assert not model.head.weight.any()
    assert "has 7 classes, the model 5" in refused(
        build(num_classes=5), stripped(build()), head="keep"
    )
    assert "auto, reset, keep" in refused(build(), stripped(build()), head="rest")


def test_headless_files_keep_the_models_head_and_headless_models_drop_the_files():
    source = stripped(build())
    headless = {key: value for key, value in source.items() if not key.startswith("head.")}
    model = build(seed=1)
    head = model.head.weight.clone()
    report = load_weights(model, headless)
    assert (
        torch.equal(model.head.weight, head) and "no head" in report.text and report.coverage == 1
    )
    assert load_weights(build(num_classes=0), source).coverage == 1


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "_orig_mod.", "module.encoder."])
def test_prefixes_are_removed(prefix):
    source, model = build(seed=1), build(seed=2)
    report = load_weights(model, {prefix + key: value for key, value in stripped(source).items()})
    assert report.coverage == 1 and torch.equal(model.norm.weight, source.norm.weight)


def test_a_compiled_model_loads_like_the_model_itself():
    source, model = build(seed=1), build(seed=2)
    load_weights(torch.compile(model), stripped(source))
    assert torch.equal(model.norm.weight, source.norm.weight)


@pytest.mark.parametrize("modifiers", [("crpw",), ("crpw(source=table)",)], ids=["mlp", "table"])
@pytest.mark.parametrize("family", [SwinTransformer, SwinTransformerV2], ids=["swin", "swinv2"])
def test_a_released_file_loads_into_a_model_with_modifiers_whose_own_parameters_keep_their_values(
    family, modifiers
):
    plain, model = (
        build(family),
        family(
            img_size=32, window_size=4, **SMALL, attention=AttentionSpec(modifiers=modifiers)
        ).eval(),
    )
    own = {
        key: value.clone()
        for key, value in model.state_dict().items()
        if ".modifiers." in key and not is_rebuilt(key)
    }
    report = load_weights(model, plain.state_dict())
    assert report.coverage == 1 and report.fresh == list(own) and "new to the file" in report.text
    assert all(torch.equal(model.state_dict()[key], value) for key, value in own.items())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # crpw starts at zero: fine-tuning begins at the released function
        assert torch.allclose(model(x), plain(x), rtol=0, atol=1e-5)


def test_the_whole_identity_recipe_starts_from_a_released_file():
    modifiers = ("qk_residual", "crpw")
    model = SwinTransformer(
        img_size=32,
        window_size=4,
        **SMALL,
        attention=AttentionSpec(modifiers=modifiers),
        pre_mlp="stem",
    )
    report = load_weights(model, build().state_dict())
    assert (
        {key.split(".")[0] for key in report.fresh} == {"layers", "pre_mlp"}
        and report.coverage == 1
        and "W - I" in report.text
    )


@pytest.mark.parametrize(
    "options",
    [{"pre_mlp": "stage"}, {"sw_mlp": "token_mix"}, {"pre_mlp": "stem", "sw_mlp": "shift"}],
    ids=str,
)
def test_mlps_that_no_released_file_has_keep_their_initial_values(options):
    model = SwinTransformer(img_size=32, window_size=4, **SMALL, **options)
    own = set(model.state_dict()) - set(build().state_dict())
    report = load_weights(model, build().state_dict())
    assert own and set(report.fresh) == own and report.coverage == 1


def test_a_modifiers_parameters_are_missing_when_the_file_has_some_of_them_or_the_rule_is_exact():
    state = stripped(build(modifiers=("crpw",)))
    del state["layers.0.blocks.1.attn.modifiers.crpw.mlp.0.bias"]
    assert "layers.0.blocks.1.attn.modifiers.crpw.mlp.0.bias" in refused(
        build(modifiers=("crpw",)), state
    )
    assert "crpw" in refused(build(modifiers=("crpw",)), build().state_dict(), rule="exact")
    assert "unexpected: layers.0.blocks.0.attn.modifiers.crpw" in refused(
        build(), stripped(build(modifiers=("crpw",)))
    )


def test_tables_of_crpw_resize_with_the_window():
    source, model = (
        build(modifiers=("crpw(source=table)",)),
        build(modifiers=("crpw(source=table)",), img_size=64, window_size=8, seed=1),
    )
    report = load_weights(model, source.state_dict())
    assert report.coverage == 1 and sum(key.endswith("crpw.table") for key in report.resized) == 4


def test_windows_that_are_not_square_resize_along_the_right_axis():
    source = build(img_size=(32, 64), window_size=(2, 4), depths=(2,), num_heads=(2,))
    table = torch.arange(7.0).expand(3, 7).reshape(21, 1).repeat(1, 2)  # varies along columns only
    state = stripped(source) | {"layers.0.blocks.0.attn.relative_position_bias_table": table}
    model = build(
        img_size=(32, 64), window_size=(4, 2), depths=(2,), num_heads=(2,), seed=1
    )  # as many offsets, 7 x 3
    load_weights(model, state)
    loaded = model.state_dict()["layers.0.blocks.0.attn.relative_position_bias_table"].reshape(
        7, 3, 2
    )
    assert torch.allclose(loaded, loaded[:1].expand(7, 3, 2), atol=1e-5) and bool(
        (loaded[0].diff(dim=0) > 0).all()
    )


def test_position_embeddings_resize_to_images_that_are_not_square():
    source = build(ape=True)
    model = build(ape=True, img_size=(32, 64), seed=1)
    report = load_weights(model, source.state_dict())
    ape = model.absolute_pos_embed.reshape(8, 16, 12)
    assert "absolute_pos_embed" in report.resized and torch.allclose(
        ape.mean(), source.absolute_pos_embed.mean(), atol=1e-2
    )


def test_one_channel_takes_the_sum_of_the_first_convolution():
    source, model = build(), build(in_chans=1, seed=1)
    load_weights(model, source.state_dict())
    grey = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(grey), source(grey.expand(1, 3, 32, 32)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "sizes", "warned"),
    [
        (8, (0, 0), True),
        (8, (4, 4), False),
        (2, (4, 4), False),
        (2, (0, 0), True),
        (4, (8, 8), True),
        (4, (0, 0), False),
        (4, (4, 4), False),
        ((4, 2), (4, 4), False),
    ],
)
def test_a_swinv2_window_change_without_the_pretrained_window_is_pointed_out(window, sizes, warned):
    released = build(SwinTransformerV2).state_dict()  # window 4
    options = dict(img_size=64, window_size=window, pretrained_window_sizes=sizes)
    model = build(SwinTransformerV2, **options)
    report = load_weights(model, released)
    said = [note for note in report.notes if "PRETRAINED_WINDOW_SIZES" in note]
    assert len(said) == warned and report.coverage == 1
    if not warned:
        load_weights(model, released, rule="exact")
        return
    assert "stage 0 to 4, stage 1 to 4" in said[0]
    assert "set it to these" in refused(model, released, rule="exact")


def test_a_file_of_windows_that_were_transferred_once_goes_on_so():
    fine_tuned = build(
        SwinTransformerV2, img_size=64, window_size=8, pretrained_window_sizes=(4, 4)
    ).state_dict()
    for sizes, agree in [((4, 4), True), ((0, 0), False), ((8, 8), False)]:
        model = build(SwinTransformerV2, img_size=64, window_size=8, pretrained_window_sizes=sizes)
        assert agree != any("stretched" in note for note in load_weights(model, fine_tuned).notes)


def test_half_precision_files_load_in_the_models_precision():
    model = build(seed=1)
    load_weights(
        model,
        {
            key: value.half() if value.is_floating_point() else value
            for key, value in stripped(build()).items()
        },
    )
    assert model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("option", [{"rule": "strict"}, {"resize": "linear"}])
def test_an_unknown_option_lists_the_allowed_ones(option):
    assert "choose from" in refused(build(), stripped(build()), **option)


def test_evaluation_refuses_a_head_that_is_not_the_file_s():
    assert "has 7 classes, the model 5" in refused(
        build(num_classes=5), stripped(build()), head="evaluate"
    )
    headless = {
        key: value for key, value in stripped(build()).items() if not key.startswith("head.")
    }
    assert "nothing to evaluate" in refused(build(), headless, head="evaluate")
