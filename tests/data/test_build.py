"""From a config to loaders, for every data set."""

import math

import pytest
import torch
from torchvision import datasets

from config import ConfigError
from data import DataError, build_data
from data.files import FileList
from data.names import imagenet_wnids
from tests.data import fakes
from tests.data.fakes import settings

PLAIN = {"AUG__AUTO_AUGMENT": "none", "AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0}
DIGITS = {
    "DATA__DATASET": "digits",
    "DATA__IMG_SIZE": 16,
    "AUG__AFFINE": True,
    "AUG__HFLIP": 0.0,
    "AUG__REPROB": 0.0,
    **PLAIN,
}


def seen(loader) -> int:
    return sum(len(targets) for _, targets in loader)


def refused(match: str, config, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        build_data(config, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_has_the_classes_it_has(tmp_path):
    data = build_data(
        settings(tmp_path, DATA__DATASET="folder", DATA__DATA_PATH=fakes.class_folder(tmp_path))
    )
    assert (data.num_classes, data.class_names, len(data.train_loader)) == (
        3,
        ["ant", "bee", "cat"],
        3,
    )
    images, targets = next(data.train_loader.epoch(0))
    assert (
        images.shape == (4, 3, 40, 40)
        and images.dtype == torch.float32
        and targets.dtype == torch.int64
    )
    assert (
        seen(data.val_loader) == 9
        and data.soft_targets
        and data.mixup(images, targets)[1].shape == (4, 3)
    )


def test_a_contradicting_class_count_names_both_numbers(tmp_path):
    config = settings(
        tmp_path,
        DATA__DATASET="folder",
        DATA__DATA_PATH=fakes.class_folder(tmp_path),
        MODEL__NUM_CLASSES=7,
    )
    refused("MODEL.NUM_CLASSES is 7, but .* has 3 classes", config)


def test_mixing_off_means_hard_targets_and_no_mixup(tmp_path):
    data = build_data(
        settings(
            tmp_path, DATA__DATASET="folder", DATA__DATA_PATH=fakes.class_folder(tmp_path), **PLAIN
        )
    )
    assert data.mixup is None and not data.soft_targets


def test_the_small_image_recipe_reaches_the_transforms(tmp_path):
    """Data set's own policy, padded crops, erasing of at most 0.4 of the area with the mean, mixed
    every second time.
    """
    config = settings(
        tmp_path,
        DATA__DATASET="folder",
        DATA__DATA_PATH=fakes.class_folder(tmp_path),
        AUG__AUTO_AUGMENT="svhn",
        AUG__RANDOM_CROP_PADDING=4,
        AUG__REAREA=(0.02, 0.4),
        AUG__REMODE="const",
        AUG__MIXUP=1.0,
        AUG__CUTMIX=1.0,
        AUG__MIXUP_PROB=0.5,
    )
    data = build_data(config)
    steps = {type(step).__name__: step for step in data.train_loader.dataset.transform.transforms}
    assert (
        steps["RandomCrop"].padding == 4
        and steps["AutoAugment"].policy.name == "SVHN"
        and steps["RandomHorizontalFlip"].p == 0.5
    )
    erasing = steps["RandomErasing"]
    assert (erasing.probability, erasing.min_area, erasing.max_area) == (0.25, 0.02, 0.4)
    assert not erasing.per_pixel and not erasing.rand_color
    assert erasing.log_aspect_ratio == (math.log(0.3), math.log(1 / 0.3))
    mixes = [data.mixup._params_per_batch() for _ in range(600)]  # (share, whether it is cutmix)
    mixed = [cut for share, cut in mixes if share < 1]
    assert 0.4 < len(mixed) / 600 < 0.6 and 0.35 < sum(mixed) / len(mixed) < 0.65


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_validation_image_is_seen_once_over_all_ranks(tmp_path, world):
    root = fakes.class_folder(tmp_path, train=8)
    config = settings(tmp_path, DATA__DATASET="folder", DATA__DATA_PATH=root)
    ranks = [build_data(config, rank=rank, world_size=world) for rank in range(world)]
    sums = [
        image.double().sum().item()
        for data in ranks
        for images, _ in data.val_loader
        for image in images
    ]
    assert len(sums) == len(set(sums)) == 9 and len({len(data.train_loader) for data in ranks}) == 1


def test_sequential_evaluation_shows_everything_to_every_rank(tmp_path):
    config = settings(
        tmp_path,
        DATA__DATASET="folder",
        DATA__DATA_PATH=fakes.class_folder(tmp_path),
        TEST__SEQUENTIAL=True,
    )
    assert [
        seen(build_data(config, rank=rank, world_size=2, train=False).val_loader) for rank in (0, 1)
    ] == [9, 9]


def test_an_evaluation_builds_no_training_loader(tmp_path):
    config = settings(
        tmp_path, DATA__DATASET="folder", DATA__DATA_PATH=fakes.class_folder(tmp_path, train=0)
    )
    data = build_data(config, train=False)
    assert data.train_loader is None and data.mixup is None and seen(data.val_loader) == 9


def test_imagenet_has_exactly_1000_classes(tmp_path):
    config = settings(
        tmp_path, DATA__DATASET="imagenet", DATA__DATA_PATH=fakes.class_folder(tmp_path / "few")
    )
    refused("imagenet has 1000 classes, .* has 3; .*DATA.DATASET folder", config)
    root = fakes.class_folder(tmp_path / "all", imagenet_wnids(), train=0, val=1)
    data = build_data(
        settings(tmp_path, DATA__DATASET="imagenet", DATA__DATA_PATH=root), train=False
    )
    assert data.num_classes == 1000 and data.class_names[1] == "goldfish, Carassius auratus"
    assert data.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("maps", [True, False], ids=["maps", "generated"])
def test_imagenet_in_zip_mode_equals_the_folder(tmp_path, maps):
    root = fakes.class_folder(tmp_path / "folders", imagenet_wnids(), train=1, val=1)
    packed = fakes.zipped(root, tmp_path / "zip")
    if maps:
        fakes.map_files(root, packed)
    common = {"DATA__DATASET": "imagenet", "DATA__BATCH_SIZE": 100}
    plain = build_data(settings(tmp_path, **common, DATA__DATA_PATH=root))
    zipped = build_data(
        settings(tmp_path, **common, DATA__DATA_PATH=packed, DATA__ZIP_MODE=True),
        rank=1,
        world_size=2,
    )
    assert zipped.class_names == plain.class_names and len(zipped.train_loader) == 5
    one, other = plain.train_loader.dataset, zipped.train_loader.dataset
    for index in (0, 1, 500, 999):
        assert (
            torch.equal(one[index][0], other[index][0])
            and one[index][1] == other[index][1] == index
        )


@pytest.mark.parametrize("maps", [True, False], ids=["maps", "generated"])
def test_archives_of_classes_of_ones_own_equal_the_folder(tmp_path, maps):
    root = fakes.class_folder(tmp_path / "folders")
    packed = fakes.zipped(root, tmp_path / "zip")
    if maps:
        fakes.map_files(root, packed)
    common = {"DATA__DATASET": "folder", **PLAIN}
    plain = build_data(settings(tmp_path, **common, DATA__DATA_PATH=root))
    zipped = build_data(settings(tmp_path, **common, DATA__DATA_PATH=packed, DATA__ZIP_MODE=True))
    assert zipped.class_names == plain.class_names == ["ant", "bee", "cat"]
    for one, other in zip(plain.val_loader, zipped.val_loader, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_imagenet22k_and_tiny_imagenet_name_their_classes(tmp_path):
    data = build_data(
        settings(
            tmp_path,
            DATA__DATASET="imagenet22K",
            DATA__DATA_PATH=fakes.imagenet22k(tmp_path / "22k"),
        )
    )
    assert data.num_classes == len(data.class_names) == 21841 and seen(data.val_loader) == 6
    wnids = imagenet_wnids()[:200][::-1]
    data = build_data(
        settings(
            tmp_path,
            DATA__DATASET="tiny_imagenet",
            DATA__DATA_PATH=fakes.tiny_imagenet(tmp_path / "tiny", wnids),
        )
    )
    assert (
        data.num_classes == 200
        and data.class_names[0] == "tench, Tinca tinca"
        and data.std == (0.2770, 0.2691, 0.2821)
    )


def test_cifar_and_svhn_run_from_end_to_end(tmp_path, monkeypatch):
    fakes.cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    fakes.svhn(tmp_path, datasets.SVHN, monkeypatch)
    for name, count in (("cifar10", 4), ("svhn", 6)):
        data = build_data(
            settings(tmp_path, DATA__DATASET=name, DATA__DATA_PATH=tmp_path, DATA__IMG_SIZE=32)
        )
        assert data.num_classes == 10 and seen(data.val_loader) == count
        assert next(data.train_loader.epoch(0))[0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_digits_need_no_path_and_come_in_one_or_three_channels(tmp_path, channels, affine):
    data = build_data(
        settings(tmp_path, **{**DIGITS, "AUG__AFFINE": affine}, MODEL__SWIN__IN_CHANS=channels)
    )
    images, _ = next(data.train_loader.epoch(0))
    assert (
        images.shape == (4, channels, 16, 16)
        and len(data.train_loader) == 1433 // 4
        and seen(data.val_loader) == 364
    )
    assert data.num_classes == 10 and data.class_names == list("0123456789")


def test_digits_are_bit_identical_for_any_number_of_workers_and_from_any_batch(tmp_path):
    loaders = [
        build_data(
            settings(tmp_path, **DIGITS, DATA__BATCH_SIZE=256, DATA__NUM_WORKERS=workers)
        ).train_loader
        for workers in (0, 2)
    ]
    for epoch in (0, 1):
        whole, other = (list(loader.epoch(epoch)) for loader in loaders)
        rest = list(loaders[1].epoch(epoch, 3))
        assert len(whole) == 5 and all(
            torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
            for a, b in zip(whole, other, strict=True)
        )
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[3:], rest, strict=True))


def test_training_and_validation_digits_are_normalised_alike(tmp_path):
    data = build_data(
        settings(
            tmp_path,
            **{**DIGITS, "AUG__AFFINE": False, "AUG__RANDOM_CROP_PADDING": 0},
            DATA__BATCH_SIZE=64,
        )
    )
    train = torch.cat([images for images, _ in data.train_loader.epoch(0)])
    val = torch.cat([images for images, _ in data.val_loader])
    assert train.mean() == pytest.approx(
        val.mean().item(), abs=0.05
    ) and train.std() == pytest.approx(val.std().item(), abs=0.05)
    assert abs(val.mean()) < 0.1 and val.min() == pytest.approx(-0.305 / 0.376)


def test_a_run_without_data_or_with_fewer_images_than_a_batch_is_refused(tmp_path):
    refused("DATASET imagenet needs DATA.DATA_PATH .*DATA.DATASET digits", settings(tmp_path))
    own = {"DATA__DATASET": "folder", "DATA__DATA_PATH": fakes.class_folder(tmp_path)}
    refused("BATCH_SIZE 4 x 9 process", settings(tmp_path, **own, **PLAIN), world_size=9)
    grey = settings(tmp_path, **DIGITS, MODEL__SWIN__IN_CHANS=2, THROUGHPUT_MODE=True)
    refused("IN_CHANS 2: images are read as grey .1. or RGB .3.", grey)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {**DIGITS, "AUG__AUTO_AUGMENT": "rand-m9"},
            "AUG.AFFINE True replaces .*AUTO_AUGMENT none",
        ),
        ({"AUG__AFFINE": True}, "AUG.AFFINE True is made for DATA.DATASET 'digits', not imagenet"),
        ({"DATA__DOWNLOAD": True}, "needs DATA.DATASET 'cifar10' or 'cifar100' or 'svhn'"),
        (
            {"DATA__ZIP_MODE": True, "DATA__DATASET": "cifar10"},
            "DATASET 'folder' or 'imagenet', not 'cifar10'",
        ),
        ({"MODEL__SWIN__IN_CHANS": 2}, "IN_CHANS 2: images are read as grey .1. or RGB .3."),
        ({"DATA__BATCH_SIZE": 5}, "DATA.BATCH_SIZE 5 is odd"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_config(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        settings(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_a_million_files_take_tens_of_megabytes_not_hundreds():
    files = FileList((f"n01440764/n01440764_{i}.JPEG", i) for i in range(20000))
    size = len(files._names) + files._ends.nbytes + files.labels.nbytes
    assert size / len(files) < 50  # bytes an image, of which 16 are offset and label
