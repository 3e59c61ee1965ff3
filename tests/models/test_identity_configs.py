"""The configs that claim to be the original: what their weights are drawn from."""

import pytest
import torch

from config import load_config
from models.attention import Geometry
from models.attention.modifiers import MODIFIERS
from tests.helpers import ROOT

EXPERIMENTS = ROOT / "configs" / "identity" / "experiments"


def drawn_crpw(config):
    """The CRPW of a config at the size of a first stage, with its initial values."""
    text = next(text for text in config.MODEL.ATTENTION.MODIFIERS if text.startswith("crpw"))
    torch.manual_seed(0)
    crpw = MODIFIERS.create(text, Geometry(96, 3, (8, 8)))
    crpw.initialise(torch.nn.Module())
    return crpw


@pytest.mark.parametrize(
    ("name", "std", "decays"),
    [
        ("swinv2_tiny_original", 2e-4, False),
        ("swin_tiny_qkres_crpw_table_premlp", 1e-4, True),
        ("swin_tiny_qkres_crpw_sigmoid16", 0.02, False),
    ],
)
def test_every_layer_of_the_original_crpw_is_drawn_with_its_standard_deviation(name, std, decays):
    crpw = drawn_crpw(load_config(EXPERIMENTS / f"{name}.yaml"))
    weights = [p for p in crpw.parameters() if p.dim() > 1]
    for weight in weights:
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    for bias in (p for p in crpw.parameters() if p.dim() == 1):
        assert not bias.any()
    assert (crpw.no_weight_decay() == set()) == decays
