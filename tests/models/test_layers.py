"""What users put in place of a layer, hook, prune, parametrise or quantise is what computes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from models import SasaResNet, SwiftFormer, evaluation, timm_model
from models.attention import AttentionSpec
from models.attention.report import describe_attention
from tests.models.builders import FAMILIES, randomise, small

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)
SPEC = AttentionSpec(("qk_residual", "crpw"))
OPEN = AttentionSpec(("qk_residual", "talking_heads", "re_attention"))
TIMM = "(patch_size=4, embed_dim=8, depth=1, num_heads=2)"
SASA = dict(num_classes=10, width=8, depths=(1, 1), num_heads=2, kernel_size=3, stem_heads=2)
SWIFT = dict(num_classes=10, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), layer_scale=0.1)
MODELS = {
    **{family: lambda family=family: small(family) for family in FAMILIES},
    "swin, sharpened": lambda: small("swin", attention=SPEC, pre_mlp="stage"),
    "swinv2, sharpened": lambda: small("swinv2", attention=SPEC, pre_mlp="stem"),
    "swin, open": lambda: small("swin", attention=OPEN),
    "swin, additive": lambda: small("swin", attention=AttentionSpec(mixer="efficient_additive")),
    "swin, separable": lambda: small("swin", attention=AttentionSpec(mixer="separable")),
    "swin, local": lambda: small("swin", attention=AttentionSpec(mixer="local(kernel_size=3)")),
    "vit, sharpened": lambda: small("vit", attention=AttentionSpec(("qk_residual",))),
    "timm's beit": lambda: timm_model("beit_base_patch16_224" + TIMM, 10, 16),
    "timm's cait": lambda: timm_model("cait_xxs24_224" + TIMM, 10, 16),
    "sasa, stem": lambda: SasaResNet(16, stem="attention", **SASA),
    "sasa": lambda: SasaResNet(16, stem="small", **SASA),
    "swiftformer": lambda: SwiftFormer(16, **SWIFT),
}


class Gained(nn.Module):
    """Calls a layer, adds something learned to what it returns, and counts."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.layer(x)
        return y + self.gain * y.sin()  # no norm takes this away


def logits(model, images=IMAGES):
    with torch.no_grad():
        return model(images)


def leaves(model, kinds=nn.Module):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not any(True for _ in module.children())
    }


