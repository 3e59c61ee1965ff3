"""Faults on the way from settings to images."""

from tests.wiring.faults import DATA, ON_DATA, ON_RUNS, dropped, mutants

AUGMENTATION = ON_DATA.format("augmentation_has_the_values_of_the_settings")
DIGITS = ON_DATA.format("digits_are_augmented_by_the_settings")

DATA_MUTANTS = [
    *dropped(
        "data/build.py",
        AUGMENTATION,
        "scale=aug.SCALE",
        "ratio=aug.RATIO",
        "color_jitter=aug.COLOR_JITTER",
        "erase_count=aug.RECOUNT",
        "erase_mode=aug.REMODE",
        "erase_area=aug.REAREA",
        "erase_prob=aug.REPROB",
        "crop_ratio=config.DATA.CROP_RATIO",
        "switch_prob=aug.MIXUP_SWITCH_PROB",
        "prob=aug.MIXUP_PROB",
        "mode=aug.MIXUP_MODE",
        "cutmix_minmax=aug.CUTMIX_MINMAX",
    ),
    *dropped(
        "data/build.py",
        DATA,
        "auto_augment=aug.AUTO_AUGMENT",
        "crop_padding=aug.RANDOM_CROP_PADDING",
        "crop=config.TEST.CROP",
        "download=config.DATA.DOWNLOAD",
        "zipped=config.DATA.ZIP_MODE",
        "cache=config.DATA.CACHE_MODE",
        "timeout=config.DATA.TIMEOUT",
        "num_workers=config.DATA.NUM_WORKERS",
        "corrupt_limit=config.DATA.CORRUPT_LIMIT",
    ),
    *dropped("data/build.py", DIGITS, "max_count=aug.RECOUNT", "copies=config.DATA.REPEATED_AUG"),
    *mutants(
        "data/build.py",
        (
            "mixup_without_label_smoothing",
            "smoothing=config.MODEL.LABEL_SMOOTHING",
            "smoothing=0.0",
            AUGMENTATION,
        ),
        (
            "mixup_and_cutmix_swapped",
            "mixup=aug.MIXUP,\n        cutmix=aug.CUTMIX,",
            "mixup=aug.CUTMIX,\n        cutmix=aug.MIXUP,",
            ON_DATA.format("cutmix_has_its_own_alpha"),
        ),
        (
            "validation_shared_although_sequential",
            "if config.TEST.SEQUENTIAL:",
            "if False:",
            ON_DATA.format("a_rank_sees_its_share_of_the_data"),
        ),
        (
            "validation_in_file_order",
            "        config.TEST.SHUFFLE,\n        config.SEED,",
            "        False,\n        config.SEED,",
            DATA,
        ),
        (
            "memory_pinned_without_being_asked",
            "pin_memory=config.DATA.PIN_MEMORY and on_cuda",
            "pin_memory=on_cuda",
            DATA,
        ),
        (
            "training_order_of_the_first_rank",
            "        config.SEED,\n        shard.rank,",
            "        config.SEED,\n        0,",
            ON_DATA.format("a_rank_sees_its_share_of_the_data"),
        ),
        (
            "erasing_always_by_noise",
            "        mode=aug.REMODE,\n",
            "\n",
            DIGITS,
        ),
        (
            "normalised_by_the_deviation_twice",
            "config.DATA.MEAN, config.DATA.STD)",
            "config.DATA.STD, config.DATA.STD)",
            AUGMENTATION,
        ),
        (
            "validation_always_in_the_same_random_order",
            "        config.TEST.SHUFFLE,\n        config.SEED,",
            "        config.TEST.SHUFFLE,\n        0,",
            ON_DATA.format("each_order_and_each_sample_follows_the_seed"),
        ),
        (
            "loaders_stay_open",
            "                loader.close()",
            "                pass",
            ON_RUNS.format("loading_processes_end_with_the_run_however_it_ends"),
        ),
    ),
]
