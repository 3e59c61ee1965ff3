"""A family's constructor has the defaults of the config: a model built without arguments is the one
that MODEL.TYPE alone describes.
"""

import dataclasses
import inspect

import pytest

from config import load_config
from models import BACKBONES, timm_models
from models.attention import AttentionSpec
from models.base.pyramid import PyramidOptions, PyramidTransformer

# Arguments that no key sets: attn_drop_rate is AttentionSpec.drop under Swin's name, the others are
# Swin's, for callers.
NO_KEY = {"attn_drop_rate", "fused_window_process", "norm_layer"}


class Recorded(Exception):
    """Ends a constructor before it builds anything."""


def constructor_of(family):
    """Where a family's constructor is: an object and a name."""
    return (timm_models, "timm_model") if family == "timm" else (BACKBONES[family], "__init__")


def defaults_of(family, constructor) -> dict:
    parameters = inspect.signature(constructor).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    if issubclass(BACKBONES[family], PyramidTransformer):  # takes further options by name
        options = dataclasses.fields(PyramidOptions)
        found |= {o.name: o.default for o in options if o.default is not dataclasses.MISSING}
    if family == "swin_mlp":
        del found["sw_mlp"]  # refused
    return found


def plain(value):
    """Lists for tuples; None as the attention it stands for."""
    if isinstance(value, tuple):
        return list(value)
    return AttentionSpec() if value is None else value


@pytest.mark.parametrize("family", BACKBONES.names())
def test_the_defaults_of_the_config_and_of_the_constructor_agree(family, monkeypatch):
    place, name = constructor_of(family)
    constructor = getattr(place, name)
    given = {}

    def record(*args, **kwargs):
        given.update(inspect.signature(constructor).bind(*args, **kwargs).arguments)
        given.update(given.pop("others", {}))
        raise Recorded

    monkeypatch.setattr(place, name, record)
    with pytest.raises(Recorded):
        BACKBONES[family].from_config(load_config(None, ["MODEL.TYPE", family]), 1000)
    defaults = defaults_of(family, constructor)
    assert defaults.keys() - given.keys() <= NO_KEY, "arguments without a key"
    for argument in defaults.keys() & given.keys():
        assert plain(given[argument]) == plain(defaults[argument]), argument
