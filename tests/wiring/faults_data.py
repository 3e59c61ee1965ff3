"""Faults on the way from settings to images."""

from tests.wiring.faults import DATA, ON_DATA, ON_RUNS, dropped, mutants

AUGMENTATION = ON_DATA.format("augmentation_has_the_values_of_the_settings")
DIGITS = ON_DATA.format("digits_are_augmented_by_the_settings")
LOADERS = ON_DATA.format("both_loaders_load_as_the_settings_say")
READERS = ON_DATA.format("a_reader_is_asked_for_what_the_settings_say")

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
    *mutants(
        "data/build.py",
        (
            "validation_loaded_by_itself",
            "    return Loader(dataset, batches, **_loading(config))",
            "    return Loader(dataset, batches)",
            LOADERS,
        ),
        (
            "training_loaded_by_itself",
            "LIMIT,\n        **_loading(config),",
            "LIMIT,",
            LOADERS,
        ),
        (
            "a_reader_knows_no_other_process",
            "find_sources(config, rank, world_size, train)",
            "find_sources(config, train=train)",
            READERS,
        ),
        (
            "a_reader_takes_processes_for_ranks",
            "rank=rank,\n        world_size=world_size,",
            "rank=world_size,\n        world_size=rank,",
            READERS,
        ),
        (
            "deviation_told_as_mean",
            "class_names=entry.class_names(sources.classes),\n        mean=normalisation.mean,",
            "class_names=entry.class_names(sources.classes),\n        mean=normalisation.std,",
            AUGMENTATION,
        ),
    ),
    *mutants(
        "data/loader.py",
        (
            "workers_begin_anew_each_epoch",
            '"persistent_workers": True',
            '"persistent_workers": False',
            LOADERS,
        ),
    ),
    *mutants(
        "data/datasets.py",
        (
            "augmentation_without_the_seed",
            "seed_sample(self.seed, key)",
            "seed_sample(0, key)",
            ON_DATA.format("each_order_and_each_sample_follows_the_seed"),
        ),
        (
            "replacements_without_the_seed",
            "stream(REPLACEMENT, self.seed, *key)",
            "stream(REPLACEMENT, 0, *key)",
            "tests/data/test_loader.py::test_what_replaces_a_damaged_image_follows_the_seed",
        ),
    ),
    *mutants(
        "data/affine.py",
        (
            "erasing_without_the_seed",
            "seed_sample(self.seed, key)",
            "seed_sample(0, key)",
            "tests/data/test_digits.py::test_erasing_is_a_function_of_the_key",
        ),
    ),
    *mutants(
        "data/layouts.py",
        (
            "archives_take_processes_for_ranks",
            "request.rank,\n        request.world_size",
            "request.world_size,\n        request.rank",
            ON_DATA.format("a_process_caches_its_part_of_an_archive"),
        ),
    ),
]
