"""Additive and separable attention against their formulas, and the properties that follow from
pooling one vector.
"""

import pytest
import torch

from models.attention.mixers.efficient_additive import (
    POOL_NORMS,
    EfficientAdditiveAttention,
    unit,
)
from models.attention.mixers.separable import SeparableAttention
from tests.helpers import golden, subtree
from tests.models.builders import randomise


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def tokens(count=6, dim=8, batch=2, seed=1):
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed))


def layer(kind=EfficientAdditiveAttention, dim=8, **options):
    return randomise(kind(dim, **options))


def compare(output, leaves, tensors):
    """Output, input gradient and parameter gradients against a golden's, in its tolerances."""
    assert relative(output, tensors["output"]) <= 1e-5
    gradients = torch.autograd.grad((output * tensors["loss_weight"]).sum(), list(leaves.values()))
    for (key, _), gradient in zip(leaves.items(), gradients, strict=True):
        theirs = tensors[key].reshape(gradient.shape)
        assert relative(gradient, theirs) <= (2e-5 if key == "input_grad" else 5e-5), key


@pytest.mark.parametrize("name", ["swiftformer_eaa", "swiftformer_eaa_wide"])
def test_additive_attention_is_the_original_s(name):
    meta, tensors = golden(name)
    config = meta["config"]
    module = EfficientAdditiveAttention(
        config["in_dims"], out_dim=config["token_dim"], widen=config["num_heads"]
    )
    module.load_state_dict(
        {
            key.replace("Proj", "proj"): value
            for key, value in subtree(tensors, "state_dict").items()
        }
    )
    x = tensors["input"].clone().requires_grad_()
    leaves = {
        f"grad/{key.replace('proj', 'Proj')}": parameter
        for key, parameter in module.named_parameters()
    }
    compare(module(x), {"input_grad": x, **leaves}, tensors)


@pytest.mark.parametrize("name", ["separable_attention", "separable_attention_cross"])
def test_separable_attention_is_the_original_s(name):
    meta, tensors = golden(name)
    module = SeparableAttention(meta["config"]["embed_dim"])
    module.load_state_dict(
        {
            key.replace(".block.conv", ""): value.squeeze()
            for key, value in subtree(tensors, "state_dict").items()
        }
    )
    x = tensors["input"].clone().requires_grad_()  # (B, C, pixels of a patch, patches)
    context = tensors["previous"].permute(0, 2, 3, 1) if "previous" in tensors else None
    y = module(x.permute(0, 2, 3, 1), context=context).permute(0, 3, 1, 2)
    leaves = {
        f"grad/{key.replace('proj', 'proj.block.conv')}": parameter
        for key, parameter in module.named_parameters()
    }
    compare(y, {"input_grad": x, **leaves}, tensors)


def additive_by_hand(module, x, pool_norm):
    """The formula for one image x (N, C), token by token."""
    q = [module.to_query(token) for token in x]
    k = [module.to_key(token) for token in x]
    q, k = ([vector / vector.square().sum().sqrt() for vector in vectors] for vectors in (q, k))
    scores = torch.stack([q_n @ module.w_g[:, 0] / module.final.out_features**0.5 for q_n in q])
    a = {
        "l2": scores / scores.square().sum().sqrt(),
        "softmax": scores.exp() / scores.exp().sum(),
        "none": scores,
        "ones": torch.ones_like(scores),
    }[pool_norm]
    pooled = sum(a_n * q_n for a_n, q_n in zip(a, q, strict=True))
    return torch.stack(
        [module.final(module.proj(pooled * k_n) + q_n) for q_n, k_n in zip(q, k, strict=True)]
    )


@pytest.mark.parametrize("pool_norm", POOL_NORMS)
def test_additive_attention_is_its_formula(pool_norm):
    module = layer(pool_norm=pool_norm, out_dim=4, widen=3).double()
    x = tokens().double()
    torch.testing.assert_close(
        module(x), torch.stack([additive_by_hand(module, image, pool_norm) for image in x])
    )


def test_separable_attention_is_its_formula():
    module, x = layer(SeparableAttention).double(), tokens().double()
    for image, ours in zip(x, module(x), strict=True):
        s, k, v = zip(*(module.qkv_proj(token).split([1, 8, 8]) for token in image), strict=True)
        weights = torch.cat(s).exp() / torch.cat(s).exp().sum()
        pooled = sum(weight * key for weight, key in zip(weights, k, strict=True))
        torch.testing.assert_close(
            ours, torch.stack([module.out_proj(value.clamp(min=0) * pooled) for value in v])
        )


