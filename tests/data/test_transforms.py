"""The evaluation transform is Swin's; the training recipe runs on today's libraries."""

import pickle
import random

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from data.errors import DataError
from data.randomness import Key, seed_sample
from data.transforms import AtLeastOneBit, eval_transform, train_transform
from tests.data.fakes import picture
from tests.helpers import golden

STATS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SWIN = {"auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.25}


def operations(transform):
    return [operation for step in transform.transforms for operation in getattr(step, "ops", ())]


def test_evaluation_transform_equals_the_reference():
    """To the last bit with the Pillow that made the vectors; other releases round the resized
    pixels by up to three levels of 8 bits.
    """
    meta, tensors = golden("eval_transform")
    same_pillow = (
        PIL.__version__.partition(".")[0] == meta["provenance"]["pillow"].partition(".")[0]
    )
    for number, case in enumerate(meta["cases"]):
        side = case["img_size"]
        transform = eval_transform(
            (side, side), **STATS, interpolation=case["interpolation"], crop=case["crop"]
        )
        output = transform(Image.fromarray(tensors[f"{number}/image"].numpy()))
        assert (output - tensors[f"{number}/output"]).abs().max() <= (
            1e-6 if same_pillow else 0.055
        )


@pytest.mark.parametrize(
    "side, shape",
    [(40, (50, 70)), (33, (97, 41)), (224, (333, 500)), (64, (64, 64)), (48, (30, 31))],
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_transform_is_resize_to_256_of_224_and_centre_crop(side, shape, interpolation):
    mode = T.InterpolationMode(interpolation)
    plain = T.Compose(
        [
            T.Resize(int(256 / 224 * side), mode),
            T.CenterCrop(side),
            T.ToTensor(),
            T.Normalize(STATS["mean"], STATS["std"]),
        ]
    )
    squash = T.Compose(
        [T.Resize((side, side), mode), T.ToTensor(), T.Normalize(STATS["mean"], STATS["std"])]
    )
    image = picture(1, shape)
    assert torch.equal(
        eval_transform((side, side), **STATS, interpolation=interpolation)(image), plain(image)
    )
    assert torch.equal(
        eval_transform((side, side), **STATS, interpolation=interpolation, crop=False)(image),
        squash(image),
    )


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (200, 60), (56, 112)])
def test_a_non_square_size_is_covered_without_distortion(shape):
    transform = eval_transform((56, 112), **STATS)
    covering = transform.transforms[0](picture(2, shape))
    assert transform(picture(2, shape)).shape == (3, 56, 112)
    assert (
        covering.height >= 64
        and covering.width >= 128
        and (covering.height == 64 or covering.width == 128)
    )
    assert abs(covering.width / covering.height - shape[1] / shape[0]) <= 0.03 * shape[1] / shape[0]


def test_images_of_32_pixels_are_not_resized_as_in_the_reference():
    train, evaluate = train_transform((32, 32), **STATS), eval_transform((32, 32), **STATS)
    image = picture(3, (32, 32))
    pixels = T.Compose([T.ToTensor(), T.Normalize(STATS["mean"], STATS["std"])])(image)
    assert torch.equal(evaluate(image), pixels)
    crop = train.transforms[1]
    assert isinstance(crop, T.RandomCrop) and crop.size == (32, 32) and crop.padding == 4
    assert train.transforms[0](image) is image


def test_crop_padding_replaces_the_resized_crop_at_any_size():
    crop = train_transform((64, 64), **STATS, crop_padding=8).transforms[1]
    assert isinstance(crop, T.RandomCrop) and crop.padding == 8


def test_the_stock_recipe_has_the_reference_steps_in_order():
    steps = [
        type(step).__name__ for step in train_transform((224, 224), **STATS, **SWIN).transforms
    ]
    assert steps == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    steps = [type(step).__name__ for step in train_transform((224, 224), **STATS).transforms]
    assert steps[2] == "ColorJitter" and "RandomErasing" not in steps


POLICIES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m10-inc1",
    "rand-m9-mstd0.5",
    "augmix-m10-w3",
    "v0",
    "v0r",
    "original",
    "3a",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_posterize_keeps_a_bit_at_the_worst_level(policy):
    transform = train_transform((40, 40), **STATS, auto_augment=policy)
    lists = [getattr(step, "policy", None) for step in transform.transforms]
    found = operations(transform) + [
        operation for policy in lists if policy for sub in policy for operation in sub
    ]
    posterize = [operation for operation in found if operation.name.startswith("Posterize")]
    assert posterize or policy == "3a"
    for operation in posterize:
        for magnitude in (0, 10):
            (
                operation.prob,
                operation.magnitude,
                operation.magnitude_std,
                operation.magnitude_max,
            ) = (
                1.0,
                magnitude,
                0,
                None,
            )
            levels = np.unique(np.asarray(operation(picture(0))))
            assert operation.level_fn(magnitude, operation.hparams)[0] >= 1 and len(levels) >= 2


def test_timm_alone_still_asks_for_zero_bits():
    """Once this fails, AtLeastOneBit can go."""
    from timm.data.auto_augment import AugmentOp

    worst = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert worst.level_fn(10, worst.hparams) == (0,)
    assert AtLeastOneBit(worst.level_fn)(10, worst.hparams) == (1,)
    assert AtLeastOneBit(worst.level_fn)(5, worst.hparams) == worst.level_fn(5, worst.hparams)


