"""branch_gain, and where the blocks of all families let the branch of attention be edited."""

import pytest
import torch
from torch import nn

from models.attention import AttentionSpec
from models.attention.modifiers import MODIFIERS, BranchModifier
from models.base.attention_block import check_blocks
from models.timm_models import exchange_attention, timm_model
from optimizer import decay_rule
from tests.models.builders import modified, randomise, small

from .blocks import compare_stage, each_case

IMAGES = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
FORMS = {
    "swin": {},
    "swinv2": {},
    "vit": {"layer_scale": 0.5},
    "cait": {},
    "pit": {},
    "t2t": {"modified": "blocks"},
    "refined_vit": {"share_every": 1},
    "timm": {},
}
ADDED = {"swin": "norm2", "swinv2": "mlp"}  # whose input is the stream with the branch


def pair(family, text):
    """A plain model and one with the modifier, of the same random parameters."""
    plain = randomise(small(family, **FORMS[family]))
    edited = small(family, **FORMS[family], attention=AttentionSpec((text,)))
    edited.load_state_dict(plain.state_dict(), strict=False)
    return plain, edited


@pytest.mark.parametrize("family", FORMS)
def test_a_gain_of_1_is_the_plain_model(family):
    plain, edited = pair(family, "branch_gain")
    assert torch.equal(edited(IMAGES), plain(IMAGES))
    by_channel = pair(family, "branch_gain(kind=channel)")[1]
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(IMAGES)
        assert torch.equal(edited(IMAGES), expected)
        assert torch.equal(by_channel(IMAGES), expected)


@pytest.mark.parametrize("family", FORMS)
def test_a_gain_of_0_removes_the_module_and_its_first_gradient(family):
    plain, edited = pair(family, "branch_gain(init=0)")
    attentions = [
        name for name, module in edited.named_modules() if len(getattr(module, "modifiers", ()))
    ]
    for name in attentions:
        block = plain.get_submodule(name.rpartition(".")[0])
        last = block.norm1 if family == "swinv2" else block.attn.proj
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    logits = edited(IMAGES)
    torch.testing.assert_close(logits, plain(IMAGES), rtol=0, atol=1e-6)
    logits.square().sum().backward()
    for name in attentions:
        attention = edited.get_submodule(name)
        assert attention.modifiers["branch_gain"].g.grad.abs().max() > 0
        assert not attention.proj.weight.grad.any()


@each_case
def test_is_its_formula(case):
    def gained(attention, o, stream):
        return o * attention.modifiers["branch_gain"].g

    compare_stage(case, "branch_gain(kind=channel)", branch=gained)


def test_gains_are_not_decayed():
    model = small("swin", attention=AttentionSpec(("branch_gain(kind=channel, init=1e-5)",)))
    decays = decay_rule(model)
    gains = {name: p for name, p in model.named_parameters() if name.endswith(".g")}
    assert {tuple(p.shape) for p in gains.values()} == {(8,), (16,)}
    assert all(p.unique().tolist() == [pytest.approx(1e-5)] for p in gains.values())
    assert not any(decays(name, p) for name, p in gains.items())


class Probe(BranchModifier):
    """2 o + 1, and what it was given."""

    def forward(self, o, stream):
        self.given = o, stream
        return 2 * o + 1


class Nothing(nn.Module):
    def forward(self, x):
        return 0 * x


@pytest.mark.parametrize("family", [family for family in FORMS if family != "timm"])
def test_what_is_edited_is_what_the_block_adds_before_stochastic_depth(family, monkeypatch):
    monkeypatch.setitem(MODIFIERS._entries, "probe", Probe)
    plain, edited = pair(family, "probe")
    seen = {}
    for name, model in (("plain", plain), ("edited", edited)):
        block = next(module for module in model.modules() if hasattr(module, "edited"))
        block.get_submodule(ADDED.get(family, "norm2")).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
        model(IMAGES)
    o, stream = block.attn.modifiers["probe"].given
    torch.testing.assert_close(seen["plain"], stream + o)
    torch.testing.assert_close(seen["edited"], stream + 2 * o + 1)
    block.drop_path = Nothing()
    edited(IMAGES)
    assert torch.equal(seen["edited"], stream)


def test_attention_that_was_replaced_does_not_lose_its_edit_in_silence():
    model = modified("swin", "branch_gain")
    block = model.layers[0].blocks[0]
    attention = block.attn

    class Wrapper(nn.Module):
        def __init__(self, with_branch):
            super().__init__()
            self.inner = attention
            if with_branch:
                self.on_branch = attention.on_branch

        def forward(self, x, layout):
            return self.inner(x, layout)

    expected = model(IMAGES)
    block.attn = Wrapper(True)
    assert torch.equal(model(IMAGES), expected)
    block.attn = Wrapper(False)
    with pytest.raises(ValueError, match=r"Wrapper .* on_branch.*branch_gain.* would be lost"):
        model(IMAGES)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("t2t", {}, "MODEL.T2T.MODIFIED blocks"),
        ("t2t", {"modified": "blocks", "preset": "release"}, "PRESET paper"),
        ("refined_vit", {}, "SHARE_EVERY 1"),
    ],
)
def test_blocks_that_do_not_add_the_branch_alone_refuse_it(family, options, reason):
    with pytest.raises(ValueError, match=f"branch_gain edits .*{reason}"):
        small(family, **options, attention=AttentionSpec(("branch_gain",)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", "init_values=0.5, class_token=True"),
        pytest.param("beit_base_patch16_224", "init_values=0.5", marks=pytest.mark.slow),
        pytest.param("cait_xxs24_224", "init_values=0.5", marks=pytest.mark.slow),
    ],
)
def test_a_gain_in_timms_pre_norm_blocks_is_that_of_the_branch(name, options):
    """Two gains are the layer scale of timm twice as large."""
    text = f"{name}(patch_size=4, embed_dim=16, depth=2, num_heads=2, {options})"
    plain, edited = (
        timm_model(text, 5, 16, attention=AttentionSpec(modifiers), drop_path_rate=0.0)
        for modifiers in ((), ("branch_gain(init=2)",))
    )
    randomise(plain)
    edited.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for key, value in plain.named_parameters():
            if key.startswith("blocks.") and key.endswith(("ls1.gamma", "gamma_1")):
                value *= 2
    torch.testing.assert_close(edited(IMAGES), plain(IMAGES))


def test_timms_other_blocks_refuse_it():
    from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock, VisionTransformer

    for block in (ResPostBlock, ParallelThingsBlock):
        net = VisionTransformer(16, 4, embed_dim=8, depth=1, num_heads=2, block_fn=block)
        exchange_attention(net, "vit", AttentionSpec(("branch_gain",)))
        with pytest.raises(ValueError, match="branch_gain edits .* does not let it do"):
            check_blocks(net)
