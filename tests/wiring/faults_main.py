"""Faults on the way from settings to runs."""

from tests.wiring.faults import GOING_ON, MODEL_RUN, ON_RUNS, PROGRAM, TRAIN_RUN, dropped, mutants

SAVES = ON_RUNS.format("a_run_saves_and_stops_after_the_updates_it_is_told")
KEEPS = ON_RUNS.format("a_run_keeps_the_epochs_it_is_told")
ASKED = ON_RUNS.format("what_is_asked_of_torch_is_what_is_configured")
LEADS = ON_RUNS.format("the_average_is_evaluated_and_exported_where_it_leads")
TEACHER = GOING_ON.format(
    "a_teacher_without_a_share_changes_nothing_and_one_with_all_of_it_decides"
)
ALONE = ON_RUNS.format("processes_begin_with_the_same_weights_and_draw_numbers_of_their_own")
PRECISION = ON_RUNS.format("autocast_reaches_training_evaluation_and_timing")
RESUMED = GOING_ON.format("a_run_stopped_by_a_signal_goes_on_and_ends_as_one_that_never_stopped")

MAIN_MUTANTS = [
    *dropped(PROGRAM, MODEL_RUN, "mixup=self.data.mixup"),
    *dropped(PROGRAM, PRECISION, "dtype=self.dtype"),
    *dropped(
        PROGRAM,
        ON_RUNS.format("only_shared_evaluations_are_added_up_over_processes"),
        "reduce=not test.SEQUENTIAL",
    ),
    *dropped(
        PROGRAM,
        ON_RUNS.format("the_classes_and_their_accuracy_are_written_where_asked_for"),
        "per_class=test.PER_CLASS",
    ),
    *mutants(
        PROGRAM,
        (
            "evaluated_without_autocast",
            "            autocast=self.autocast,\n            reduce=",
            "            reduce=",
            PRECISION,
        ),
        (
            "timed_without_autocast",
            "            autocast=self.autocast,\n            count=",
            "            count=",
            PRECISION,
        ),
        (
            "ranks_draw_the_same_numbers",
            "utils.seed_everything(config.SEED + self.world.rank)",
            "utils.seed_everything(config.SEED)",
            ALONE,
        ),
        (
            "ranks_begin_with_other_weights",
            "utils.seed_everything(config.SEED)  #",
            "utils.seed_everything(config.SEED + world.rank)  #",
            ALONE,
        ),
        (
            "no_smoothing_without_mixup",
            "make_criterion(self.data.soft_targets, config.MODEL.LABEL_SMOOTHING)",
            "make_criterion(self.data.soft_targets)",
            MODEL_RUN,
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
            PRECISION,
        ),
        (
            "resuming_never_by_itself",
            "self.config.TRAIN.AUTO_RESUME, self.world)",
            "False, self.world)",
            RESUMED,
        ),
        (
            "loaded_weights_are_not_evaluated",
            "validate_first=loaded",
            "validate_first=False",
            GOING_ON.format("weights_to_start_from_are_evaluated_first"),
        ),
        (
            "the_average_is_never_tested",
            "            self.load_weights(checkpoint, entry)",
            "            self.load_weights(checkpoint)",
            GOING_ON.format("an_evaluation_repeats_what_training_found"),
        ),
        (
            "a_finished_run_takes_the_settings_of_another",
            " and not updates_follow(plan[",
            " and updates_follow(plan[",
            "tests/test_continuing.py::test_a_finished_run_repeated_changes_nothing_whatever_its"
            "_places_workers_and_logs",
        ),
        ("the_teacher_has_half_of_the_loss", "alpha=node.ALPHA, ", "", TEACHER),
        ("cold_teacher", ", tau=node.TAU)", ")", TRAIN_RUN),
        (
            "classes_of_the_settings",
            "self.build_model(self.data.num_classes)",
            "self.build_model()",
            GOING_ON.format("classes_are_those_of_the_data_for_network_and_teacher"),
        ),
        (
            "every_process_writes_the_settings",
            "        if self.world.is_main and not written:",
            "        if not written:",
            ALONE,
        ),
        (
            "images_to_train_on_read_for_an_evaluation",
            "train=not self.config.EVAL_MODE",
            "train=True",
            GOING_ON.format("an_evaluation_repeats_what_training_found"),
        ),
        (
            "data_stay_open",
            "            self.data.close()",
            "            pass",
            ON_RUNS.format("loading_processes_end_with_the_run_however_it_ends"),
        ),
    ),
]

