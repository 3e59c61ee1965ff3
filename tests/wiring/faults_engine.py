"""Faults inside the engine."""

from tests.wiring.faults import GOING_ON, MODEL_RUN, ON_RUNS, TRAIN_RUN, mutants

SAVES = ON_RUNS.format("a_run_saves_and_stops_after_the_updates_it_is_told")
KEEPS = ON_RUNS.format("a_run_keeps_the_epochs_it_is_told")
LEADS = ON_RUNS.format("the_average_is_evaluated_and_exported_where_it_leads")
PRECISION = ON_RUNS.format("autocast_reaches_training_evaluation_and_timing")
RESTORED = "tests/engine/test_training.py::test_{}"
LOGS = "tests/engine/test_logs.py::test_{}"
SWIN = (
    "tests/engine/test_restore.py"
    "::test_a_run_of_swin_goes_on_after_its_epoch_in_updates_of_several_batches"
)
RESUMED = GOING_ON.format("a_run_stopped_by_a_signal_goes_on_and_ends_as_one_that_never_stopped")

ENGINE_MUTANTS = [
    *mutants(
        "engine/trainer.py",
        (
            "clipped_by_norm_always",
            "clip_gradients(self.parameters, self.clip, self.clip_mode, self.classifier)",
            'clip_gradients(self.parameters, self.clip, "norm", self.classifier)',
            TRAIN_RUN,
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
            LEADS,
        ),
        (
            "the_average_stands_still",
            "            self.ema.update(self.model)",
            "            pass",
            ON_RUNS.format("the_average_follows_its_decay"),
        ),
        (
            "images_in_their_own_memory_order",
            ", memory_format=self.memory_format)",
            ")",
            ON_RUNS.format("channels_last_reaches_weights_and_images"),
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
            RESUMED,
        ),
        (
            "resuming_without_the_schedule",
            'self.scheduler.load_state_dict(saved["lr_scheduler"])',
            "pass",
            RESUMED,
        ),
    ),
    *mutants(
        "engine/train.py",
        (
            "means_of_all_epochs_so_far",
            "        trainer.statistics.start_epoch()",
            "        pass",
            ON_RUNS.format("an_epochs_means_are_those_of_its_own_updates"),
        ),
        (
            "no_checkpoint_inside_an_epoch",
            "        if plan.save_steps and",
            "        if False and",
            SAVES,
        ),
        (
            "no_limit_of_updates",
            "    return 0 < plan.max_steps <= state.update",
            "    return False",
            SAVES,
        ),
        (
            "the_last_epoch_is_not_kept",
            "        final = state.epoch == plan.epochs",
            "        final = False",
            KEEPS,
        ),
        (
            "best_weights_without_metadata",
            '        **payload.get("metadata", {}),\n',
            "\n",
            ON_RUNS.format("a_checkpoint_holds_the_settings_and_says_what_its_weights_are"),
        ),
        (
            "divergence_is_let_pass",
            "    if streak < limit:",
            "    if True:",
            TRAIN_RUN,
        ),
    ),
    *mutants(
        "engine/ema.py",
        (
            "usual_decay",
            "ModelEmaV3(unwrap(model), decay=decay, exclude_buffers=True)",
            "ModelEmaV3(unwrap(model), exclude_buffers=True)",
            ON_RUNS.format("the_average_follows_its_decay"),
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
            ON_RUNS.format("only_shared_evaluations_are_added_up_over_processes"),
        ),
        (
            "evaluation_without_autocast",
            "            with entered(autocast):",
            "            with entered(None):",
            PRECISION,
        ),
    ),
    *mutants(
        "engine/losses.py",
        (
            "targets_are_not_smoothed",
            "label_smoothing=self.smoothing",
            "label_smoothing=0.0",
            MODEL_RUN,
        ),
    ),
    *mutants(
        "engine/state.py",
        (
            "every_epoch_is_kept",
            "        if last or epoch % self.save_freq == 0:",
            "        if True:",
            KEEPS,
        ),
    ),
    *mutants(
        "engine/trainer.py",
        (
            "the_loss_scale_begins_anew",
            'saved["optimizer"], saved["scaler"])',
            'saved["optimizer"])',
            RESTORED.format("a_restored_trainer_goes_on_with_the_saved_loss_scale"),
        ),
        (
            "an_average_of_nothing_restored",
            "self.model.state_dict() if saved is None else saved)",
            "self.ema.state_dict() if saved is None else saved)",
            RESTORED.format(
                "an_average_begins_with_the_restored_weights_where_the_checkpoint_has_none"
            ),
        ),
        (
            "random_states_of_the_same_updates_alone",
            "if layout.world_size == self.layout.world_size:",
            "if layout == self.layout:",
            RESTORED.format("random_states_are_restored_whatever_an_update_holds"),
        ),
    ),
    *mutants(
        "engine/session.py",
        (
            "a_stop_is_not_told",
            "checkpoints, signal, plot=plot",
            "checkpoints, 0, plot=plot",
            RESUMED,
        ),
    ),
    *mutants(
        "engine/report.py",
        (
            "the_bar_begins_anew",
            "initial=state.batch",
            "initial=0",
            ON_RUNS.format("the_bar_of_a_continued_epoch_begins_where_the_run_stands"),
        ),
        (
            "networks_called_by_each_others_names",
            '{"val": "network", "val_ema": "averaged network"}',
            '{"val": "averaged network", "val_ema": "network"}',
            LEADS,
        ),
    ),
    *mutants(
        "engine/statistics.py",
        (
            "skipped_updates_of_the_epoch",
            "OF_EPOCH = 5",
            "OF_EPOCH = 6",
            RESTORED.format("skipped_updates_are_those_of_the_run_and_means_those_of_the_epoch"),
        ),
    ),
    *mutants(
        "engine/resume.py",
        ("swins_epoch_again", 'saved["epoch"] + 1', 'saved["epoch"]', SWIN),
        (
            "swins_batches_are_updates",
            "epoch * (batches_per_epoch // accumulation)",
            "epoch * batches_per_epoch",
            SWIN,
        ),
        ("swins_best_is_the_next_epoch", "best_epoch=epoch - 1", "best_epoch=epoch", SWIN),
        (
            "swins_loss_scale_is_lost",
            'saved["optimizer"], saved.get("scaler"))',
            'saved["optimizer"])',
            SWIN,
        ),
        (
            "swins_schedule_one_ahead",
            "(epoch * batches_per_epoch - 1) // accumulation",
            "(epoch * batches_per_epoch + 1) // accumulation",
            SWIN,
        ),
    ),
    *mutants(
        "engine/logs.py",
        (
            "an_event_is_kept_twice",
            "resume_step + 1",
            "resume_step + 2",
            LOGS.format("tensorboard_drops_what_comes_after_the_resumed_update"),
        ),
        (
            "wandb_begins_another_run",
            "fresh = resume_step is None or resume_step < 0",
            "fresh = True",
            LOGS.format("wandb_is_given_the_numbers_and_continues_under_its_id"),
        ),
    ),
    *mutants(
        "engine/throughput.py",
        (
            "one_pass_counts",
            "iters: int | None = None",
            "iters: int | None = 1",
            "tests/engine/test_throughput.py"
            "::test_the_processor_takes_two_passes_to_warm_up_and_five_that_count",
        ),
    ),
]
