"""Faults on the way from settings to rates and optimizers."""

from tests.wiring.faults import ON_RATES, TRAIN_RUN, dropped, mutants

SCHEDULE = ON_RATES.format("the_schedule_has_the_epochs_of_the_settings")
RATE = ON_RATES.format("the_optimizer_has_the_settings_and_the_scaled_rate")
RESUMED = "tests/test_optimizer.py::test_resumed_groups_have_every_setting_of_this_run"
TIMM = "tests/test_optimizer.py::test_timms_optimizers_have_the_settings"
SHOWN = ON_RATES.format("log_and_metrics_show_rate_and_decay_of_the_first_group")
SGD = ON_RATES.format("sgd_has_its_momentum")

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
        ("the_floor_is_nothing", "scaled(train.MIN_LR)", "0.0", TRAIN_RUN),
    ),
    *mutants(
        "optimizer.py",
        (
            "vectors_are_spared_always",
            "train.LAYER_DECAY, train.DECAY_ALL)",
            "train.LAYER_DECAY)",
            TRAIN_RUN,
        ),
        (
            "all_layers_alike",
            "train.WEIGHT_DECAY, train.LAYER_DECAY,",
            "train.WEIGHT_DECAY, 1.0,",
            TRAIN_RUN,
        ),
        (
            "query_rows_decay_as_usual",
            "    if train.QK_WEIGHT_DECAY != 1:",
            "    if False:",
            TRAIN_RUN,
        ),
        (
            "layers_decayed_but_not_slowed",
            "**_group(decay, lr * scale, weight_decay)",
            "**_group(decay, lr, weight_decay)",
            "tests/test_optimizer.py::test_layer_decay_scales_the_rate_once_per_layer",
        ),
    ),
]

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
    *mutants(
        "optimizer.py",
        *(
            (f"{setting}_of_the_checkpoint", f'    "{setting}",\n', "", RESUMED)
            for setting in (
                "betas",
                "eps",
                "momentum",
                "nesterov",
                "lr_scale",
                "group_name",
                "use_fallback",
                "fused",
                "foreach",
            )
        ),
        (
            "timms_usual_epsilon",
            "            momentum=request.momentum,\n            eps=request.eps,",
            "            momentum=request.momentum,",
            TIMM,
        ),
        (
            "timms_usual_momentum",
            "            momentum=request.momentum,\n            eps=request.eps,",
            "            eps=request.eps,",
            TIMM,
        ),
        ("timms_usual_moments", '{"betas": request.betas} if', "{} if", TIMM),
    ),
    *mutants(
        "engine/report.py",
        (
            "rate_of_the_last_group",
            'lr = trainer.optimizer.param_groups[0]["lr"]',
            'lr = trainer.optimizer.param_groups[-1]["lr"]',
            SHOWN,
        ),
        (
            "a_line_of_the_last_group",
            "group = trainer.optimizer.param_groups[0]",
            "group = trainer.optimizer.param_groups[-1]",
            SHOWN,
        ),
    ),
]
