"""Loaders, augmentation and mixing have the values of the settings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as T

from data import DataError, build_data
from data.catalogue import DATASETS, Request
from data.randomness import Key
from tests.data import fakes
from tests.wiring.cases import config_of
from tests.wiring.data import DIGITS, FOLDER, loaders_without_workers
from tests.wiring.runs import attributes

RECIPE = {
    "AUG.AUTO_AUGMENT": "none",
    "AUG.SCALE": (0.21, 0.92),
    "AUG.RATIO": (0.83, 1.24),
    "AUG.HFLIP": 0.31,
    "AUG.COLOR_JITTER": 0.27,
    "AUG.REPROB": 0.41,
    "AUG.REMODE": "rand",
    "AUG.RECOUNT": 3,
    "AUG.REAREA": (0.05, 0.25),
    "AUG.MIXUP": 0.71,
    "AUG.CUTMIX": 0.62,
    "AUG.CUTMIX_MINMAX": (0.15, 0.85),
    "AUG.MIXUP_PROB": 0.53,
    "AUG.MIXUP_SWITCH_PROB": 0.44,
    "AUG.MIXUP_MODE": "elem",
    "MODEL.LABEL_SMOOTHING": 0.07,
    "DATA.INTERPOLATION": "lanczos",
    "DATA.CROP_RATIO": 0.8,
    "DATA.MEAN": (0.1, 0.2, 0.3),
    "DATA.STD": (0.4, 0.5, 0.6),
    "DATA.IMG_SIZE": (40, 48),
}
ERASING = {
    "probability": 0.41,
    "min_area": 0.05,
    "max_area": 0.25,
    "min_count": 1,
    "max_count": 3,
    "rand_color": True,
    "per_pixel": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few images in three classes."""
    return str(fakes.class_folder(tmp_path_factory.mktemp("images")))


def test_augmentation_has_the_values_of_the_settings(folder):
    data = build_data(config_of(FOLDER | RECIPE | {"DATA.DATA_PATH": folder}))
    steps = {type(step).__name__: step for step in data.train_loader.dataset.transform.transforms}
    crop = steps["RandomResizedCropAndInterpolation"]
    assert attributes(crop, ("size", "scale", "ratio")) == {
        "size": (40, 48),
        "scale": (0.21, 0.92),
        "ratio": (0.83, 1.24),
    }
    assert crop.interpolation == T.InterpolationMode.LANCZOS
    assert steps["RandomHorizontalFlip"].p == 0.31
    assert steps["ColorJitter"].brightness == pytest.approx((0.73, 1.27))
    assert attributes(steps["RandomErasing"], ERASING) == ERASING
    for loader in (data.train_loader, data.val_loader):
        norm = [s for s in loader.dataset.transform.transforms if isinstance(s, T.Normalize)][0]
        assert torch.as_tensor(norm.mean).tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert torch.as_tensor(norm.std).tolist() == pytest.approx([0.4, 0.5, 0.6])
    resize, centre, *_ = data.val_loader.dataset.transform.transforms
    assert (resize.size, tuple(centre.size)) == ((50, 60), (40, 48))
    assert resize.mode == T.InterpolationMode.LANCZOS
    mixing = {
        "mixup_alpha": 0.71,
        "cutmix_alpha": 1.0,  # replaced by the bounds
        "cutmix_minmax": (0.15, 0.85),
        "mix_prob": 0.53,
        "switch_prob": 0.44,
        "label_smoothing": 0.07,
        "num_classes": 3,
        "mode": "elem",
    }
    assert attributes(data.mixup, mixing) == mixing
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_cutmix_has_its_own_alpha(folder):
    settings = RECIPE | {"AUG.CUTMIX_MINMAX": None, "DATA.DATA_PATH": folder}
    mixup = build_data(config_of(FOLDER | settings)).mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha) == (0.71, 0.62)


def test_digits_are_augmented_by_the_settings():
    data = build_data(
        config_of(
            DIGITS
            | {
                "AUG.HFLIP": 0.31,
                "AUG.REPROB": 0.41,
                "AUG.REMODE": "rand",
                "AUG.RECOUNT": 3,
                "AUG.REAREA": (0.05, 0.25),
                "DATA.MEAN": (0.1, 0.2, 0.3),
                "DATA.STD": (0.4, 0.5, 0.6),
                "DATA.REPEATED_AUG": 2,
                "SEED": 9,
            }
        )
    )
    dataset = data.train_loader.dataset
    erasing = [value for value in vars(dataset).values() if isinstance(value, RandomErasing)][0]
    assert attributes(erasing, ERASING) == ERASING
    assert attributes(dataset, ("hflip", "seed", "copies")) == {
        "hflip": 0.31,
        "seed": 9,
        "copies": 2,
    }
    for loader in (data.train_loader, data.val_loader):
        assert loader.dataset.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert loader.dataset.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert data.val_loader.dataset.affine is None
    assert (data.train_loader.batches.seed, data.train_loader.batches.copies) == (9, 2)
    grey = build_data(config_of(DIGITS | {"MODEL.SWIN.IN_CHANS": 1}))
    assert [next(iter(loader))[0].shape[1] for loader in (grey.train_loader, grey.val_loader)] == [
        1,
        1,
    ]