def replace(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_that_is_replaced_is_called_and_what_it_returns_is_used(name):
    torch.manual_seed(0)
    model = randomise(MODELS[name](), 0.2, seed=3).eval()
    wrappers = {}
    for path, layer in leaves(model, LAYERS).items():
        wrappers[path] = Gained(layer)
        replace(model, path, wrappers[path])
    (model(IMAGES) * torch.randn(2, 10)).sum().backward()
    assert not [path for path, wrapper in wrappers.items() if not wrapper.gain.grad], "unused"
    for wrapper in wrappers.values():
        wrapper.calls = 0
    with evaluation(model):
        logits(model), logits(model)
    assert not [path for path, wrapper in wrappers.items() if wrapper.calls < 2], "not called"


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_every_leaf_fire_each_time_inside_an_evaluation_too(name):
    model, fired = MODELS[name]().eval(), []
    for path, module in leaves(model).items():
        if type(module).forward is not nn.Module.forward:
            module.register_forward_hook(lambda *_, path=path: fired.append(("hook", path)))
            module.register_forward_pre_hook(lambda *_, path=path: fired.append(("pre", path)))
    with evaluation(model):
        logits(model)
        fired.clear()
        logits(model)
    missing = [
        path
        for path, module in leaves(model).items()
        if module._forward_hooks and not {("hook", path), ("pre", path)} <= set(fired)
    ]
    assert not missing


def sharpened(family, modifier="qk_residual"):
    attention = AttentionSpec((modifier, "crpw"))
    return randomise(small(family, attention=attention, pre_mlp="stage"), 0.2)


def linears(model):
    return {name: layer for name, layer in leaves(model).items() if type(layer) is nn.Linear}


class Called(nn.Module):
    """Calls a layer; its bias can be found, as in adapters."""

    def __init__(self, layer, fired):
        super().__init__()
        self.layer = layer
        self.fired = fired

    bias = property(lambda self: self.layer.bias)

    def forward(self, x):
        self.fired.append(None)
        return self.layer(x)


def wrapped(model):
    model.fired = []
    for name, layer in linears(model).items():
        replace(model, name, Called(layer, model.fired))


def hooked(model):
    """The output that a hook has seen must stay as it was."""
    model.fired = []
    for layer in linears(model).values():
        layer.register_forward_hook(lambda m, x, y: model.fired.append((y, y.detach().clone())))


def hooked_backward(model):
    model.fired = []
    for layer in linears(model).values():
        layer.register_full_backward_hook(lambda *_: model.fired.append(None))
        layer.register_full_backward_pre_hook(lambda *_: None)


def own_forward(model):
    model.fired = []
    for layer in linears(model).values():
        layer.forward = lambda x, layer=layer: (
            model.fired.append(None) or nn.Linear.forward(layer, x)
        )


def parametrised(model):
    for layer in linears(model).values():
        parametrize.register_parametrization(layer, "weight", nn.Identity())


def normed(model):
    for layer in linears(model).values():
        parametrizations.weight_norm(layer)


def functional(model):
    """An untouched copy whose parameters another function gives."""
    values = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    inner = copy.deepcopy(model)
    model.forward = lambda x: torch.func.functional_call(inner, values, x)


FOREIGN = [wrapped, hooked, hooked_backward, own_forward, parametrised, normed, functional]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # cpb_mlp's input has none
@pytest.mark.parametrize("change", FOREIGN)
@pytest.mark.parametrize(
    "family, options", [("swin", ""), ("swin", "(drop_bias=True)"), ("swinv2", "(drop_bias=True)")]
)
def test_layers_that_are_called_give_the_values_and_gradients_of_plain_ones(
    family, options, change
):
    attention = AttentionSpec((f"qk_residual{options}", "crpw"))
    model = randomise(small(family, attention=attention, depths=(1, 1)), 0.2).eval()
    other = copy.deepcopy(model)
    change(other)
    for module in (model, other):
        module(IMAGES).square().sum().backward()
    fired = len(other.fired) if hasattr(other, "fired") else len(linears(model))
    assert fired >= len(linears(model))
    before = logits(model)
    with evaluation(other):
        for _ in range(2):
            torch.testing.assert_close(logits(other), before, rtol=1e-4, atol=1e-5)
    if change not in (parametrised, normed, functional):
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4, msg=name)
    if change is hooked:
        assert all(torch.equal(y, copied) for y, copied in other.fired)


def test_a_layer_in_place_of_qkv_whose_bias_is_hidden_is_refused_only_where_it_matters():
    for modifier in ("qk_residual", "qk_residual(drop_bias=True)"):
        model = randomise(small("swin", attention=AttentionSpec((modifier,)))).eval()
        attention = model.layers[0].blocks[0].attn
        before = logits(model)
        attention.qkv = nn.Sequential(attention.qkv)
        if "drop" in modifier:
            with pytest.raises(ValueError, match="Sequential in its place has no attribute `bias`"):
                model(IMAGES)
        else:
            torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("inside", [False, True])
def test_a_bias_of_qkv_is_added_to_swinv2_s_own(inside):
    model = randomise(small("swinv2"), 0.2).eval()
    attention = model.layers[0].blocks[0].attn
    old, before = attention.qkv, logits(model)
    attention.qkv = nn.Linear(8, 24)
    attention.qkv.load_state_dict({"weight": old.weight, "bias": torch.ones(24)})
    with evaluation(*[model] * inside):
        plain = logits(model)
        attention.qkv = nn.Sequential(attention.qkv)
        torch.testing.assert_close(logits(model), plain)
    assert (plain - before).abs().max() > 1e-4


