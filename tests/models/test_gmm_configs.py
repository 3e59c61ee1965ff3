"""configs/gmm: every file builds, has the counted parameters, and differs from its baseline in the
mask alone.
"""

import pytest

from config import load_config, to_dict
from models import build_model
from tests.helpers import ROOT
from tests.models.builders import size

FOLDER = ROOT / "configs/gmm"
GMM, ELM = "gaussian_mixture_mask", "elementwise_mask"
DATA = {"cifar10": 10, "cifar100": 100, "svhn": 10, "tiny_imagenet": 200}
# parameters for 10 and 100 classes at 32 px, and for 200 at 64 px; CaiT's last by the closed form
# of its two layers that differ
PLAIN = {
    "swin": (7_073_188, 7_107_838, 7_149_794),
    "vit": (2_692_042, 2_709_412, 2_756_360),
    "cait": (5_078_834, 5_088_644, 5_078_834 + 108 * 3 * (8**2 - 4**2) + 109 * 190),
    "pit": (6_972_586, 7_007_236, 7_049_192),
    "t2t": (6_486_080, 6_509_210, 6_659_262),
}
# What the masks add: two numbers per kernel and head, or one per pair of tokens; (32 px, 64 px).
EXTRA = {
    "gmm": {
        "swin": (900, 900),
        "vit": (1080, 1080),
        "cait": (960, 960),
        "pit": (600, 600),
        "t2t": (490, 500),
    },
    "elm": {
        "swin": (12 * 16**2,) * 2,
        "vit": (9 * 64**2,) * 2,
        "cait": (24 * 64**2,) * 2,
        "pit": (2 * 256**2 + 6 * 64**2 + 4 * 16**2,) * 2,
        "t2t": (12 * 64**2 + 256**2, 12 * 64**2 + 256**2 + 1024**2),
    },
}
each_pair = pytest.mark.parametrize(
    ("model", "data"), [(model, data) for model in PLAIN for data in DATA]
)


def settings(path, opts=()):
    return to_dict(load_config(path, opts))


def test_the_folder_holds_each_model_data_set_and_mask():
    expected = {
        f"{model}_{data}{mask}.yaml"
        for model in PLAIN
        for data in DATA
        for mask in ("", "_gmm", "_elm")
    }
    assert {path.name for path in FOLDER.iterdir()} == expected


@each_pair
def test_each_file_builds_the_counted_parameters(model, data):
    large = data == "tiny_imagenet"
    plain = PLAIN[model][{10: 0, 100: 1, 200: 2}[DATA[data]]]
    for mask in ("", "gmm", "elm"):
        extra = EXTRA[mask][model][large] if mask else 0
        assert (
            size(build_model, load_config(FOLDER / f"{model}_{data}{'_' * bool(mask)}{mask}.yaml"))
            == plain + extra
        ), mask


@each_pair
def test_the_masked_files_differ_in_the_mask_and_the_name_alone(model, data):
    plain = settings(FOLDER / f"{model}_{data}.yaml")
    for mask, name in (("gmm", GMM), ("elm", ELM)):
        masked = settings(FOLDER / f"{model}_{data}_{mask}.yaml")
        assert masked["MODEL"]["ATTENTION"]["MODIFIERS"] == [name]
        masked["MODEL"]["ATTENTION"]["MODIFIERS"] = plain["MODEL"]["ATTENTION"]["MODIFIERS"]
        masked["MODEL"]["NAME"] = plain["MODEL"]["NAME"]
        assert masked == plain


@each_pair
def test_one_option_switches_the_mask_on(model, data):
    opts = ["MODEL.ATTENTION.MODIFIERS", f"[{GMM}]", "MODEL.NAME", f"{model}_{data}_gmm"]
    assert settings(FOLDER / f"{model}_{data}.yaml", opts) == settings(
        FOLDER / f"{model}_{data}_gmm.yaml"
    )


@each_pair
def test_all_models_share_one_recipe(model, data):
    """But for stochastic depth, which grows with the block in Swin and T2T and is constant in the
    others.
    """
    own, swin = settings(FOLDER / f"{model}_{data}.yaml"), settings(FOLDER / f"swin_{data}.yaml")
    for section in ("DATA", "TRAIN", "AUG"):
        assert own[section] == swin[section]
    assert own["MODEL"]["DROP_PATH_RATE"] == swin["MODEL"]["DROP_PATH_RATE"] == 0.1
    assert own["MODEL"]["DROP_PATH_PROFILE"] == (
        "linear" if model in ("swin", "t2t") else "constant"
    )
