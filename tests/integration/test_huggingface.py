"""Weights of Hugging Face's transformers compute the same function here."""

import pytest
import torch

from checkpoint import load_weights, read_weights
from models import SwinTransformer, SwinTransformerV2, VisionTransformer
from tests.checkpoint.builders import randomise

transformers = pytest.importorskip("transformers")

SWIN = dict(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4])
OURS = dict(img_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4])
VIT = dict(
    image_size=32,
    patch_size=8,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=5,
)


def compare(theirs, ours, path, size: int = 32):
    """Both give the same logits after loading, from memory and from their file."""
    theirs = randomise(theirs)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(images).logits
    theirs.save_pretrained(path)
    for weights in (theirs.state_dict(), read_weights(path / "model.safetensors")):
        for parameter in ours.parameters():
            torch.nn.init.zeros_(parameter)
        report = load_weights(ours, weights, head="evaluate")
        assert report.coverage == 1 and not report.fresh and not report.resized
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(images), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-2


@pytest.mark.parametrize(("window", "absolute"), [(4, False), (4, True), (3, False)])
def test_swin(tmp_path, window, absolute):
    size = 36 if window == 3 else 32
    config = transformers.SwinConfig(
        **SWIN | {"image_size": size},
        window_size=window,
        num_labels=5,
        use_absolute_embeddings=absolute,
    )
    options = OURS | {"img_size": size}
    ours = SwinTransformer(**options, window_size=window, num_classes=5, ape=absolute)
    compare(transformers.SwinForImageClassification(config), ours, tmp_path, size)


@pytest.mark.parametrize("pretrained", [0, 8])
def test_swinv2(tmp_path, pretrained):
    config = transformers.Swinv2Config(
        **SWIN, window_size=4, num_labels=5, pretrained_window_sizes=[pretrained] * 2
    )
    ours = SwinTransformerV2(
        **OURS, window_size=4, num_classes=5, pretrained_window_sizes=[pretrained] * 2
    )
    compare(transformers.Swinv2ForImageClassification(config), ours, tmp_path)


def test_vit(tmp_path):
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    ours = VisionTransformer(32, 8, 3, 5, 16, 2, 2, mlp_ratio=4, norm_eps=1e-12)
    compare(theirs, ours, tmp_path)


def test_a_bare_swin_has_no_classifier_and_says_so(tmp_path):
    theirs = randomise(transformers.SwinModel(transformers.SwinConfig(**SWIN, window_size=4)))
    ours = SwinTransformer(**OURS, window_size=4, num_classes=5)
    report = load_weights(ours, theirs.state_dict())
    assert report.coverage == 1 and report.format == "huggingface"
    with pytest.raises(ValueError, match="no classifier"):
        load_weights(ours, theirs.state_dict(), head="evaluate")
