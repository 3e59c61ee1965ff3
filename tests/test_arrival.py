"""Every setting arrives: another value changes what is built or done, or one line refuses it."""

from unittest.mock import patch

import pytest

from models import build_model
from tests.arrival import FAMILIES, arrival_in_model, config_of, model_keys, model_settings

# Settings that are accepted and do nothing, to be honoured or refused.
IGNORED: dict[str, set[str]] = {}
ELSEWHERE = {"MODEL.TIMM.PRETRAINED": "fetches weights; the test below answers for the network"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_a_model_changes_what_it_computes_or_is_refused(family):
    cache: dict = {}
    found = {
        key: arrival_in_model(family, key, cache)
        for key in model_keys(family)
        if key not in ELSEWHERE
    }
    lost = {key: said for key, said in found.items() if said not in ("arrives", "refused")}
    assert lost.keys() == IGNORED.get(family, set()), lost


def test_released_weights_are_asked_for_by_name():
    settings = model_settings("timm") | {"MODEL.TIMM.PRETRAINED": True}
    asked = {}

    def refuse(name, **options):
        asked.update(options)
        raise RuntimeError("no network here")

    with patch("timm.create_model", refuse), pytest.raises(Exception, match="no network here"):
        build_model(config_of(settings))
    assert asked["pretrained"] is True
