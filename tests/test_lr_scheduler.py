"""The learning-rate schedules: Swin's numbers, a table of its own, and PyTorch's schedulers as
a second witness.
"""

import json
from types import SimpleNamespace as Node

import pytest
import torch

from lr_scheduler import Rates, Schedule, ScheduleError, build_scheduler, scaled_rates
from tests.helpers import golden

DEFAULTS = {
    "TRAIN.EPOCHS": 300,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.COOLDOWN_EPOCHS": 0,
    "TRAIN.BASE_LR": 5e-4,
    "TRAIN.WARMUP_LR": 5e-7,
    "TRAIN.MIN_LR": 5e-6,
    "TRAIN.ACCUMULATION_STEPS": 1,
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 30,
    "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.1,
    "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": True,
    "TRAIN.LR_SCHEDULER.GAMMA": 0.1,
    "TRAIN.LR_SCHEDULER.MULTISTEPS": [],
    "DATA.BATCH_SIZE": 128,
}


def make_config(**changes):
    """A stand-in for the frozen config; keyword `LR_SCHEDULER__NAME` sets
    TRAIN.LR_SCHEDULER.NAME.
    """
    return nodes(
        {**DEFAULTS, **{f"TRAIN.{key.replace('__', '.')}": value for key, value in changes.items()}}
    )


def nodes(flat):
    root = Node()
    for key, value in flat.items():
        *path, leaf = key.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                setattr(node, part, Node())
            node = getattr(node, part)
        setattr(node, leaf, value)
    return root


def make_optimizer(*lrs):
    return torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=1.0
    )


def unscaled(config):
    return Rates(config.TRAIN.BASE_LR, config.TRAIN.WARMUP_LR, config.TRAIN.MIN_LR)


def rates_used(scheduler, updates):
    """Rates of the groups during each update of Swin's loop, which calls the scheduler
    after the update.
    """
    used = []
    for update in range(updates):
        used.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.step_update(update)
    return torch.tensor(used, dtype=torch.float64)


GOLDEN_CASES = [
    "cosine_prefix",
    "cosine_no_prefix",
    "cosine_no_warmup",
    "linear",
    "step",
    "multistep",
    "cosine_prefix_accumulation",
    "cosine_layer_decay",
]


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_rates_are_the_references(case):
    meta, tensors = golden("lr_schedules")
    assert [c["name"] for c in meta["cases"]] == GOLDEN_CASES
    spec = next(c for c in meta["cases"] if c["name"] == case)
    config = nodes(
        {**DEFAULTS, **spec["config"], "TRAIN.ACCUMULATION_STEPS": spec["accumulation_steps"]}
    )
    optimizer = make_optimizer(*spec["group_lrs"])
    scheduler = build_scheduler(
        config,
        optimizer,
        spec["iterations_per_epoch"] // spec["accumulation_steps"],
        unscaled(config),
    )
    for update, argument in enumerate(tensors[f"{case}/step_update_argument"].flatten().tolist()):
        used = [group["lr"] for group in optimizer.param_groups]
        scheduler.step_update(argument)
        after = [group["lr"] for group in optimizer.param_groups]
        for got, name in ((used, "lr_used"), (after, "lr_after")):
            want = tensors[f"{case}/{name}"][update]
            torch.testing.assert_close(
                torch.tensor(got, dtype=torch.float64),
                want,
                rtol=1e-12,
                atol=0,
                msg=f"{name} of update {update}",
            )


@pytest.mark.parametrize(
    "prefix, table",
    [
        (
            True,
            {
                0: 1e-6,
                12510: 5.005e-4,
                25019: 9.999601e-4,
                25020: 1e-3,
                100080: 8.920066e-4,
                187650: 5.604224e-4,
                375299: 1e-5,
            },
        ),
        (
            False,
            {
                0: 1e-6,
                12510: 5.005e-4,
                25019: 9.999601e-4,
                25020: 9.891831e-4,
                100080: 8.362197e-4,
                187650: 5.05e-4,
                375299: 1e-5,
            },
        ),
    ],
)
def test_swin_tiny_recipe_on_8_gpus_has_the_published_rates(prefix, table):
    config = make_config(LR_SCHEDULER__WARMUP_PREFIX=prefix)
    rates = scaled_rates(config, world_size=8)
    assert rates == pytest.approx((1e-3, 1e-6, 1e-5), rel=1e-15)
    scheduler = build_scheduler(config, make_optimizer(rates.base), 1251, rates)
    for update, rate in table.items():
        scheduler.step_update(update)
        assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-6), update


