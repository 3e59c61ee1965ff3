"""Adapters of peft on every kind of layer: they act, learn, merge and come off again."""

import pytest
import torch

from models import evaluation
from models.attention import AttentionSpec
from tests.models.builders import randomise, small

peft = pytest.importorskip("peft")

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TARGETS = {
    "swin": ["qkv", "proj", "fc1", "fc2", "reduction", "head"],
    "swinv2": ["qkv", "attn.proj", "fc1", "fc2", "reduction", "cpb_mlp.0", "cpb_mlp.2"],
    "vit": ["qkv", "attn.proj", "fc1", "fc2"],
    "cait": ["qkv", "q", "k", "v", "fc1"],
    "swin_mlp": ["fc1", "reduction"],
    "timm": ["qkv", "fc1"],
}


def network(family: str) -> torch.nn.Module:
    options = {}
    if family not in ("swin_mlp", "timm"):
        modifier = "qk_residual" if family == "vit" else "qk_residual(drop_bias=True)"
        options["attention"] = AttentionSpec((modifier, "crpw"))
    return randomise(small(family, **options), 0.2).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IMAGES)


@pytest.mark.parametrize("target", [(family, one) for family in TARGETS for one in TARGETS[family]])
def test_adapters_on_each_kind_of_layer_change_the_output(target):
    family, layer = target
    config = peft.LoraConfig(r=4, target_modules=[layer], init_lora_weights=False)
    before = logits(network(family))
    after = logits(peft.get_peft_model(network(family), config).eval())
    assert (after - before).abs().max() > 2e-6 * before.abs().max()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_adapters_learn_merge_and_come_off(family, dora):
    plain = logits(network(family))
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS[family][:4], modules_to_save=["norm"], use_dora=dora
    )
    model = peft.get_peft_model(network(family), config)
    torch.testing.assert_close(logits(model.eval()), plain, rtol=1e-4, atol=1e-4)  # B starts at 0
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, fused=True)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    started = {name: p.detach().clone() for name, p in adapters.items()}
    for _ in range(3):
        model.train()(IMAGES).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name, p in adapters.items() if torch.equal(p, started[name])]
    model.eval()
    learned = logits(model)
    assert (learned - plain).abs().max() > 1e-3
    with evaluation(model):
        torch.testing.assert_close(logits(model), learned)
    model.merge_adapter()  # writes through .data
    torch.testing.assert_close(logits(model), learned, rtol=1e-3, atol=1e-3)
    with evaluation(model):
        torch.testing.assert_close(logits(model), learned, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), learned, rtol=1e-3, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), learned, rtol=1e-3, atol=1e-3)
    with evaluation(merged):
        torch.testing.assert_close(logits(merged), learned, rtol=1e-3, atol=1e-3)


SAVED = ["crpw", "qkv", "cpb_mlp", "attn", "blocks.0.mlp", "pre_mlp", "patch_embed", "downsample"]


@pytest.mark.parametrize("saved", SAVED)
def test_modules_that_are_saved_whole_learn(saved):
    attention = AttentionSpec(("qk_residual(drop_bias=True)", "crpw"))
    plain = randomise(small("swinv2", attention=attention, pre_mlp="stage"), 0.2)
    config = peft.LoraConfig(r=2, target_modules=["head"], modules_to_save=[saved])
    model = peft.get_peft_model(plain, config).eval()
    before = logits(model)
    # drop_bias leaves q_bias without effect
    parameters = [
        parameter
        for name, parameter in model.named_parameters()
        if f".{saved}.modules_to_save" in name and "q_bias" not in name
    ]
    model(IMAGES).square().sum().backward()
    assert parameters and all(p.grad is not None and p.grad.any() for p in parameters)
    with evaluation(model):
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.5)
        assert (logits(model) - before).abs().max() > 1e-4


def test_scalings_of_ia3_act_and_learn():
    config = peft.IA3Config(
        target_modules=["qkv", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False
    )
    before = logits(network("swinv2"))
    model = peft.get_peft_model(network("swinv2"), config).eval()
    assert (logits(model) - before).abs().max() > 1e-3
    model(IMAGES).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
