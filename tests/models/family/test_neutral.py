"""Against the plain model: at its neutral value every arm is it, bit for bit, whole models of Swin
and ViT; and equal seeds give equal other weights.
"""

import functools

import pytest
import torch

from models.attention.modifiers import MODIFIERS
from tests.models.builders import EVERYWHERE, modified, randomise, small

NEUTRAL = [
    "affine",
    "self_mix",
    "shaped",
    "value_skipinit",
    "attn_scale",
    "exclusive(a=0.0)",
    "exclusive(a=learned)",
    "self_bias",
    "self_weight",
    "head_temperature",
    "value_residual",
    "neutreno(strength=0.0)",
    "gate",
    "gate(kind=element)",
    "branch_gain",
    "branch_gain(kind=channel)",
    "sink(init=-30.0)",
]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@functools.cache
def plain_model(family):
    return randomise(small(family))


@pytest.mark.parametrize("text", NEUTRAL)
def test_a_neutral_arm_is_the_plain_model_bit_for_bit(text):
    for family in ("swin", "vit"):
        plain = plain_model(family)
        arm = modified(family, text)
        arm.load_state_dict(plain.state_dict(), strict=False)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                assert torch.equal(arm(IMAGES), plain(IMAGES)), (family, dtype)


# What initialisers set.
OWN = ("attn.qkv.weight", "attn.proj.weight", "attn.relative_position_bias_table")


def test_with_one_seed_an_arm_leaves_every_other_initial_weight_as_it_was():
    def drawn(*texts):
        torch.manual_seed(3)
        model = modified("swin", *texts)
        return {**model.state_dict(), "next number": torch.rand(1)}

    plain = drawn()
    for arm in ["gate(init=paper)", "gpsa", *sorted(set(MODIFIERS.names()) - set(EVERYWHERE))]:
        found = drawn(arm)
        sets = arm in ("mimetic", "orthogonal", "impulse_bias")
        for name, value in plain.items():
            if not (sets and name.endswith(OWN)):
                assert torch.equal(found[name], value), (arm, name)