def test_rates_scale_with_batch_processes_and_accumulation():
    config = make_config(ACCUMULATION_STEPS=4)
    assert scaled_rates(config, 2) == pytest.approx(
        [2 * rate for rate in unscaled(config)], rel=1e-15
    )


def test_accumulation_below_two_does_not_scale():
    assert scaled_rates(make_config(ACCUMULATION_STEPS=0), 4) == scaled_rates(
        make_config(ACCUMULATION_STEPS=1), 4
    )


def test_cosine_without_warmup_is_pytorchs_cosine_annealing():
    config = make_config(EPOCHS=4, WARMUP_EPOCHS=0)
    scheduler = build_scheduler(config, make_optimizer(5e-4), 10, unscaled(config))
    ours = rates_used(scheduler, 41)[
        1:, 0
    ]  # the loop's rate of update n + 1 is the schedule's at n
    other = make_optimizer(5e-4)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=40, eta_min=5e-6)
    for rate in ours[:40]:
        assert rate == pytest.approx(other.param_groups[0]["lr"], rel=1e-10)
        other.step()
        annealing.step()


def test_warmup_and_linear_decay_are_pytorchs_linear_rates():
    config = make_config(EPOCHS=5, WARMUP_EPOCHS=1, LR_SCHEDULER__NAME="linear")
    schedule = build_scheduler(config, make_optimizer(5e-4), 10, unscaled(config)).schedule
    other = make_optimizer(5e-4)
    parts = [
        torch.optim.lr_scheduler.LinearLR(other, start_factor=1e-3, end_factor=1.0, total_iters=10),
        torch.optim.lr_scheduler.LinearLR(other, start_factor=1.0, end_factor=0.01, total_iters=40),
    ]
    witness = torch.optim.lr_scheduler.SequentialLR(other, parts, milestones=[10])
    for update in range(60):
        assert schedule.rate(5e-4, update) == pytest.approx(
            other.param_groups[0]["lr"], rel=1e-9
        ), update
        other.step()
        witness.step()


@pytest.mark.parametrize("name, milestones", [("step", []), ("multistep", [2, 4])])
def test_steps_are_pytorchs_and_are_not_shifted_by_the_warmup(name, milestones):
    config = make_config(
        EPOCHS=6,
        WARMUP_EPOCHS=1,
        LR_SCHEDULER__NAME=name,
        LR_SCHEDULER__DECAY_EPOCHS=2,
        LR_SCHEDULER__DECAY_RATE=0.3,
        LR_SCHEDULER__GAMMA=0.3,
        LR_SCHEDULER__MULTISTEPS=milestones,
    )
    schedule = build_scheduler(config, make_optimizer(5e-4), 10, unscaled(config)).schedule
    other = make_optimizer(5e-4)
    witness = torch.optim.lr_scheduler.MultiStepLR(
        other, [20, 40, 60] if name == "step" else [20, 40], gamma=0.3
    )
    for update in range(65):
        if update >= 10:
            assert schedule.rate(5e-4, update) == pytest.approx(
                other.param_groups[0]["lr"], rel=1e-12
            ), update
        other.step()
        witness.step()


def test_layer_decay_enters_once_and_lr_scale_is_not_read():
    config = make_config(WARMUP_EPOCHS=0)
    optimizer = make_optimizer(1e-3, 1e-3 * 0.25)
    optimizer.param_groups[1]["lr_scale"] = 0.25
    scheduler = build_scheduler(config, optimizer, 10, Rates(1e-3, 1e-6, 0.0))
    scheduler.step_update(1500)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(0.25 * first, rel=1e-12)


def test_first_update_runs_at_the_warmup_rate():
    config = make_config()
    scheduler = build_scheduler(config, make_optimizer(5e-4), 10, unscaled(config))
    assert scheduler.optimizer.param_groups[0]["lr"] == config.TRAIN.WARMUP_LR


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_rate_stays_at_its_end_after_the_last_update(name):
    schedule = Schedule(name, total=100, warmup=10, warmup_lr=0.0, minimum=0.01)
    assert [schedule.rate(1.0, t) for t in (100, 101, 5000)] == pytest.approx([0.01] * 3, rel=1e-12)