@pytest.mark.parametrize("sequential", [False, True])
def test_a_rank_sees_its_share_of_the_data(sequential, folder):
    config = config_of(FOLDER | {"DATA.DATA_PATH": folder, "TEST.SEQUENTIAL": sequential})
    alone, first, second = (
        build_data(config, rank=rank, world_size=size) for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    keys = [
        [[key.index for key in batch] for batch in data.train_loader.batches]
        for data in (alone, first, second)
    ]
    assert len(keys[1]) == len(keys[2]) == 1
    assert sorted(keys[1][0] + keys[2][0]) == sorted(keys[0][0] + keys[0][1])
    seen = [sum(len(targets) for _, targets in data.val_loader) for data in (first, second)]
    assert seen == ([9, 9] if sequential else [5, 4])


def test_each_order_and_each_sample_follows_the_seed(folder):
    settings = FOLDER | {"DATA.DATA_PATH": folder, "TEST.SHUFFLE": True, "DATA.REPEATED_AUG": 2}
    first, second = (build_data(config_of(settings | {"SEED": seed})) for seed in (4, 5))
    assert (first.train_loader.dataset.seed, second.train_loader.dataset.seed) == (4, 5)
    assert (first.train_loader.batches.seed, first.train_loader.batches.copies) == (4, 2)
    orders = [
        [key.index for batch in data.val_loader.batches for key in batch]
        for data in (first, second)
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert [len(batch) for batch in first.val_loader.batches] == [4, 4, 1]
    keys = [Key(0, index) for index in range(4)]
    images = [data.train_loader.dataset.__getitems__(keys).images for data in (first, second)]
    assert not torch.equal(*images)


def test_both_loaders_load_as_the_settings_say(folder):
    settings = {"DATA.NUM_WORKERS": 3, "DATA.TIMEOUT": 7.0, "DATA.PIN_MEMORY": True}
    # the clock is looked at every 3.5 s
    asked = {"num_workers": 3, "timeout": 3.5, "pin_memory": True, "persistent_workers": True}
    for base in (FOLDER | {"DATA.DATA_PATH": folder}, DIGITS):
        with loaders_without_workers() as found:
            data = build_data(config_of(base | settings | {"DEVICE": "auto"}))
        assert found == [asked, asked]
        assert data.train_loader.timeout == data.val_loader.timeout == 7.0


def test_a_reader_is_asked_for_what_the_settings_say(monkeypatch):
    asked = []

    def read(request):
        asked.append(request)
        raise DataError("no images here")

    entry = replace(DATASETS["imagenet"], read=read)
    monkeypatch.setattr("data.build.DATASETS", {"imagenet": entry})
    settings = {
        "DATA.DATASET": "imagenet",
        "DATA.DATA_PATH": "images",
        "DATA.IMG_SIZE": (40, 48),
        "DATA.INTERPOLATION": "lanczos",
        "DATA.ZIP_MODE": True,
        "DATA.CACHE_MODE": "part",
    }
    expected = Request(
        dataset="imagenet",
        root=Path("images"),
        train=False,
        size=(40, 48),
        interpolation="lanczos",
        zipped=True,
        cache="part",
        rank=1,
        world_size=3,
    )
    with pytest.raises(DataError, match="no images here"):
        build_data(config_of(settings), rank=1, world_size=3, train=False)
    assert asked == [expected]


def test_a_process_caches_its_part_of_an_archive(tmp_path, caplog):
    folders = fakes.class_folder(tmp_path / "folders")
    request = Request(
        dataset="imagenet",
        root=fakes.zipped(folders, tmp_path / "zips"),
        zipped=True,
        cache="part",
        rank=2,
        world_size=4,
    )
    with caplog.at_level("INFO"):
        DATASETS["imagenet"].read(request)
    told = [record.getMessage() for record in caplog.records if "caching" in record.getMessage()]
    # 9 images to validate on and 15 to train on
    assert [line.partition(" images")[0] for line in told] == ["caching 2", "caching 4"]