@pytest.mark.parametrize("kind", [*POOL_NORMS, "separable"])
def test_permuted_tokens_give_permuted_results(kind):
    module = layer(SeparableAttention) if kind == "separable" else layer(pool_norm=kind)
    x, order = tokens(), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pool_norm", "independent"),
    [("l2", True), ("ones", True), ("softmax", False), ("none", False)],
)
def test_the_scale_cancels_under_l2_alone(pool_norm, independent):
    module, x = layer(pool_norm=pool_norm), tokens()
    before = module(x)
    module.scale *= 7
    assert torch.allclose(module(x), before, rtol=1e-5, atol=1e-6) == independent


@pytest.mark.parametrize("pool_norm", POOL_NORMS)
def test_the_score_vector_learns_except_where_all_weights_are_one(pool_norm):
    module = layer(pool_norm=pool_norm)
    module(tokens()).square().sum().backward()
    largest = module.w_g.grad.abs().max()
    assert largest == 0 if pool_norm == "ones" else largest > 1e-4


@pytest.mark.parametrize("pool_norm", POOL_NORMS)
@pytest.mark.parametrize(
    "x",
    [tokens(1), torch.zeros(2, 1, 8), torch.zeros(2, 5, 8)],
    ids=["one token", "one zero", "zeros"],
)
def test_values_and_gradients_are_finite_where_norms_degenerate(pool_norm, x):
    module = EfficientAdditiveAttention(8, pool_norm=pool_norm)  # biases 0: a zero token has q = 0
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_one_token_has_the_weight_plus_or_minus_one():
    module = layer()
    a = module.pool_weights(tokens(1, batch=50))
    torch.testing.assert_close(a.abs(), torch.ones_like(a))
    assert a.min() < 0 < a.max()


@pytest.mark.parametrize("kind", [EfficientAdditiveAttention, SeparableAttention])
def test_tokens_meet_only_through_the_pooled_vector(kind):
    module = layer(kind)
    module.weight_tap.register_forward_hook(lambda _m, _i, weights: torch.zeros_like(weights))
    x = tokens(4, batch=1)[0].requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda t: module(t[None])[0], x)  # (N, C, N, C)
    for i in range(4):
        assert all(jacobian[i, :, j].abs().max() == 0 for j in range(4) if j != i)


def test_options_take_their_part_of_the_formula_away():
    x, plain = tokens(), layer()
    without = layer(residual="none")
    torch.testing.assert_close(
        plain(x) - without(x),
        torch.nn.functional.normalize(plain.to_query(x), dim=-1) @ plain.final.weight.T,
    )
    fixed = layer(w_g=False)
    fixed.load_state_dict({key: value for key, value in plain.state_dict().items() if key != "w_g"})
    with torch.no_grad():
        plain.w_g.fill_(1)
    torch.testing.assert_close(fixed(x), plain(x))
    loose = layer(qk_norm=False)
    assert not torch.allclose(loose(x), loose(2 * x), rtol=0.1)


@pytest.mark.parametrize("dim", [3, 16])
def test_parameter_counts_are_the_closed_forms(dim):
    count = [
        sum(p.numel() for p in kind(dim).parameters())
        for kind in (EfficientAdditiveAttention, SeparableAttention)
    ]
    assert count == [4 * dim**2 + 5 * dim, 3 * dim**2 + 4 * dim + 1]


@pytest.mark.parametrize("kind", [EfficientAdditiveAttention, SeparableAttention])
def test_what_the_backward_keeps_grows_with_the_tokens_not_with_their_square(kind):
    def kept(count):
        sizes, module, x = [], layer(kind), tokens(count)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            module(x)
        return sum(sizes)

    assert kept(400) - kept(200) == 2 * (kept(200) - kept(100))


def test_float16_norms_survive_a_zero_token():
    q = torch.zeros(1, 3, 8, dtype=torch.float16)
    assert unit(q, -1).isfinite().all()


def test_an_unknown_word_is_named_with_what_is_allowed():
    with pytest.raises(
        ValueError,
        match="pool_norm is 'soft'; allowed are l2, softmax, none, ones; did you mean 'softmax'",
    ):
        EfficientAdditiveAttention(8, pool_norm="soft")
    with pytest.raises(ValueError, match="residual is 'k'; allowed are q, none"):
        EfficientAdditiveAttention(8, residual="k")