def test_hooks_of_all_modules_see_every_layer_while_they_are_there():
    model, seen = sharpened("swin").eval(), []
    with evaluation(model):
        before = logits(model)
        for register in (
            nn.modules.module.register_module_forward_hook,
            nn.modules.module.register_module_forward_pre_hook,
        ):
            handle = register(lambda module, *_: seen.append(module))
            try:
                torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
            finally:
                handle.remove()
            assert set(leaves(model, LAYERS).values()) <= set(seen)
            seen.clear()
        logits(model)
    assert not seen


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_pruned_layers_train_and_stay_pruned(family):
    model = sharpened(family)
    attention = model.layers[0].blocks[0].attn
    for layer in linears(model).values():
        prune.l1_unstructured(layer, "weight", amount=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, fused=True)
    for _ in range(3):
        model.train()(IMAGES).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model.eval())
    for layer in linears(model).values():
        prune.remove(layer, "weight")
    assert (attention.qkv.weight == 0).float().mean() == 0.5
    with evaluation(model):
        torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-5)


def test_a_pruned_bias_table_and_parametrised_biases_are_read_each_time():
    swin, swinv2 = sharpened("swin").eval(), sharpened("swinv2").eval()
    attention = swin.layers[0].blocks[0].attn
    prune.l1_unstructured(attention, "relative_position_bias_table", amount=0.5)
    for name in ("q_bias", "logit_scale"):
        parametrize.register_parametrization(
            swinv2.layers[0].blocks[0].attn, name, nn.Identity(), unsafe=True
        )
    for model in (swin, swinv2):
        with evaluation(model):
            before = logits(model)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "_orig" in name or "original" in name:
                        parameter.mul_(3)
            assert (logits(model) - before).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "name", ["swin, sharpened", "swinv2, sharpened", "vit", "cait", "pit", "t2t"]
)
def test_dynamic_quantization_reaches_every_linear_layer(name):
    quantization = pytest.importorskip("torch.ao.quantization")
    if torch.backends.quantized.engine == "none":
        pytest.skip("this PyTorch has no quantized products")
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    count = len(linears(model))
    small_model = quantization.quantize_dynamic(model, {nn.Linear})
    assert sum("quantized" in type(m).__module__ for m in small_model.modules()) >= count
    assert not linears(small_model) and describe_attention(small_model)
    assert small_model.flops() == model.flops()
    with evaluation(small_model):
        found = logits(small_model)
    right = logits(model)
    assert 0 < (found - right).norm() < 0.1 * right.norm()


def test_dropout_left_on_by_itself_is_applied():
    model = small("swin", drop_rate=0.5).eval()
    drops = [m for name, m in model.named_modules() if name.endswith("mlp.drop")]
    with evaluation(model):
        assert torch.equal(logits(model), logits(model))
        for drop in drops:
            drop.train()
        assert not torch.equal(logits(model), logits(model))


def test_a_tap_that_is_replaced_or_hooked_in_any_way_opens_the_attention():
    model = small("swin").eval()
    attention = model.layers[0].blocks[0].attn
    before = logits(model)
    attention.map_tap = nn.Dropout(0.0)
    assert attention.is_open()
    attention.map_tap = Gained(nn.Identity())
    assert not torch.equal(logits(model), before) and attention.map_tap.calls == 1
    attention.map_tap = nn.Identity()
    assert not attention.is_open()
    seen = []
    attention.logit_tap.register_forward_pre_hook(lambda *_: seen.append(1))
    logits(model)
    assert seen == [1]


def test_a_module_in_place_of_a_modifier_or_a_part_of_one_is_refused_not_left_out():
    for place in ("crpw", "talking_heads.pre"):
        model = small("swin", attention=AttentionSpec((place.partition(".")[0],)))
        modifiers = model.layers[0].blocks[0].attn.modifiers
        replace(modifiers, place, nn.Sequential(modifiers.get_submodule(place)))
        with pytest.raises(ValueError, match="Sequential in place of an attention modifier"):
            model(IMAGES)
