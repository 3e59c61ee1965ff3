"""Where the heads' results are edited, in every family and in timm's models: behind all that makes
the map, in front of what the form does before its projection.
"""

import copy
from functools import partial

import pytest
import torch

from kernels.window_attention import Epilogue
from kernels.window_attention.reference import merge_windows
from models.attention import AttentionSpec, GlobalAttention
from models.attention.geometry import Geometry
from models.attention.modifiers import MODIFIERS, OutputModifier
from models.attention.report import why_not_fused
from models.attention.shared_map import MapAttention
from models.attention.softmax import SoftmaxAttention
from tests.models.builders import ATTENTION_FAMILIES, randomise, small
from tests.models.test_timm_models import MODELS, SIZE, ours

TIMM = ("vit", "vit with registers", "vit with normed q and k", "vit with normed results")
TIMM += ("deit distilled", "beit", "cait")
QUICK = ("vit with normed results",)
# no shared map, and none that a hook would hand on
ALONE = {"refined_vit": {"share_every": 1, "carry": False}}


class Probe(OutputModifier):
    """y <- 2 y + 3 v; keeps what it was given."""

    reads = ("lse", "qkv")

    def forward(self, y, v, x, layout, lse, qkv):
        self.given = y, v, x, layout, lse, qkv
        return 2 * y + 3 * v


class Ending(OutputModifier):
    """y <- 2 y + 3 v, by the kernel where nobody looks."""

    calls = 0

    def forward(self, y, v, x, layout):
        self.calls += 1
        return 2 * y + 3 * v

    def epilogue(self):
        heads = self.geometry.num_heads
        return Epilogue(torch.full((heads,), 3.0), torch.full((heads,), 2.0))


def places() -> list:
    """Models of every family and of timm, with their images' size."""
    builds = {f: partial(small, f, **ALONE.get(f, {})) for f in ATTENTION_FAMILIES}
    found = [pytest.param(build, (16, 16), id=family) for family, build in builds.items()]
    for name in TIMM:
        marks = () if name in QUICK else pytest.mark.slow
        build = partial(ours, MODELS[name])
        found.append(pytest.param(build, SIZE, id=f"timm {name}", marks=marks))
    return found


def attentions(model):
    return [module for module in model.modules() if isinstance(module, SoftmaxAttention)]


@pytest.mark.parametrize(("build", "side"), places())
def test_an_edit_of_y_and_v_is_that_of_the_map(build, side):
    """2 y + 3 v against the map 2 A + 3 I, which a hook of the last tap makes."""
    model = randomise(build(), std=0.2).eval()
    other = copy.deepcopy(model)
    images = torch.randn(2, 3, *side)
    plain = model(images)
    logits = []
    for attention, mapped in zip(attentions(model), attentions(other), strict=True):
        attention.modifiers["probe"] = Probe(attention.geometry)
        mapped.logit_tap.register_forward_hook(lambda module, args, out: logits.append(out))
        mapped.map_tap.register_forward_hook(
            lambda module, args, out: 2 * out + 3 * torch.eye(out.shape[-1])
        )
    edited, expected = model(images), other(images)
    torch.testing.assert_close(edited, expected, rtol=1e-3, atol=1e-4)
    assert (edited - plain).abs().max() > 10 * (edited - expected).abs().max()
    for attention, row in zip(attentions(model), logits, strict=True):
        y, v, x, layout, lse, qkv = attention.modifiers["probe"].given
        assert y.shape == v.shape == (*x.shape[:-1], attention.geometry.inner)
        assert torch.equal(v, qkv[..., -v.shape[-1] :])
        wanted = merge_windows(row.logsumexp(-1, keepdim=True), layout)
        torch.testing.assert_close(lse, wanted, rtol=1e-3, atol=1e-3)


