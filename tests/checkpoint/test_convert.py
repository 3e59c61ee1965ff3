"""Other implementations' weights compute the same function here."""

import functools

import pytest
import torch

from checkpoint import (
    CheckpointError,
    detect,
    from_identity,
    from_timm,
    from_torchvision,
    load_weights,
    map_22k_to_1k,
    synsets_22k,
    to_reference,
)
from checkpoint.convert import SOURCES, source
from models.attention import AttentionSpec
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from tests.checkpoint.builders import SMALL, randomise
from tests.helpers import golden, golden_names, subtree


def difference(theirs: torch.nn.Module, ours: torch.nn.Module, size: int, batch: int = 2) -> float:
    """Largest difference of logits after loading their weights into our model, relative to the
    largest logit if that is above 1.
    """
    report = load_weights(ours, theirs.state_dict(), rule="exact")
    assert report.coverage == 1 and not report.missing and not report.unexpected
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 1e-2
        return float((ours.eval()(x) - expected).abs().max() / expected.abs().max().clamp_min(1))


def timm_model(version: int, **options):
    pytest.importorskip("timm")
    from timm.models.swin_transformer import SwinTransformer as V1
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as V2

    return randomise((V1 if version == 1 else V2)(**options))


@pytest.mark.parametrize("size, window", [(32, 4), (48, 3)])
def test_timm_swin_computes_the_same(size, window):
    options = dict(img_size=size, window_size=window, **SMALL)
    assert difference(timm_model(1, **options), SwinTransformer(**options), size) <= 1e-5


@pytest.mark.parametrize("size, window, pretrained", [(32, 4, 0), (48, 6, 4)])
def test_timm_swinv2_computes_the_same(size, window, pretrained):
    options = dict(
        img_size=size, window_size=window, pretrained_window_sizes=(pretrained,) * 2, **SMALL
    )
    assert difference(timm_model(2, **options), SwinTransformerV2(**options), size) <= 1e-4


@pytest.mark.parametrize(
    "name, ours, size, window",
    [
        ("swin_tiny_patch4_window7_224", SwinTransformer, 224, 7),
        ("swinv2_tiny_window8_256", SwinTransformerV2, 256, 8),
        ("swinv2_tiny_window16_256", SwinTransformerV2, 256, 16),
    ],
)
def test_timms_full_size_models_compute_the_same(name, ours, size, window):
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model(name, pretrained=False))
    model = ours(
        img_size=size,
        window_size=window,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
    )
    assert difference(theirs, model, size, batch=1) <= 1e-4