SETTINGS = "settings/arguments.py"
SETTINGS_MUTANTS = [
    *dropped(
        SETTINGS,
        TRAIN_RUN,
        "clip=config.TRAIN.CLIP_GRAD",
        "clip_mode=config.TRAIN.CLIP_MODE",
        "max_nonfinite=train.MAX_NONFINITE",
    ),
    *dropped(SETTINGS, SAVES, "save_steps=train.SAVE_STEPS", "max_steps=train.MAX_STEPS"),
    *dropped(SETTINGS, ASKED, "compile=config.MODEL.COMPILE"),
    *dropped(SETTINGS, LEADS, "ema_leads=average.EVAL"),
    *dropped(
        SETTINGS,
        ON_RUNS.format("a_run_begins_at_the_epoch_it_is_told"),
        "start_epoch=config.TRAIN.START_EPOCH",
    ),
    *dropped(
        SETTINGS,
        ON_RUNS.format("channels_last_reaches_weights_and_images"),
        "channels_last=config.MODEL.CHANNELS_LAST",
    ),
    *mutants(
        SETTINGS,
        (
            "the_usual_average",
            "ema_decay=average.DECAY if",
            "ema_decay=0.9999 if",
            ON_RUNS.format("the_average_follows_its_decay"),
        ),
        (
            "keeping_and_saving_swapped",
            "save_freq=config.SAVE_FREQ,\n        keep=train.KEEP,",
            "save_freq=train.KEEP,\n        keep=config.SAVE_FREQ,",
            KEEPS,
        ),
        (
            "the_head_is_kept",
            '"reset" if model.HEAD_RESET else "auto"',
            '"auto"',
            GOING_ON.format("the_head_begins_anew_where_asked"),
        ),
        (
            "weights_must_be_whole",
            "allow_partial=model.PARTIAL_LOAD",
            "allow_partial=False",
            MODEL_RUN,
        ),
        ("no_picture", "plot=config.LOG.PLOT", "plot=False", ASKED),
        ("no_events", "tensorboard=config.LOG.TENSORBOARD", "tensorboard=False", ASKED),
        (
            "smoothing_is_not_told",
            "smoothing=config.MODEL.LABEL_SMOOTHING",
            "smoothing=0.0",
            ON_RUNS.format("the_picture_says_what_the_training_loss_is"),
        ),
        (
            "a_checkpoint_may_fit_roughly",
            'rule="exact" if model.RESUME else "finetune"',
            'rule="finetune"',
            GOING_ON.format("a_checkpoint_has_to_fit_and_weights_may_have_another_head"),
        ),
        (
            "an_evaluation_may_begin_a_head",
            '        head = "evaluate"',
            "        pass",
            GOING_ON.format("a_checkpoint_has_to_fit_and_weights_may_have_another_head"),
        ),
        (
            "timed_in_batches_of_one",
            "batch_size=config.DATA.BATCH_SIZE",
            "batch_size=1",
            ON_RUNS.format("timing_takes_batch_size_and_channels_of_the_settings"),
        ),
    ),
]

SESSION_MUTANTS = [
    *dropped(
        "engine/session.py",
        ON_RUNS.format("the_end_of_the_run_is_reckoned_from_its_settings"),
        "max_steps=plan.max_steps",
    ),
    *dropped(
        "engine/session.py",
        ON_RUNS.format("the_picture_says_what_the_training_loss_is"),
        "training_loss=training_loss",
    ),
    *dropped(
        "engine/session.py",
        ON_RUNS.format("weights_and_biases_is_told_the_name_and_the_settings"),
        "name=name",
    ),
    *mutants(
        "engine/teacher.py",
        (
            "released_weights_although_others_are_named",
            "pretrained=not weights",
            "pretrained=True",
            GOING_ON.format("a_teacher_of_timm_has_the_weights_and_the_classes_it_should"),
        ),
    ),
    *mutants(
        "engine/session.py",
        (
            "weights_without_metadata",
            '"metadata": weights_metadata(trainer.model)',
            '"metadata": {}',
            ON_RUNS.format("a_checkpoint_holds_the_settings_and_says_what_its_weights_are"),
        ),
        (
            "the_metric_log_begins_anew",
            "resume_step=-1 if fresh else trainer.state.update",
            "resume_step=-1",
            RESUMED,
        ),
        (
            "the_second_head_learns_nothing",
            "two_heads=distillation is not None and model.has_two_heads()",
            "two_heads=False",
            GOING_ON.format("a_second_head_alone_learns_from_a_teacher_with_all_of_the_share"),
        ),
    ),
]
