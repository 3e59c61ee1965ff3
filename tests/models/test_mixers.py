"""What holds for every registered mixer."""

import inspect

import pytest
import torch

from models.attention.mixers import MIXERS
from tests.models.builders import randomise

GRID = (3, 5)


def tokens(dim=8):
    return torch.randn(2, GRID[0] * GRID[1], dim, generator=torch.Generator().manual_seed(0))


def test_an_unknown_mixer_or_option_is_named():
    with pytest.raises(
        ValueError, match="there is no attention mixer 'locale'; .* did you mean 'local'"
    ):
        MIXERS.create("locale", 8, 2)
    with pytest.raises(ValueError, match="kernel"):
        MIXERS.create("local(kernel=3)", 8, 2)


@pytest.mark.parametrize("name", MIXERS.names())
class TestEveryMixer:
    """Built by name with (dim, num_heads), called with (tokens, grid)."""

    def test_has_a_docstring_with_shapes_and_a_source(self, name):
        text = " ".join(inspect.getdoc(base) or "" for base in MIXERS[name].__mro__[:2])
        assert "Shapes:" in text and "Source:" in text

    def test_keeps_the_shape_and_trains_every_parameter(self, name):
        mixer = MIXERS.create(name, 8, 2)
        y = mixer(tokens(), GRID)
        assert y.shape == tokens().shape
        y.square().sum().backward()
        for key, parameter in mixer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key

    def test_is_close_in_bfloat16_autocast(self, name):
        mixer = randomise(MIXERS.create(name, 8, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = mixer(tokens(), GRID)
            low.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in mixer.parameters())
        torch.testing.assert_close(low.float(), mixer(tokens(), GRID), rtol=0.05, atol=0.05)

    def test_compiles_to_one_graph_with_the_same_result_and_gradients(self, name):
        mixer = randomise(MIXERS.create(name, 8, 2))
        compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
        gradients = []
        for forward in (compiled, mixer):
            mixer.zero_grad()
            y = forward(tokens(), GRID)
            y.square().sum().backward()
            gradients.append([y.detach()] + [p.grad.clone() for p in mixer.parameters()])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_images_do_not_see_each_other(self, name):
        mixer = randomise(MIXERS.create(name, 8, 2))
        torch.testing.assert_close(
            mixer(tokens(), GRID)[:1], mixer(tokens()[:1], GRID), rtol=1e-5, atol=1e-6
        )

    def test_counts_at_least_its_layers(self, name):
        mixer = MIXERS.create(name, 8, 2)
        layers = sum(
            module.weight.numel()
            for module in mixer.modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        )
        assert mixer.flops(10) == 10 * mixer.flops(1) >= 10 * layers
