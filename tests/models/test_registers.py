"""Registers of ViT: learned tokens that attend, have no position and are dropped at the end."""

import pytest
import timm
import torch
from torch import nn

from checkpoint import CheckpointError, load_weights
from models import VisionTransformer
from models.attention import AttentionSpec
from optimizer import decay_rule
from tests.models.builders import randomise, small
from tests.models.family.blocks import Stage, by_formula
from tests.models.family.dense import EXACT, distance

FORMS = {"class_token": {}, "mean": dict(class_token=False, pool="mean")}
each_form = pytest.mark.parametrize("form", FORMS)


def images(side=16, seed=5):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def vit(form="class_token", registers=3, **options):
    return small("vit", registers=registers, **FORMS[form], **options)


@each_form
def test_no_registers_are_the_plain_model_and_some_leave_its_initial_weights(form):
    models = []
    for options in ({}, dict(registers=0), dict(registers=3)):
        torch.manual_seed(0)
        models.append(small("vit", **FORMS[form], **options))
        models[-1].after = torch.rand(3)
    plain, none, some = models
    assert plain.state_dict().keys() == none.state_dict().keys()
    assert torch.equal(plain(images()), none(images()))
    assert {"reg_token"} == some.state_dict().keys() - plain.state_dict().keys()
    assert some.reg_token.shape == (1, 3, 8)
    assert 0 < some.reg_token.abs().max() < 1e-5
    assert torch.equal(some.after, plain.after)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, some.state_dict()[key]), key


@each_form
def test_are_tokens_without_a_position_that_the_head_does_not_see(form):
    model = randomise(vit(form, attention=AttentionSpec(("branch_gain",)))).double()
    x = images().double()

    def written_down():
        tokens = model.patch_embed(x)
        if form == "class_token":
            tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], 1) + model.pos_embed
            parts = [tokens[:, :1], model.reg_token.expand(2, -1, -1), tokens[:, 1:]]
        else:
            parts = [model.reg_token.expand(2, -1, -1), tokens + model.pos_embed]
        tokens = torch.cat(parts, 1)
        part = Stage(model.blocks, model.blocks, None, tokens.shape[1])
        tokens = by_formula(part, tokens, branch=lambda a, o, s: o * a.modifiers["branch_gain"].g)
        if form == "class_token":
            return model.head(model.norm(tokens)[:, 0])
        return model.head(model.fc_norm(tokens[:, 3:].mean(1)))

    found = []
    for logits in (model(x), written_down()):
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append([logits.detach(), *gradients])
    for name, ours, expected in zip(["logits", *dict(model.named_parameters())], *found):
        assert distance(ours, expected) <= EXACT, name


def test_are_not_decayed_count_as_tokens_and_are_as_deep_as_the_embedding():
    model, plain = vit(), small("vit")
    assert not decay_rule(model)("reg_token", model.reg_token)
    assert "reg_token" in model.layer_groups()[0]
    blocks = [sum(block.flops(n) for block in model.blocks) for n in (17, 20)]
    assert model.flops() - plain.flops() == blocks[1] - blocks[0]


@each_form
@pytest.mark.parametrize("rule", ["finetune", "exact"])
@pytest.mark.parametrize("covers", [False, True], ids=["patches_alone", "all_tokens"])
def test_timm_s_weights_give_timm_s_logits(form, rule, covers):
    """Whether timm's position embedding covers the patches alone, or class token and registers."""
    theirs = timm.models.VisionTransformer(
        16,
        4,
        num_classes=10,
        embed_dim=8,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        class_token=form == "class_token",
        global_pool="token" if form == "class_token" else "avg",
        reg_tokens=3,
        no_embed_class=not covers,
    )
    randomise(theirs).eval()
    ours = vit(form).eval()
    load_weights(ours, theirs.state_dict(), rule=rule)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("covers", [False, True], ids=["patches_alone", "all_tokens"])
def test_timm_s_weights_of_another_size_are_resized_as_ours(covers):
    ours = randomise(vit())
    state = dict(ours.state_dict())
    if covers:
        positions = state["pos_embed"]
        state["pos_embed"] = torch.cat([positions[:, :1], torch.ones(1, 3, 8), positions[:, 1:]], 1)
        state["reg_token"] = state["reg_token"] - 1
    else:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    larger, expected = (vit(img_size=32).eval() for _ in range(2))
    load_weights(larger, state)
    load_weights(expected, ours.state_dict())
    torch.testing.assert_close(larger(images(32)), expected(images(32)))
    assert torch.equal(expected.reg_token, ours.reg_token)


def test_released_weights_load_and_the_log_says_that_registers_are_new():
    released = randomise(small("vit")).state_dict()
    model = vit()
    start = model.reg_token.clone()
    report = load_weights(model, released)
    assert report.fresh == ["reg_token"]
    assert "24 more are new to the file: reg_token" in report.text
    assert torch.equal(model.reg_token, start)
    with pytest.raises(CheckpointError, match="missing or of another shape: reg_token"):
        load_weights(model, released, rule="exact")


def test_other_registers_or_none_are_refused():
    state = vit().state_dict()
    with pytest.raises(CheckpointError, match="unexpected: reg_token"):
        load_weights(small("vit"), state)
    with pytest.raises(CheckpointError, match=r"reg_token \(file \(1, 3, 8\), model \(1, 2, 8\)\)"):
        load_weights(vit(registers=2), state)
    with pytest.raises(ValueError, match="at least 0"):
        VisionTransformer(16, 4, registers=-1)
    with pytest.raises(ValueError, match="REGISTERS 0"):
        vit("mean", attention=AttentionSpec(mixer="local"))


def test_register_tokens_meet_every_place_of_a_class_token():
    """Tables over offsets leave them alone; a value residual and a gain take them as any token."""
    spec = AttentionSpec(("crpw", "value_residual", "branch_gain(kind=channel)"))
    model = randomise(vit(attention=spec))
    assert model.blocks[0].attn.geometry.prefix == 4
    model(images()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert isinstance(model.norm, nn.LayerNorm)
