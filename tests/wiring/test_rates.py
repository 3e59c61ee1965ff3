"""Optimizers and schedules have the values of the settings."""

import pytest

from lr_scheduler import Rates, build_schedule
from tests.wiring.cases import config_of
from tests.wiring.runs import attributes, metrics, payload, run


def test_the_optimizer_has_the_settings_and_the_scaled_rate(tmp_path):
    run(
        tmp_path,
        {
            "TRAIN.BASE_LR": 0.64,
            "TRAIN.WARMUP_LR": 0.32,
            "TRAIN.MIN_LR": 0.064,
            "TRAIN.WARMUP_EPOCHS": 1,
            "TRAIN.EPOCHS": 3,
            "TRAIN.WEIGHT_DECAY": 0.3,
            "TRAIN.OPTIMIZER.BETAS": (0.7, 0.8),
            "TRAIN.OPTIMIZER.EPS": 1e-3,
        },
    )
    decayed, spared = payload(tmp_path)["optimizer"]["param_groups"]
    for group, decay in ((decayed, 0.3), (spared, 0.0)):
        found = [group[name] for name in ("betas", "eps", "weight_decay")]
        assert found == [(0.7, 0.8), 1e-3, decay]
    rates = [entry["lr"] for entry in metrics(tmp_path, "train")]
    # per 512 images; batches of 8; two updates an epoch
    assert rates[0] == pytest.approx(0.32 / 64)
    assert max(rates) == pytest.approx(0.64 / 64)
    assert rates[-1] > 0.064 / 64


def test_log_and_metrics_show_rate_and_decay_of_the_first_group(tmp_path):
    left = run(tmp_path, {"TRAIN.LAYER_DECAY": 0.5, "TRAIN.WARMUP_EPOCHS": 0}, numbers=True)
    first, *_, last = payload(tmp_path)["optimizer"]["param_groups"]
    assert first["lr"] != last["lr"] and first["weight_decay"] != last["weight_decay"]
    assert metrics(tmp_path, "train")[-1]["lr"] == first["lr"]
    line = [line for line in left["log"] if line.startswith("Train: ")][-1]
    assert f"lr {first['lr']:.4g} wd {first['weight_decay']:.4g}" in line


def test_sgd_has_its_momentum(tmp_path):
    run(tmp_path, {"TRAIN.OPTIMIZER.NAME": "sgd", "TRAIN.OPTIMIZER.MOMENTUM": 0.7})
    group = payload(tmp_path)["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["nesterov"]) == (0.7, True)


def test_the_schedule_has_the_epochs_of_the_settings():
    settings = {
        "TRAIN.EPOCHS": 40,
        "TRAIN.COOLDOWN_EPOCHS": 5,
        "TRAIN.WARMUP_EPOCHS": 3,
        "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": False,
    }
    expected = {"name": "cosine", "total": 350, "warmup": 30, "warmup_prefix": False}
    expected |= {"warmup_lr": 0.2, "minimum": 0.1}
    schedule = build_schedule(config_of(settings), 10, Rates(base=0.3, warmup=0.2, minimum=0.1))
    assert attributes(schedule, expected) == expected
    falls = {
        "step": {"decay_every": 70, "decay_rate": 0.4},
        "multistep": {"milestones": (90, 210), "decay_rate": 0.6},
    }
    for name, fall in falls.items():
        steps = {
            "TRAIN.LR_SCHEDULER.NAME": name,
            "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 7,
            "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.4,
            "TRAIN.LR_SCHEDULER.GAMMA": 0.6,
            "TRAIN.LR_SCHEDULER.MULTISTEPS": [9, 21],
            "TRAIN.WARMUP_EPOCHS": 1,
        }
        schedule = build_schedule(config_of(steps), 10, Rates(0.3, 0.2, 0.1))
        assert attributes(schedule, fall) == fall
