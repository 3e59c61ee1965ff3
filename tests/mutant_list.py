"""The faults of tests/mutants.py: a file, one of its lines, the line with the fault, and the tests
that have to see it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file`; `tests` are files or tests as pytest takes them."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ARRIVAL = "tests/test_arrival.py::test_every_"
MODEL = ARRIVAL + "setting_of_a_model_changes_what_it_computes_or_is_refused[{}]"
ARGUMENT = "tests/test_wires.py::test_every_setting_of_a_model_is_the_argument_of_its_name[{}]"
DATA = ARRIVAL + "setting_of_the_data_changes_what_is_seen_or_is_refused"
RUN = ARRIVAL + "other_setting_changes_a_run_or_is_refused"
WIRE = "tests/test_wires.py::test_{}"
AUGMENTATION = WIRE.format("augmentation_has_the_values_of_the_settings")
DIGITS = WIRE.format("digits_are_augmented_by_the_settings")


def mutants(file: str, *entries: tuple[str, str, str, str]) -> list[Mutant]:
    """Faults of one file, each (name, old, new, test)."""
    return [Mutant(name, file, old, new, (test,)) for name, old, new, test in entries]


def dropped(file: str, test: str, *lines: str) -> list[Mutant]:
    """Arguments `name=value,` that are left out of a call, so that the default stands."""
    stem = file.rpartition("/")[2].removesuffix(".py")
    return [
        Mutant(f"{stem}_without_{line.partition('=')[0]}", file, f" {line},\n", "\n", (test,))
        for line in lines
    ]


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
            WIRE.format("cutmix_has_its_own_alpha"),
        ),
        (
            "validation_shared_although_sequential",
            "if config.TEST.SEQUENTIAL:",
            "if False:",
            WIRE.format("a_rank_sees_its_share_of_the_data"),
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
            WIRE.format("a_rank_sees_its_share_of_the_data"),
        ),
        (
            "erasing_always_by_noise",
            "        mode=aug.REMODE,\n",
            "\n",
            DIGITS,
        ),
        (
            "normalised_by_the_deviation_twice",
            "*entry.statistics(channels_of(config), config.DATA.MEAN, config.DATA.STD)",
            "*entry.statistics(channels_of(config), config.DATA.STD, config.DATA.STD)",
            AUGMENTATION,
        ),
        (
            "loaders_stay_open",
            "                loader.close()",
            "                pass",
            WIRE.format("loading_processes_end_with_the_run_however_it_ends"),
        ),
    ),
]

MODEL_MUTANTS = [
    *dropped("models/vit.py", ARGUMENT.format("vit"), "layer_scale=node.LAYER_SCALE"),
    *dropped("models/vit.py", ARGUMENT.format("vit"), "pool=node.POOL", "head_dim=node.HEAD_DIM"),
    *dropped(
        "models/base/tokens.py",
        ARGUMENT.format("vit"),
        "drop_path_profile=model.DROP_PATH_PROFILE",
        "norm_eps=node.NORM_EPS",
        "qkv_bias=node.QKV_BIAS",
    ),
    *dropped(
        "models/base/pyramid.py",
        ARGUMENT.format("swin"),
        "pre_mlp_drop_path=model.PRE_MLP.DROP_PATH",
        "pre_mlp_ratio=model.PRE_MLP.RATIO",
        "patch_norm=node.PATCH_NORM",
        "dynamic_img_size=model.DYNAMIC_IMG_SIZE",
        "use_checkpoint=config.TRAIN.USE_CHECKPOINT",
        "drop_path_profile=model.DROP_PATH_PROFILE",
    ),
    *dropped("models/swin_transformer.py", ARGUMENT.format("swin"), "qk_scale=node.QK_SCALE"),
    *dropped("models/cait.py", MODEL.format("cait"), "class_mixing=node.CLASS_MIXING"),
    *dropped("models/pit.py", MODEL.format("pit"), "class_position=node.CLASS_POSITION"),
    *dropped("models/t2t.py", MODEL.format("t2t"), "modified=node.MODIFIED"),
    *dropped(
        "models/refined_vit.py",
        ARGUMENT.format("refined_vit"),
        "cos_pairs=node.COS_PAIRS",
        "mlp_gain=node.MLP_GAIN",
    ),
    *dropped("models/swiftformer.py", ARGUMENT.format("swiftformer"), "vit_num=node.VIT_NUM"),
    *dropped("models/sasa_resnet.py", ARGUMENT.format("sasa_resnet"), "content=node.CONTENT"),
    *dropped(
        "models/timm_models.py",
        "tests/test_arrival.py::test_released_weights_are_asked_for_by_name",
        "pretrained=node.PRETRAINED",
    ),
    *dropped("models/base/options.py", MODEL.format("vit"), "drop=node.DROP"),
    *dropped("models/base/options.py", MODEL.format("swinv2"), "bias_sigmoid=node.BIAS_SIGMOID"),
    *mutants(
        "models/base/pyramid.py",
        (
            "pre_mlp_without_its_drop_path",
            "drop_path if options.pre_mlp_drop_path else 0.0,",
            "0.0,",
            MODEL.format("swin"),
        ),
        (
            "blocks_without_dropout",
            "            drop=options.drop_rate,\n",
            "\n",
            WIRE.format("rates_reach_every_block"),
        ),
    ),
    *mutants(
        "models/build.py",
        (
            "batch_norms_keep_their_momentum",
            "        norm.momentum = momentum",
            "        norm.momentum = norm.momentum",
            MODEL.format("sasa_resnet"),
        ),
        (
            "classes_of_the_settings_not_of_the_data",
            "    if num_classes is None:",
            "    if True:",
            ARGUMENT.format("vit"),
        ),
    ),
]

ENGINE_MUTANTS = [
    *mutants(
        "engine/trainer.py",
        (
            "clipped_by_norm_always",
            "clip_gradients(self.parameters, self.clip, self.clip_mode, self.classifier)",
            'clip_gradients(self.parameters, self.clip, "norm", self.classifier)',
            RUN,
        ),
        (
            "classifier_clipped_too",
            "clip_gradients(self.parameters, self.clip, self.clip_mode, self.classifier)",
            "clip_gradients(self.parameters, self.clip, self.clip_mode)",
            "tests/engine/test_training.py::test_the_adaptive_clip_leaves_the_classifier_alone",
        ),
        (
            "the_average_leads_always",
            "if ema is not None and ema_leads else model",
            "if ema is not None else model",
            WIRE.format("the_average_is_evaluated_and_exported_where_it_leads"),
        ),
        (
            "the_average_stands_still",
            "            self.ema.update(self.model)",
            "            pass",
            WIRE.format("the_average_follows_its_decay"),
        ),
        (
            "images_in_their_own_memory_order",
            ", memory_format=self.memory_format)",
            ")",
            WIRE.format("channels_last_reaches_weights_and_images"),
        ),
        (
            "schedule_without_the_epochs",
            "(state.epoch * batches_per_epoch + state.batch - 1)",
            "(state.batch - 1)",
            "tests/engine/test_training.py",
        ),
        (
            "resuming_without_random_states",
            '            restore_rng(mine["rng"], self.device)',
            "            pass",
            WIRE.format("a_run_stopped_by_a_signal_goes_on_and_ends_as_one_that_never_stopped"),
        ),
        (
            "resuming_without_the_schedule",
            '        self.scheduler.load_state_dict(saved["lr_scheduler"])',
            "",
            WIRE.format("a_run_stopped_by_a_signal_goes_on_and_ends_as_one_that_never_stopped"),
        ),
    ),
    *mutants(
        "engine/train.py",
        (
            "means_of_all_epochs_so_far",
            "        trainer.statistics.start_epoch()",
            "        pass",
            WIRE.format("an_epochs_means_are_those_of_its_own_updates"),
        ),
        (
            "no_checkpoint_inside_an_epoch",
            "        if plan.save_steps and",
            "        if False and",
            WIRE.format("a_run_saves_and_stops_after_the_updates_it_is_told"),
        ),
        (
            "no_limit_of_updates",
            "    return 0 < plan.max_steps <= state.update",
            "    return False",
            WIRE.format("a_run_saves_and_stops_after_the_updates_it_is_told"),
        ),
        (
            "the_last_epoch_is_not_kept",
            "        final = state.epoch == plan.epochs",
            "        final = False",
            WIRE.format("a_run_keeps_the_epochs_it_is_told"),
        ),
        (
            "best_weights_without_metadata",
            '            **extra.get("metadata", {}),\n',
            "\n",
            WIRE.format("a_checkpoint_holds_the_settings_and_says_what_its_weights_are"),
        ),
        (
            "divergence_is_let_pass",
            "    if streak < limit:",
            "    if True:",
            RUN,
        ),
    ),
    *mutants(
        "engine/ema.py",
        (
            "usual_decay",
            "ModelEmaV3(unwrap(model), decay=decay, exclude_buffers=True)",
            "ModelEmaV3(unwrap(model), exclude_buffers=True)",
            WIRE.format("the_average_follows_its_decay"),
        ),
    ),
    *mutants(
        "engine/progress.py",
        (
            "remaining_time_without_validation",
            "return self.mean * updates + self.between_epochs * ends",
            "return self.mean * updates",
            "tests/engine/test_report.py",
        ),
        (
            "remaining_time_of_all_epochs",
            "        ahead = self.updates_per_epoch - self._done(state)",
            "        ahead = self.updates_per_epoch",
            "tests/engine/test_report.py",
        ),
    ),
    *mutants(
        "engine/evaluate.py",
        (
            "every_process_counts_alone",
            "    if reduce and dist.is_available()",
            "    if not reduce and dist.is_available()",
            WIRE.format("only_shared_evaluations_are_added_up_over_processes"),
        ),
        (
            "evaluation_without_autocast",
            "            with entered(autocast):",
            "            with entered(None):",
            WIRE.format("autocast_reaches_training_evaluation_and_timing"),
        ),
    ),
    *mutants(
        "engine/losses.py",
        (
            "targets_are_not_smoothed",
            "label_smoothing=self.smoothing",
            "label_smoothing=0.0",
            RUN,
        ),
    ),
    *mutants(
        "engine/state.py",
        (
            "every_epoch_is_kept",
            "        if last or epoch % self.save_freq == 0:",
            "        if True:",
            WIRE.format("a_run_keeps_the_epochs_it_is_told"),
        ),
    ),
]

SCHEDULE = WIRE.format("the_schedule_has_the_epochs_of_the_settings")
RATE = WIRE.format("the_optimizer_has_the_settings_and_the_scaled_rate")

RATE_MUTANTS = [
    *dropped("lr_scheduler.py", SCHEDULE, "warmup_prefix=bool(settings.WARMUP_PREFIX)"),
    *mutants(
        "lr_scheduler.py",
        (
            "cooldown_counts_as_training",
            "(train.EPOCHS - train.COOLDOWN_EPOCHS) * updates_per_epoch",
            "train.EPOCHS * updates_per_epoch",
            SCHEDULE,
        ),
        ("warmup_of_no_epoch", "int(train.WARMUP_EPOCHS * updates_per_epoch)", "0", SCHEDULE),
        ("floor_and_start_swapped", "minimum=rates.minimum", "minimum=rates.warmup", SCHEDULE),
        (
            "one_factor_for_all_falls",
            'settings.GAMMA if settings.NAME == "multistep" else settings.DECAY_RATE',
            "settings.DECAY_RATE",
            SCHEDULE,
        ),
        (
            "rate_without_accumulation",
            "max(train.ACCUMULATION_STEPS, 1)",
            "1",
            "tests/test_lr_scheduler.py::test_rates_scale_with_batch_processes_and_accumulation",
        ),
        ("the_floor_is_nothing", "scaled(train.MIN_LR)", "0.0", RUN),
    ),
    *mutants(
        "optimizer.py",
        (
            "vectors_are_spared_always",
            "train.LAYER_DECAY, train.DECAY_ALL)",
            "train.LAYER_DECAY)",
            RUN,
        ),
        (
            "all_layers_alike",
            "train.WEIGHT_DECAY, train.LAYER_DECAY,",
            "train.WEIGHT_DECAY, 1.0,",
            RUN,
        ),
        ("query_rows_decay_as_usual", "    if train.QK_WEIGHT_DECAY != 1:", "    if False:", RUN),
        (
            "layers_decayed_but_not_slowed",
            "**_group(decay, lr * scale, weight_decay)",
            "**_group(decay, lr, weight_decay)",
            RUN,
        ),
    ),
]

SGD = WIRE.format("sgd_has_its_momentum")
OPTIMIZER_MUTANTS = [
    *dropped("optimizer.py", RATE, "betas=request.betas"),
    *dropped("optimizer.py", SGD, "nesterov=request.momentum > 0"),
    *mutants(
        "optimizer.py",
        ("usual_epsilon", "eps=request.eps,\n        fused=", "fused=", RATE),
        ("no_momentum", "momentum=request.momentum,\n        nesterov=", "nesterov=", SGD),
        ("momentum_of_nothing", "momentum=settings.MOMENTUM", "momentum=0.9", SGD),
        ("moments_swapped", "tuple(settings.BETAS)", "tuple(settings.BETAS[::-1])", RATE),
    ),
]

SAVES = WIRE.format("a_run_saves_and_stops_after_the_updates_it_is_told")
KEEPS = WIRE.format("a_run_keeps_the_epochs_it_is_told")
ASKED = WIRE.format("what_is_asked_of_torch_is_what_is_configured")
LEADS = WIRE.format("the_average_is_evaluated_and_exported_where_it_leads")
TEACHER = WIRE.format("a_teacher_without_a_share_changes_nothing_and_one_with_all_of_it_decides")
MAIN_MUTANTS = [
    *dropped(
        "main.py",
        RUN,
        "clip=config.TRAIN.CLIP_GRAD",
        "clip_mode=config.TRAIN.CLIP_MODE",
        "mixup=self.data.mixup",
        "max_nonfinite=config.TRAIN.MAX_NONFINITE",
    ),
    *dropped(
        "main.py",
        SAVES,
        "save_steps=config.TRAIN.SAVE_STEPS",
        "max_steps=config.TRAIN.MAX_STEPS",
    ),
    *dropped("main.py", ASKED, "compile=config.MODEL.COMPILE"),
    *dropped("main.py", LEADS, "ema_leads=config.MODEL.EMA.EVAL"),
    *dropped(
        "main.py",
        WIRE.format("a_run_begins_at_the_epoch_it_is_told"),
        "start_epoch=config.TRAIN.START_EPOCH",
    ),
    *dropped(
        "main.py",
        WIRE.format("channels_last_reaches_weights_and_images"),
        "channels_last=config.MODEL.CHANNELS_LAST",
    ),
    *dropped(
        "main.py",
        WIRE.format("autocast_reaches_training_evaluation_and_timing"),
        "dtype=self.dtype",
        "autocast=self.autocast",
    ),
    *dropped(
        "main.py",
        WIRE.format("only_shared_evaluations_are_added_up_over_processes"),
        "reduce=not test.SEQUENTIAL",
    ),
    *dropped(
        "main.py",
        WIRE.format("the_classes_and_their_accuracy_are_written_where_asked_for"),
        "per_class=test.PER_CLASS",
    ),
    *dropped("main.py", TEACHER, "alpha=node.ALPHA", "tau=node.TAU"),
    *mutants(
        "main.py",
        (
            "ranks_draw_the_same_numbers",
            "utils.seed_everything(config.SEED + self.world.rank)",
            "utils.seed_everything(config.SEED)",
            WIRE.format("processes_begin_with_the_same_weights_and_draw_numbers_of_their_own"),
        ),
        (
            "ranks_begin_with_other_weights",
            "utils.seed_everything(config.SEED)  #",
            "utils.seed_everything(config.SEED + world.rank)  #",
            WIRE.format("processes_begin_with_the_same_weights_and_draw_numbers_of_their_own"),
        ),
        (
            "the_usual_average",
            "config.MODEL.EMA.DECAY if config.MODEL.EMA.ENABLE else None",
            "0.9999 if config.MODEL.EMA.ENABLE else None",
            WIRE.format("the_average_follows_its_decay"),
        ),
        (
            "keeping_and_saving_swapped",
            "save_freq=config.SAVE_FREQ,\n            keep=config.TRAIN.KEEP,",
            "save_freq=config.TRAIN.KEEP,\n            keep=config.SAVE_FREQ,",
            KEEPS,
        ),
        (
            "no_smoothing_without_mixup",
            "make_criterion(self.data.soft_targets, config.MODEL.LABEL_SMOOTHING)",
            "make_criterion(self.data.soft_targets)",
            RUN,
        ),
        (
            "threads_as_they_are",
            "prepare_device(world.device, config.TRAIN.THREADS, config.TRAIN.DETERMINISTIC)",
            "prepare_device(world.device, 0, config.TRAIN.DETERMINISTIC)",
            ASKED,
        ),
        (
            "precision_as_the_device_likes",
            "choose_precision(world.device, config.AMP_DTYPE, config.AMP_ENABLE)",
            'choose_precision(world.device, "auto", config.AMP_ENABLE)',
            WIRE.format("autocast_reaches_training_evaluation_and_timing"),
        ),
        (
            "resuming_never_by_itself",
            "config.TRAIN.AUTO_RESUME, self.world)",
            "False, self.world)",
            WIRE.format("a_run_stopped_by_a_signal_goes_on_and_ends_as_one_that_never_stopped"),
        ),
        (
            "loaded_weights_are_not_evaluated",
            "validate_first=loaded",
            "validate_first=False",
            WIRE.format("weights_to_start_from_are_evaluated_first"),
        ),
        (
            "the_head_is_kept",
            '"reset" if model.HEAD_RESET else "auto"',
            '"auto"',
            WIRE.format("the_head_begins_anew_where_asked"),
        ),
        (
            "weights_without_metadata",
            "metadata=weights_metadata(self.model)",
            "metadata={}",
            WIRE.format("a_checkpoint_holds_the_settings_and_says_what_its_weights_are"),
        ),
        (
            "the_average_is_never_tested",
            "[: 1 + averaged]",
            "[:1]",
            WIRE.format("an_evaluation_repeats_what_training_found"),
        ),
        ("no_picture", "plot=config.LOG.PLOT", "plot=False", ASKED),
        ("no_events", "tensorboard=config.LOG.TENSORBOARD", "tensorboard=False", ASKED),
        (
            "data_stay_open",
            "            self.data.close()",
            "            pass",
            WIRE.format("loading_processes_end_with_the_run_however_it_ends"),
        ),
    ),
    *dropped(
        "engine/session.py",
        WIRE.format("the_end_of_the_run_is_reckoned_from_its_settings"),
        "max_steps=plan.max_steps",
    ),
    *dropped(
        "engine/session.py",
        WIRE.format("the_picture_says_what_the_training_loss_is"),
        "training_loss=training_loss",
    ),
    *mutants(
        "engine/session.py",
        (
            "the_metric_log_begins_anew",
            "resume_step=-1 if fresh else trainer.state.update",
            "resume_step=-1",
            WIRE.format("a_run_stopped_by_a_signal_goes_on_and_ends_as_one_that_never_stopped"),
        ),
        (
            "the_second_head_learns_nothing",
            "two_heads=distillation is not None and model.has_two_heads()",
            "two_heads=False",
            "tests/engine/test_two_heads.py",
        ),
    ),
]

MUTANTS = [
    *DATA_MUTANTS,
    *MODEL_MUTANTS,
    *ENGINE_MUTANTS,
    *RATE_MUTANTS,
    *OPTIMIZER_MUTANTS,
    # *MAIN_MUTANTS,
]