def test_an_epilogue_bypasses_no_hook_no_wrapper_and_no_subclass():
    def attention():
        torch.manual_seed(0)
        module = GlobalAttention(Geometry(16, 2, (3, 4)), AttentionSpec())
        module.modifiers["ending"] = Ending(module.geometry)
        return module, module.modifiers["ending"]

    def zero(module, args, output):
        return 0 * output

    x = torch.randn(2, 12, 16)
    module, ending = attention()
    expected = module(x)
    assert ending.calls == 0

    handle = ending.register_forward_pre_hook(lambda module, args: None)
    torch.testing.assert_close(module(x), expected)
    assert ending.calls == 1
    handle.remove()

    handle = ending.register_forward_hook(zero)
    torch.testing.assert_close(module(x), module.proj.bias.expand(2, 12, -1))
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: zero(module, args, output) if module is ending else None
    )
    torch.testing.assert_close(module(x), module.proj.bias.expand(2, 12, -1))
    handle.remove()

    ending.forward = lambda y, v, x, layout: 0 * y
    torch.testing.assert_close(module(x), module.proj.bias.expand(2, 12, -1))

    class Silent(Ending):
        def forward(self, y, v, x, layout):
            return 0 * y

    module, _ = attention()
    module.modifiers["ending"] = Silent(module.geometry)
    torch.testing.assert_close(module(x), module.proj.bias.expand(2, 12, -1))


def test_what_does_not_say_what_it_changes_is_refused_in_place_of_a_modifier():
    module = GlobalAttention(Geometry(16, 2, (3, 4)), AttentionSpec(("sink",)))
    module.modifiers["sink"] = torch.nn.Sequential(module.modifiers["sink"])
    with pytest.raises(ValueError, match="Sequential in place of an attention modifier"):
        module(torch.randn(2, 12, 16))


def test_blocks_that_share_a_map_refuse_edits_of_the_heads():
    with pytest.raises(ValueError, match="Sink changes what the heads give.*SHARE_EVERY 1"):
        small("refined_vit", attention=AttentionSpec(("sink",)))


def test_an_attention_that_hands_its_map_on_edits_what_the_carried_map_gave_too():
    attention = randomise(MapAttention(Geometry(16, 2, (3, 4)), AttentionSpec()))
    x, previous = torch.randn(2, 12, 16), torch.rand(2, 2, 12, 12)
    plain, attn = attention(x, previous)
    attention.modifiers["probe"] = Probe(attention.geometry)
    edited, same = attention(x, previous)
    assert torch.equal(same, attn)
    y, v, *_ = attention.modifiers["probe"].given
    own = v.flatten(1, 2).unflatten(2, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(y.flatten(1, 2), (attn @ own).transpose(1, 2).flatten(2))
    torch.testing.assert_close(edited, attention.proj(2 * y + 3 * v).flatten(1, 2))
    torch.testing.assert_close(plain, attention.proj(y).flatten(1, 2))


OUTPUTS = [
    name
    for name in MODIFIERS
    if isinstance(MODIFIERS[name], type) and issubclass(MODIFIERS[name], OutputModifier)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("model", TIMM)
def test_every_edit_of_the_heads_trains_in_timms_models_or_says_why_not(model, name):
    torch.manual_seed(0)
    try:
        net = ours(MODELS[model], name)
    except ValueError as error:
        assert "\n" not in str(error) and ";" in str(error)
        return
    calls = []
    for attention in attentions(net):
        attention.modifiers[name].register_forward_hook(lambda *_: calls.append(1))
    net(torch.randn(2, 3, *SIZE)).square().sum().backward()
    assert len(calls) == len(attentions(net)) == 2
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    own = [p for key, p in net.named_parameters() if f".{name}." in key]
    assert all(p.grad is not None for p in own)


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_edit_of_the_heads_keeps_the_fused_kernel(name, monkeypatch):
    model = small("swin", embed_dim=16, attention=AttentionSpec((name,)))
    assert set(why_not_fused(model).values()) == {None}
    monkeypatch.setattr(SoftmaxAttention, "_open", None)  # whatever calls it fails
    model(torch.randn(1, 3, 16, 16))
