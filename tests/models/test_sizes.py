"""Sizes: images, windows and maps that the window does not divide, and feature maps for dense
tasks.
"""

import pytest
import torch

from models import SwinTransformer, SwinTransformerV2
from tests.models.builders import WINDOW_FAMILIES, randomise, small

families = pytest.mark.parametrize("family", ("swin", "swinv2", "swin_mlp"))


@families
@pytest.mark.parametrize("size", [(16, 32), (20, 28), 18, (26, 14)])
@pytest.mark.parametrize("window", [4, (2, 4), 3])
def test_any_image_and_window_size_trains_and_every_pixel_matters(family, size, window):
    model = randomise(small(family, img_size=size, window_size=window))
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width, requires_grad=True)
    model(images).square().sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("family", WINDOW_FAMILIES)
def test_a_model_for_any_size_equals_one_built_for_that_size(family):
    """12 x 8 tokens fill whole windows of 4: padding and masks at run time must change nothing."""
    fixed = randomise(small(family, img_size=(24, 16)))
    dynamic = small(family, img_size=16, dynamic_img_size=True)
    masks = {name: value for name, value in dynamic.state_dict().items() if "attn_mask" in name}
    dynamic.load_state_dict(
        {**fixed.state_dict(), **masks}
    )  # the masks are those of the size it was built for
    assert fixed.layers[0].blocks[1].shift == (2, 2)
    tokens = torch.randn(1, 96, 8)
    torch.testing.assert_close(dynamic.layers[0](tokens, (12, 8)), fixed.layers[0](tokens))
    images = torch.randn(2, 3, 24, 16)
    torch.testing.assert_close(dynamic(images), fixed(images))


def test_a_wrong_image_size_is_refused_by_name_unless_any_size_is_allowed():
    with pytest.raises(ValueError, match=r"20x16 pixels.*built for 16x16.*DYNAMIC_IMG_SIZE"):
        small("swin")(torch.randn(1, 3, 20, 16))
    assert small("swin", dynamic_img_size=True)(torch.randn(1, 3, 20, 16)).shape == (1, 10)


@families
def test_position_embeddings_follow_the_map(family):
    model = randomise(small(family, ape=True, dynamic_img_size=True))
    assert model(torch.randn(1, 3, 32, 24)).isfinite().all()


@families
def test_stage_maps_have_the_strides_of_a_pyramid_and_end_in_the_pooled_features(family):
    model = randomise(small(family, dynamic_img_size=True))
    images = torch.randn(2, 3, 24, 20)
    maps = model.forward_features(images, return_stages=True)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 12, 10), (2, 16, 6, 5)]
    torch.testing.assert_close(maps[-1].mean((2, 3)), model.forward_features(images))


@pytest.mark.parametrize("size", [4, 8])
def test_swinv2_with_a_window_of_one_token_is_finite(size):
    """The coordinate of the only offset of a side of one token is 0, not 0 / 0."""
    model = SwinTransformerV2(
        size,
        patch_size=4,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=3,
        window_size=8,
        pretrained_window_sizes=(0, 0),
    )
    logits = randomise(model)(torch.randn(2, 3, size, size))
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_224_model_takes_384_pixels_where_the_reference_stops():
    model = SwinTransformer(384, depths=(1, 1, 1, 1))
    assert [layer.input_resolution for layer in model.layers] == [
        (96, 96),
        (48, 48),
        (24, 24),
        (12, 12),
    ]
    assert model.eval()(torch.randn(1, 3, 384, 384)).isfinite().all()


@families
def test_an_empty_batch_gives_no_logits_and_zero_gradients(family):
    model = small(family)
    model(torch.randn(0, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(torch.randn(0, 3, 16, 16)).shape == (0, 10)


@pytest.mark.parametrize("family", WINDOW_FAMILIES)
def test_activation_checkpointing_gives_the_same_gradients(family):
    plain, saving = randomise(small(family)), randomise(small(family, use_checkpoint=True))
    images = torch.randn(2, 3, 16, 16)
    for model in (plain, saving):
        model(images).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(embed_dim=10, num_heads=(3, 6)), "10 channels cannot be split into 3 heads"),
        (dict(depths=(2, 2, 2)), "one entry per stage"),
        (dict(pre_mlp="everywhere"), "allowed are off, stem, stage"),
        (dict(sw_mlp="roll"), "allowed are off, token_mix, shift"),
        (dict(window_size=0), "at least 1"),
        (dict(img_size=1), "smaller than one patch"),
    ],
)
def test_impossible_arguments_are_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        small("swin", **options)


def test_an_argument_that_nobody_reads_is_named():
    with pytest.warns(UserWarning, match="no effect here: window_sise"):
        small("swin", window_sise=7)
    with pytest.warns(UserWarning, match="no effect here: fused_window_process"):
        small("swin", fused_window_process=True)