def torchvision_model(version: int, size: int, window: int, **options):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    v2 = (
        {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        if version == 2
        else {}
    )
    return randomise(
        swin.SwinTransformer(
            patch_size=[4, 4],
            window_size=[window, window],
            embed_dim=options["embed_dim"],
            depths=list(options["depths"]),
            num_heads=list(options["num_heads"]),
            num_classes=options["num_classes"],
            **v2,
        )
    )


@pytest.mark.parametrize(
    "version, ours", [(1, SwinTransformer), (2, SwinTransformerV2)], ids=["v1", "v2"]
)
@pytest.mark.parametrize("size, window", [(32, 4), (48, 3)])
def test_torchvision_computes_the_same(version, ours, size, window):
    theirs = torchvision_model(version, size, window, **SMALL)
    assert difference(theirs, ours(img_size=size, window_size=window, **SMALL), size) <= 1e-4


@pytest.mark.parametrize(
    "name, ours, size, window",
    [("swin_t", SwinTransformer, 224, 7), ("swin_v2_t", SwinTransformerV2, 256, 8)],
)
def test_torchvisions_full_size_models_compute_the_same(name, ours, size, window):
    zoo = pytest.importorskip("torchvision.models")
    model = ours(
        img_size=size,
        window_size=window,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
    )
    assert difference(randomise(getattr(zoo, name)()), model, size, batch=1) <= 1e-4


def test_a_headless_timm_file_is_still_recognised():
    state = {
        key: value
        for key, value in timm_model(1, img_size=32, window_size=4, **SMALL).state_dict().items()
        if "head" not in key
    }
    assert detect(state)[0] == "timm"
    report = load_weights(SwinTransformer(img_size=32, window_size=4, **SMALL), state)
    assert report.fresh == ["head.weight", "head.bias"] and report.coverage == 1


@functools.cache
def plain() -> dict:
    return dict(SwinTransformer(img_size=32, window_size=4, **SMALL).state_dict())


@pytest.mark.parametrize(
    "convert, old", [(from_timm, timm_model), (from_torchvision, None)], ids=["timm", "torchvision"]
)
def test_converters_give_exactly_the_references_keys_and_leave_their_input_alone(convert, old):
    theirs = (
        timm_model(1, img_size=32, window_size=4, **SMALL)
        if old
        else torchvision_model(1, 32, 4, **SMALL)
    )
    state = theirs.state_dict()
    before = list(state)
    assert set(convert(state)) == {
        key for key in plain() if "index" not in key and "attn_mask" not in key
    }
    assert list(state) == before


def test_the_references_own_names_pass_unchanged():
    state, steps = to_reference(plain())
    assert steps == [] and list(state) == list(plain()) and detect(state)[0] == "reference"


def test_unknown_names_are_called_unknown():
    assert detect({"stem.conv.weight": torch.ones(1)}) == (
        "unknown",
        "no key of a Swin model, e.g. 'stem.conv.weight'",
    )


def test_two_keys_that_become_one_are_refused():
    state = {"head.fc.weight": torch.ones(1), "head.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match="head.weight"):
        from_timm(state)


def identity_model(meta: dict) -> torch.nn.Module:
    config = dict(meta["config"])
    if meta["family"] == "swin":
        spec = AttentionSpec(modifiers=("qk_residual", "crpw(source=table)"))
        return SwinTransformer(
            **config, attention=spec, pre_mlp="stem", pre_mlp_ratio=config.get("mlp_ratio", 4.0)
        )
    where = "stage" if config.pop("pre_mlp", False) else "off"
    spec = AttentionSpec(modifiers=("qk_residual", "crpw"), bias_sigmoid=False)
    return SwinTransformerV2(
        **config, attention=spec, pre_mlp=where, pre_mlp_ratio=config.get("mlp_ratio", 4.0)
    )


@pytest.mark.parametrize("rule", ["exact", "finetune"])
@pytest.mark.parametrize("name", golden_names("identity_*"))
def test_the_original_identity_sharpened_models_load_and_give_their_logits(name, rule):
    meta, tensors = golden(name)
    model = identity_model(meta).eval()
    report = load_weights(model, subtree(tensors, "state_dict"), rule=rule)
    assert report.coverage == 1 and not report.fresh and report.format == "identity"
    assert sum(parameter.numel() for parameter in model.parameters()) == meta["num_params"]
    with torch.no_grad():
        assert torch.allclose(model(tensors["input"]), tensors["logits"], rtol=0, atol=1e-5)


def test_a_residual_that_is_not_the_identity_is_refused():
    eye = torch.cat((torch.eye(4), torch.eye(4), torch.zeros(4, 4)))
    key = "layers.0.blocks.0.attn.qk_weight_residual"
    assert from_identity({key: eye}) == {} and from_identity({key: eye.T.contiguous()}) == {}
    with pytest.raises(CheckpointError, match="not the constant"):
        from_identity({key: 2 * eye})


def test_the_map_from_22k_to_1k_has_the_known_exception():
    mapped = map_22k_to_1k()
    names = synsets_22k()
    assert len(mapped) == len(set(mapped)) == 1000 and len(names) == 21841
    assert mapped[850] == 5564 and names[5564] == "n03013580" and names[mapped[0]] == "n01440764"
    assert names[9205] == "n15102455" and names[15027] == "n15102894"


def test_another_source_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))

    @source("upper", r"^HEAD\.", "'{key}' is in capitals")
    def from_upper(state):
        """Names in capitals."""
        return {key.lower(): value for key, value in state.items()}

    state, steps = to_reference({"HEAD.WEIGHT": torch.ones(2)})
    assert list(state) == ["head.weight"]
    assert steps == [("upper", "'HEAD.WEIGHT' is in capitals")]


def test_every_source_says_in_its_docstring_what_it_converts():
    assert SOURCES.names() == [
        "huggingface",
        "identity",
        "openmmlab",
        "rpe_mlp",
        "simmim",
        "swiftformer",
        "timm",
        "torchvision",
    ]
    assert all(len(SOURCES[name].convert.__doc__) > 20 for name in SOURCES)


def test_an_encoder_with_early_names_is_converted_to_the_end():
    state = {"encoder.layers.0.blocks.0.attn.rpe_mlp.0.bias": torch.ones(2)}
    converted, steps = to_reference(state)
    assert list(converted) == ["layers.0.blocks.0.attn.cpb_mlp.0.bias"]
    assert [name for name, _ in steps] == ["simmim"]
