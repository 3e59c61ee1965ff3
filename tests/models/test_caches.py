"""What evaluation in one mode leaves behind does not disturb another."""

import copy
import dataclasses
import pickle

import pytest
import torch

from tests.models.builders import WINDOW_FAMILIES, identity_options, randomise, small

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def sharpened(family):
    return randomise(small(family, **identity_options(True, True, True))).eval()


@pytest.mark.parametrize("family", WINDOW_FAMILIES)
def test_inference_mode_dtype_and_copies_use_their_own_values(family):
    model = sharpened(family)
    with torch.inference_mode():
        first = model(IMAGES)
        model(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), first)
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        assert (twin(IMAGES) - first).abs().max() > 1e-4
        torch.testing.assert_close(model(IMAGES), first)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(IMAGES), first)
        torch.testing.assert_close(
            model.double()(IMAGES.double()).float(), first, rtol=1e-3, atol=1e-4
        )


def test_gradients_flow_in_evaluation_mode_too():
    model = sharpened("swinv2")
    with torch.no_grad():
        model(IMAGES)
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_of_shapes_alone_leaves_nothing_behind_for_the_next():
    with torch.device("meta"):
        assert small("swinv2").layers[0].blocks[1].attn_mask.is_meta
    assert small("swinv2")(IMAGES).isfinite().all()


@pytest.mark.parametrize("family", WINDOW_FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "eager", "auto"])
def test_what_inference_mode_leaves_behind_can_be_trained_with(family, backend):
    options = {**identity_options(True, True, True), "img_size": (18, 22)}
    options["attention"] = dataclasses.replace(options["attention"], backend=backend)
    model = small(family, **options)
    images = torch.randn(1, 3, 18, 22)
    with torch.inference_mode():
        model.eval()(images)
    model.train()(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
