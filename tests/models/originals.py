"""Comparing a model with the vectors of an original implementation: output, features, and the
gradients of image and parameters.
"""

import torch
from torch import Tensor

from tests.helpers import golden, subtree

MASK = "modifiers.gaussian_mixture_mask."


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def trained(name: str, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """The description of a golden vector, and of its `kind` ("state_dict" or "grad") what the
    original trains.
    """
    meta, tensors = golden(name)
    left_out = set(meta["frozen_constants"])
    return meta, {
        key: value for key, value in subtree(tensors, kind).items() if key not in left_out
    }


def assert_same_as_original(
    name: str,
    model: torch.nn.Module,
    convert,
    features: dict[str, str] | None = None,
    output: str = "logits",
):
    """Loads the original's weights and compares everything the vector holds.

    convert: a function from the original's dict to this project's names and shapes, linear, so that
        it fits weights and gradients.
    features: names of this project's modules -> the original's. What has no gradient there must
        have none here.
    """
    meta, state = trained(name, "state_dict")
    tensors = golden(name)[1]
    model.eval().load_state_dict(convert(state))
    assert sum(parameter.numel() for parameter in model.parameters()) == meta["num_trainable"]
    seen = {}
    for ours in features or {}:
        model.get_submodule(ours).register_forward_hook(
            lambda _module, _inputs, result, ours=ours: seen.update({ours: first(result)})
        )
    images = tensors["input"].clone().requires_grad_()
    result = model(images)
    (result * tensors["loss_weight"]).sum().backward()
    assert (result - tensors[output]).abs().max() <= 1e-5 * tensors[output].abs().max().clamp(min=1)
    for ours, theirs in (features or {}).items():
        assert relative(seen[ours], tensors[f"feature/{theirs}"]) <= 1e-5, theirs
    assert relative(images.grad, tensors["input_grad"]) <= 2e-5
    quiet = {*meta["parameters_without_gradient"], *meta["zero_gradients"]}
    quiet = convert(
        {key: torch.full_like(value, float(key in quiet)) for key, value in state.items()}
    )
    gradients = convert(
        {key: torch.zeros_like(value) for key, value in state.items()} | trained(name, "grad")[1]
    )
    for key, parameter in model.named_parameters():
        if quiet[key].any():
            assert parameter.grad is None or parameter.grad.abs().max() <= 1e-6, key
        else:
            assert relative(parameter.grad, gradients[key]) <= 5e-5, key


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a module returns, or the first of it."""
    return result[0] if isinstance(result, tuple) else result


def patches(weight: Tensor, channels: int) -> Tensor:
    """A linear layer on patches, flattened as row, column, channel, as a convolution (out,
    channels, side, side).
    """
    side = round((weight.shape[1] / channels) ** 0.5)
    return weight.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)


def renamed(key: str, rules: dict[str, str]) -> str:
    """The key with every rule (from, to) applied in order."""
    for old, new in rules.items():
        key = key.replace(old, new)
    return key