@pytest.mark.parametrize("size", [(40, 40), (32, 32), (33, 65)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_stock_recipe_gives_finite_images_of_the_asked_shape(size, channels):
    stats = {"mean": STATS["mean"][:channels], "std": STATS["std"][:channels]}
    transform = pickle.loads(pickle.dumps(train_transform(size, **stats, **SWIN)))
    for number in range(60):
        seed_sample(0, Key(0, number))
        output = transform(picture(number % 5))
        assert (
            output.shape == (channels, *size)
            and output.dtype == torch.float32
            and output.isfinite().all()
        )


def test_random_interpolation_trains_and_evaluates_as_bilinear():
    random.seed(0)
    assert train_transform((40, 40), **STATS, interpolation="random")(picture(0)).shape == (
        3,
        40,
        40,
    )
    outputs = [
        eval_transform((40, 40), **STATS, interpolation=name)(picture(0))
        for name in ("random", "bilinear")
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("interpolation", ["lanczos", "hamming"])
def test_a_policy_rotates_bicubically_where_the_filter_only_resizes(interpolation):
    recipe = {**STATS, "auto_augment": "rand-m9-mstd0.5-inc1"}
    transform = train_transform((40, 40), **recipe, interpolation=interpolation)
    bicubic = train_transform((40, 40), **recipe, interpolation="bicubic")
    for number in range(40):
        seed_sample(0, Key(0, number))
        assert transform(picture(number)).isfinite().all()
    crop, policy = transform.transforms[0], repr(operations(transform)[0].kwargs)
    assert "lanczos" in repr(crop) or "hamming" in repr(crop)
    assert policy == repr(operations(bicubic)[0].kwargs)


def test_values_unknown_to_timm_are_refused_with_examples():
    with pytest.raises(DataError, match="AUTO_AUGMENT 'rnd-m9'.*rand-m9-mstd0.5-inc1"):
        train_transform((40, 40), **STATS, auto_augment="rnd-m9")
    with pytest.raises(
        DataError, match="INTERPOLATION 'cubic' is unknown; allowed: random, bilinear"
    ):
        eval_transform((40, 40), **STATS, interpolation="cubic")


@pytest.mark.parametrize(
    "policy, words",
    [
        ("rand-nonsense", "'nonsense' is no setting of rand; allowed: m, n, p, mstd"),
        ("rand-m", "'m' is no setting"),
        ("rand-m9-", "'' is no setting"),
        ("rand-m9-m5", "sets m twice"),
        ("rand-m9-tnothing", "'tnothing' is no setting"),
        ("rand-w0", "'w0' is no setting"),
        ("augmix-x", "'x' is no setting of augmix"),
        ("original-m9", "'m9' is no setting of original"),
        ("random-m9", "is unknown"),
        ("RAND-m9", "did you mean 'rand'"),
        ("imagenet-m9", "is unknown"),
    ],
)
def test_a_part_of_a_policy_that_timm_would_ignore_is_refused(policy, words):
    with pytest.raises(DataError, match=f"AUTO_AUGMENT '{policy}'.*{words}") as caught:
        train_transform((40, 40), **STATS, auto_augment=policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "policy", ["rand-m9-n3-p0.5-mstd0.5-mmax12-inc1-t3a", "augmix-m5-w4-d2-b1"]
)
def test_every_setting_of_a_policy_is_taken(policy):
    assert train_transform((40, 40), **STATS, auto_augment=policy)


LEARNED = {
    "cifar10": T.AutoAugmentPolicy.CIFAR10,
    "svhn": T.AutoAugmentPolicy.SVHN,
    "imagenet": T.AutoAugmentPolicy.IMAGENET,
}


@pytest.mark.parametrize("policy", LEARNED)
def test_a_learned_policy_is_torchvisions_after_crop_and_mirror(policy):
    transform = train_transform(
        (32, 32), **STATS, auto_augment=policy, hflip=0.5, erase_prob=0.25, erase_mode="const"
    )
    names = [type(step).__name__ for step in transform.transforms]
    assert names == [
        "Resize",
        "RandomCrop",
        "RandomHorizontalFlip",
        "AutoAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    step = transform.transforms[3]
    assert step.policy == LEARNED[policy] and step.fill == [124, 116, 104]  # 255 times the mean


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", LEARNED)
def test_a_learned_policy_changes_the_image(policy, channels):
    stats = {"mean": STATS["mean"][:channels], "std": STATS["std"][:channels]}
    augment, plain = (
        train_transform(
            (32, 32), **stats, auto_augment=name, hflip=0, crop_padding=0, color_jitter=0
        )
        for name in (policy, "none")
    )
    image, outputs = picture(3, (32, 32)), []
    for number in range(30):
        seed_sample(0, Key(0, number))
        outputs.append(augment(image))
        assert outputs[-1].shape == (channels, 32, 32) and outputs[-1].isfinite().all()
    changed = sum(not torch.equal(output, plain(image)) for output in outputs)
    assert changed >= 10 and len({output.numpy().tobytes() for output in outputs}) >= 10


def test_random_erasing_fills_at_most_the_asked_area_with_the_mean():
    transform = train_transform(
        (64, 64),
        **STATS,
        hflip=0,
        crop_padding=0,
        color_jitter=0,
        erase_prob=1.0,
        erase_mode="const",
        erase_area=(0.3, 0.4),
    )
    for number in range(40):
        seed_sample(0, Key(0, number))
        erased = (transform(picture(3, (64, 64))) == 0).all(0)
        rows, columns = erased.any(1).sum().item(), erased.any(0).sum().item()
        assert (
            0.28 <= erased.float().mean() <= 0.42 and rows * columns == erased.sum()
        )  # a rectangle, rounded to whole pixels
        assert 0.28 <= rows / columns <= 3.6