@pytest.mark.parametrize("name, end", [("cosine", 5e-6), ("linear", 5e-6)])
def test_a_cooldown_runs_at_the_rate_that_the_shorter_schedule_ends_at(name, end):
    cooled, shorter = (
        make_config(
            EPOCHS=epochs, WARMUP_EPOCHS=5, COOLDOWN_EPOCHS=cooldown, LR_SCHEDULER__NAME=name
        )
        for epochs, cooldown in ((40, 10), (30, 0))
    )
    rates, expected = (
        rates_used(build_scheduler(config, make_optimizer(5e-4), 10, unscaled(config)), 401)
        for config in (cooled, shorter)
    )
    assert torch.equal(rates, expected)
    assert rates[301:, 0].tolist() == pytest.approx([end] * 100, rel=1e-12)


def test_state_is_plain_data_and_goes_through_a_weights_only_file(tmp_path):
    config = make_config()
    scheduler = build_scheduler(config, make_optimizer(5e-4), 10, unscaled(config))
    scheduler.step_update(70)
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state
    torch.save(state, tmp_path / "state.pth")
    assert torch.load(tmp_path / "state.pth", weights_only=True) == state


@pytest.mark.parametrize("done", [0, 1, 77, 299])
def test_resumed_schedule_continues_bit_for_bit(done):
    config = make_config(EPOCHS=30, WARMUP_EPOCHS=3)
    whole = rates_used(
        build_scheduler(config, make_optimizer(5e-4, 1e-4), 10, unscaled(config)), 300
    )
    first = build_scheduler(config, make_optimizer(5e-4, 1e-4), 10, unscaled(config))
    rates_used(first, done)
    second = build_scheduler(config, make_optimizer(5e-4, 1e-4), 10, unscaled(config))
    assert second.load_state_dict(first.state_dict()) == []
    rest = []
    for update in range(done, 300):
        rest.append([group["lr"] for group in second.optimizer.param_groups])
        second.step_update(update)
    assert torch.equal(torch.tensor(rest, dtype=torch.float64), whole[done:])


def test_resuming_follows_the_new_config_and_names_what_changed(caplog):
    old = make_config(EPOCHS=30, WARMUP_EPOCHS=3)
    first = build_scheduler(old, make_optimizer(5e-4), 10, unscaled(old))
    first.step_update(100)
    new = make_config(EPOCHS=60, WARMUP_EPOCHS=3)
    second = build_scheduler(new, make_optimizer(1e-3), 10, unscaled(new))
    changed = second.load_state_dict(first.state_dict())
    assert changed == ["total 300 -> 600", "base_lrs [0.0005] -> [0.001]"]
    assert "total 300 -> 600" in caplog.text
    assert second.optimizer.param_groups[0]["lr"] == second.schedule.rate(1e-3, 100)


@pytest.mark.parametrize(
    "updates, changes, words",
    [
        (
            10,
            {"LR_SCHEDULER__NAME": "cosin"},
            ["TRAIN.LR_SCHEDULER.NAME", "cosin", "did you mean 'cosine'", "multistep"],
        ),
        (10, {"WARMUP_EPOCHS": 20, "EPOCHS": 5}, ["TRAIN.WARMUP_EPOCHS 20", "TRAIN.EPOCHS 5"]),
        (10, {"LR_SCHEDULER__NAME": "multistep"}, ["MULTISTEPS is empty"]),
        (
            10,
            {"LR_SCHEDULER__NAME": "multistep", "LR_SCHEDULER__MULTISTEPS": [5, 30]},
            ["TRAIN.WARMUP_EPOCHS 20", "[5, 30]"],
        ),
        (
            10,
            {"EPOCHS": 25, "COOLDOWN_EPOCHS": 10},
            ["TRAIN.EPOCHS 25 - TRAIN.COOLDOWN_EPOCHS 10", "15 or less"],
        ),
        (
            10,
            {"COOLDOWN_EPOCHS": 10, "LR_SCHEDULER__NAME": "step"},
            ["TRAIN.COOLDOWN_EPOCHS 10", "step set it to 0"],
        ),
        (0, {"ACCUMULATION_STEPS": 9}, ["no update", "TRAIN.ACCUMULATION_STEPS 9"]),
    ],
)
def test_impossible_schedules_are_refused_with_the_key(updates, changes, words):
    config = make_config(**changes)
    with pytest.raises(ScheduleError) as error:
        build_scheduler(config, make_optimizer(1e-3), updates, unscaled(config))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
