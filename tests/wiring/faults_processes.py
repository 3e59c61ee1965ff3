"""Faults in what a process does, tells and evaluates beside others."""

from tests.wiring.faults import GOING_ON, ON_RUNS, PROGRAM, mutants

SHARED = (
    "tests/wiring/test_processes.py::test_two_processes_share_the_images_and_take_the_rate_of_both"
)
DESCRIBED = ON_RUNS.format("the_log_describes_products_and_attention_in_the_precision_of_the_run")
TOLD = GOING_ON.format("weights_to_start_from_are_evaluated_first")
TAUGHT = GOING_ON.format("a_teacher_without_a_share_changes_nothing_and_one_with_all_of_it_decides")
EVALUATED = GOING_ON.format("an_evaluation_repeats_what_training_found")
FITS = GOING_ON.format("a_checkpoint_has_to_fit_and_weights_may_have_another_head")

PROCESS_MUTANTS = mutants(
    PROGRAM,
    (
        "rates_of_one_process",
        "rates = scaled_rates(config, self.world.size)",
        "rates = scaled_rates(config, 1)",
        SHARED,
    ),
    (
        "layout_of_one_process",
        "Layout(config.DATA.BATCH_SIZE, self.world.size, ",
        "Layout(config.DATA.BATCH_SIZE, 1, ",
        SHARED,
    ),
    ("data_of_one_process", "world_size=self.world.size", "world_size=1", SHARED),
    ("data_of_the_first_process", "rank=self.world.rank,\n", "rank=0,\n", SHARED),
    (
        "device_of_the_first_process",
        "World(config.DEVICE, config.LOCAL_RANK, ",
        "World(config.DEVICE, 0, ",
        "tests/wiring/test_processes.py::test_a_process_takes_the_device_of_its_local_rank",
    ),
    (
        "loading_is_not_told",
        "load_weights(self.model, weights, logger=self.logger,",
        "load_weights(self.model, weights,",
        TOLD,
    ),
    ("loading_a_teacher_is_not_told", 'rule="exact", logger=self.logger', 'rule="exact"', TAUGHT),
    ("a_teacher_may_fit_roughly", 'rule="exact", logger', 'rule="finetune", logger', FITS),
    (
        "weights_to_start_from_before_a_checkpoint",
        "read_checkpoint(model.RESUME or model.PRETRAINED)",
        "read_checkpoint(model.PRETRAINED or model.RESUME)",
        EVALUATED,
    ),
    ("the_average_tested_unasked", "if model.EMA.ENABLE and model.EMA", "if model.EMA", EVALUATED),
    (
        "an_average_expected_of_every_checkpoint",
        " and model.RESUME and checkpoint.has_average:",
        " and model.RESUME:",
        EVALUATED,
    ),
    (
        "mixing_told_where_there_is_none",
        "mixing=self.data.mixup is not None",
        "mixing=self.data.mixup is None",
        ON_RUNS.format("the_picture_says_what_the_training_loss_is"),
    ),
    (
        "timed_with_other_classes",
        "model = self.build_model()\n",
        "model = self.build_model(2)\n",
        ON_RUNS.format("timing_takes_batch_size_and_channels_of_the_settings"),
    ),
    (
        "products_of_another_precision",
        "describe_products(self.dtype,",
        "describe_products(torch.float32,",
        DESCRIBED,
    ),
    (
        "attention_without_autocast",
        "        with self.autocast():\n            check_on_device(self.model)",
        "        with nullcontext():\n            check_on_device(self.model)",
        DESCRIBED,
    ),
    (
        "other_settings_written",
        "plain, dump_config(self.config), self.",
        "plain, dump_config(load_config(None)), self.",
        ON_RUNS.format("a_checkpoint_holds_the_settings_and_says_what_its_weights_are"),
    ),
) + mutants(
    "settings/arguments.py",
    (
        "exact_without_weights_alone",
        '"exact" if model.RESUME else',
        '"exact" if not model.PRETRAINED else',
        ON_RUNS.format("what_is_resumed_has_to_fit_exactly_even_beside_weights_to_start_from"),
    ),
    (
        "no_training_in_the_cooldown",
        "epochs=train.EPOCHS",
        "epochs=train.EPOCHS - train.COOLDOWN_EPOCHS",
        ON_RUNS.format("a_run_begins_at_the_epoch_it_is_told"),
    ),
)
PROCESS_MUTANTS += mutants(
    PROGRAM,
    (
        "an_average_called_the_network",
        'networks["ema"] = "averaged network"',
        'networks["ema"] = "network"',
        EVALUATED,
    ),
) + mutants(
    "engine/session.py",
    (
        "two_heads_without_a_teacher",
        "distillation is not None and model.has_two_heads()",
        "model.has_two_heads()",
        GOING_ON.format("a_second_head_alone_learns_from_a_teacher_with_all_of_the_share"),
    ),
)
