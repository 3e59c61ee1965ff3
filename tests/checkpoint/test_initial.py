"""Pretrained weights and modifiers: the model starts as the released function, and modifiers that
only set initial values are refused, or set them over the weights where that is asked for.
"""

import copy
from unittest.mock import patch

import pytest
import timm
import torch

from checkpoint import CheckpointError, load_weights
from config import load_config, notes
from models import build_model, timm_model
from models.attention import AttentionSpec
from models.attention.modifiers import MODIFIERS, ProjectionModifier
from models.build import ModelError
from settings.checks import check_settings
from settings.kinds import ConfigError
from tests.models.builders import randomise, small

TEXT = "vit_tiny_patch16_224(patch_size=8, embed_dim=16, depth=2, num_heads=2)"
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CONFIG = ["MODEL.TYPE", "timm", "MODEL.TIMM.MODEL", TEXT, "DATA.IMG_SIZE", 16]
CONFIG += ["MODEL.ATTENTION.MODIFIERS", ["init_identity"], "DATA.DATASET", "cifar10"]


@pytest.fixture(scope="module")
def released():
    """What stands for timm's released weights."""
    return randomise(timm_model(TEXT, 5, 16), std=0.2).eval()


@pytest.fixture
def fetched(released):
    """timm's download replaced: what asks for released weights gets those of `released`."""
    create = timm.create_model

    def create_model(name, pretrained=False, **options):
        net = create(name, pretrained=False, **options)
        if pretrained:
            net.load_state_dict(released.state_dict(), strict=options["num_classes"] == 5)
        return net

    with patch("timm.create_model", create_model):
        yield


def pretrained(*modifiers, **options):
    return timm_model(TEXT, 5, 16, pretrained=True, attention=AttentionSpec(modifiers), **options)


@pytest.mark.parametrize(
    "modifiers",
    [(), ("qk_residual",), ("qk_residual(which=k)", "crpw"), ("talking_heads", "qk_residual")],
)
def test_timms_released_weights_start_as_the_released_function_as_from_a_file(
    modifiers, released, fetched
):
    model = pretrained(*modifiers).eval()
    torch.testing.assert_close(model(IMAGES), released(IMAGES), rtol=1e-4, atol=1e-5)
    loaded = timm_model(TEXT, 5, 16, attention=AttentionSpec(modifiers))
    load_weights(loaded, released.state_dict())
    for key, value in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_lost_bias_is_told_and_the_head_begins_anew_where_asked(fetched, caplog):
    model = pretrained("qk_residual(drop_bias=True)", head_reset=True)
    assert "ignores q and k biases" in caplog.text
    assert not any(parameter.any() for parameter in model.head.parameters())


def set_by_data(attention):
    attention.qkv.weight.data.fill_(0.5)


@torch.no_grad()
def set_in_place(attention):
    attention.proj.bias.fill_(0.5)


@pytest.fixture(params=[None, set_by_data, set_in_place])
def only_initial(request, monkeypatch):
    """The name of a modifier that only sets initial values: ours, or one of somebody else."""
    if request.param is None:
        return "init_identity"

    class Own(ProjectionModifier):
        def initialise(self, attention):
            request.param(attention)

    monkeypatch.setitem(MODIFIERS._entries, "own_start", Own)
    return "own_start"


def assert_refused(error, name):
    text = str(error.value)
    assert name in text and "INIT_OVER_PRETRAINED" in text and "\n" not in text


def test_initial_values_and_pretrained_weights_together_are_refused(only_initial, fetched):
    with pytest.raises(ValueError) as error:
        pretrained(only_initial)
    assert_refused(error, only_initial)
    plain = randomise(small("vit"))
    model = small("vit", attention=AttentionSpec((only_initial, "crpw")))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as error:
        load_weights(model, plain.state_dict())
    assert_refused(error, only_initial)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_initial_values_are_set_over_pretrained_weights_where_asked(
    only_initial, fetched, released
):
    models = [pretrained(only_initial, init_over=True)]
    models.append(timm_model(TEXT, 5, 16, attention=AttentionSpec((only_initial,))))
    fresh = models[1].state_dict()
    fresh = {key: value.clone() for key, value in fresh.items()}
    report = load_weights(models[1], released.state_dict(), init_over=True)
    assert f"{only_initial} then set its initial values" in report.text
    key = "blocks.0.attn.qkv.weight"
    if only_initial == "own_start" and (fresh[key] != 0.5).any():
        key = "blocks.0.attn.proj.bias"
    rows = slice(32 if only_initial == "init_identity" else None)
    for model in models:
        state = model.state_dict()
        assert torch.equal(state[key][rows], fresh[key][rows])
        untouched = [name for name in state if not name.endswith(key.split(".", 2)[2])]
        for name in untouched:
            assert torch.equal(state[name], released.state_dict()[name]), name


def test_a_run_that_goes_on_or_is_evaluated_has_the_weights_of_its_file():
    trained = randomise(small("vit", attention=AttentionSpec(("init_identity",))))
    for options in (
        {"rule": "exact"},
        {"head": "evaluate"},
        {"head": "evaluate", "init_over": True},
    ):
        model = small("vit", attention=AttentionSpec(("init_identity",)))
        load_weights(model, trained.state_dict(), **options)
        for key, value in model.state_dict().items():
            assert torch.equal(value, trained.state_dict()[key])


@pytest.mark.parametrize("more", [["MODEL.TIMM.PRETRAINED", True], ["MODEL.PRETRAINED", "x.pth"]])
def test_settings_that_ask_for_both_are_refused_before_anything_is_read(more):
    with pytest.raises((ConfigError, ModelError, CheckpointError)) as error:
        check_settings(load_config(None, CONFIG + more))
    assert_refused(error, "init_identity")
    check_settings(load_config(None, [*CONFIG, *more, "MODEL.INIT_OVER_PRETRAINED", True]))
    evaluated = [*CONFIG, *more, "EVAL_MODE", True, "MODEL.RESUME", "y.pth"]
    check_settings(load_config(None, evaluated))


def test_consent_to_set_initial_values_arrives_at_timm(fetched, released):
    config = load_config(
        None, [*CONFIG, "MODEL.TIMM.PRETRAINED", True, "MODEL.INIT_OVER_PRETRAINED", True]
    )
    model = build_model(config, 5)
    eye = torch.eye(16).repeat(2, 1)
    assert torch.equal(model.blocks[0].attn.qkv.weight[:32], eye)
    assert torch.equal(model.pos_embed, released.pos_embed)


def test_an_initial_scale_that_pretrained_weights_replace_is_told():
    start = ["MODEL.TYPE", "swinv2", "MODEL.ATTENTION.LOGIT_SCALE_INIT", 5.0]
    assert notes(load_config(None, start)) == []
    (note,) = notes(load_config(None, [*start, "MODEL.PRETRAINED", "x.pth"]))
    assert "LOGIT_SCALE_INIT 5 has no effect on scales that MODEL.PRETRAINED brings" in note
