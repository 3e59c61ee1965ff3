"""Config -> learning-rate schedule: closed forms of the update index, one rate per parameter group.

timm's schedulers are not used: since 0.5 they apply a group's `lr_scale` a second time (trap T9),
name arguments differently (T10), and let the warm-up shift the steps of `step`.
"""

import bisect
import logging
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from registry import did_you_mean

_logger = logging.getLogger(__name__)


class ScheduleError(ValueError):
    """A schedule that cannot be followed: one line with the keys and how to mend them."""


class Rates(NamedTuple):
    """Learning rates of a run: the peak, that of update 0, and the cosine's floor."""

    base: float
    warmup: float
    minimum: float


def scaled_rates(config, world_size: int) -> Rates:
    """TRAIN.{BASE_LR, WARMUP_LR, MIN_LR}, given per 512 images, for the images of one update: batch
    x processes x accumulation.
    """

    def scaled(rate: float) -> float:
        return (
            rate
            * config.DATA.BATCH_SIZE
            * world_size
            / 512.0
            * max(config.TRAIN.ACCUMULATION_STEPS, 1)
        )

    return Rates(
        scaled(config.TRAIN.BASE_LR), scaled(config.TRAIN.WARMUP_LR), scaled(config.TRAIN.MIN_LR)
    )


@dataclass(frozen=True)
class Schedule:
    """A schedule without its base rate. All times are counted in optimizer updates.

    t < warmup:  warmup_lr + t (base - warmup_lr) / warmup, and from then on
    cosine:      minimum + (base - minimum) (1 + cos(pi t' / T)) / 2 until t' = T, then minimum;
                 warmup_prefix: t' = t - warmup, T = total - warmup; otherwise t' = t, T = total (as
                 the released Swin weights were trained; the rate falls at the end of the warm-up)
    linear:      from base to base / 100 over total - warmup updates, then base / 100; `minimum` has
        no part in it
    step:        base * decay_rate ** (t // decay_every)
    multistep:   base * decay_rate ** (number of milestones <= t)
    """

    name: str
    total: int
    warmup: int
    warmup_lr: float
    minimum: float = 0.0
    warmup_prefix: bool = True
    decay_every: int = 1
    decay_rate: float = 0.1
    milestones: tuple[int, ...] = ()

    def rate(self, base: float, t: int) -> float:
        """The learning rate at update t >= 0 of a group whose peak is `base`."""
        if t < self.warmup:
            return self.warmup_lr + t * ((base - self.warmup_lr) / self.warmup)
        return SHAPES[self.name](self, base, t)


def _cosine(s: Schedule, base: float, t: int) -> float:
    start = s.warmup if s.warmup_prefix else 0
    if t >= s.total:
        return s.minimum
    return s.minimum + 0.5 * (base - s.minimum) * (
        1 + math.cos(math.pi * (t - start) / (s.total - start))
    )


def _linear(s: Schedule, base: float, t: int) -> float:
    done = min(1.0, (t - s.warmup) / (s.total - s.warmup)) if s.total > s.warmup else 1.0
    return base - 0.99 * base * done


def _step(s: Schedule, base: float, t: int) -> float:
    return base * s.decay_rate ** (t // s.decay_every)


def _multistep(s: Schedule, base: float, t: int) -> float:
    return base * s.decay_rate ** bisect.bisect_right(s.milestones, t)


SHAPES = {"cosine": _cosine, "linear": _linear, "step": _step, "multistep": _multistep}


class LRScheduler:
    """Writes the schedule's rates into the optimizer's groups; the group's `lr` at construction is
    its peak.

    A peak already holds its layer's factor (`lr_scale`), which is applied nowhere else; warm-up
    start and floor are the same for all groups, as in the reference.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule):
        self.optimizer, self.schedule = optimizer, schedule
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_update: int | None = None
        self._write(0)

    def step_update(self, update: int) -> None:
        """Called after update number `update`, counted from 0, with that number: updates 0 and 1
        both run at the rate of 0, as in the reference.
        """
        self.last_update = update
        self._write(update)

    def _write(self, update: int) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = self.schedule.rate(base, update)

    def state_dict(self) -> dict:
        """Position, and the schedule for the comparison on resuming; plain numbers, strings and
        lists.
        """
        described = asdict(self.schedule) | {
            "milestones": list(self.schedule.milestones),
            "base_lrs": list(self.base_lrs),
        }
        return {"last_update": self.last_update, "schedule": described}

    def load_state_dict(self, state: dict) -> list[str]:
        """Goes on at the stored position of THIS run's schedule; differences from the stored one
        are logged and returned (T11).
        """
        own = self.state_dict()["schedule"]
        stored = state.get("schedule", {})
        changed = [
            f"{key} {stored.get(key)} -> {own[key]}"
            for key in own
            if key in stored and stored[key] != own[key]
        ]
        if changed:
            _logger.warning(
                "resuming: the schedule differs from the checkpoint's, the config is followed: %s",
                "; ".join(changed),
            )
        self.last_update = state["last_update"]
        self._write(self.last_update or 0)
        return changed


def build_schedule(config, updates_per_epoch: int, rates: Rates) -> Schedule:
    """TRAIN.{EPOCHS, WARMUP_EPOCHS, COOLDOWN_EPOCHS, LR_SCHEDULER} in updates; `total` ends where
    the cool-down begins.

    Raises: ScheduleError for an unknown name, an empty epoch, a warm-up longer than the run, or bad
        milestones.
    """
    train, settings = config.TRAIN, config.TRAIN.LR_SCHEDULER
    name = settings.NAME
    if name not in SHAPES:
        raise ScheduleError(
            f"TRAIN.LR_SCHEDULER.NAME {name!r} is not known; allowed: {', '.join(SHAPES)}"
            + did_you_mean(name, SHAPES)
        )
    schedule = Schedule(
        name=name,
        total=int((train.EPOCHS - train.COOLDOWN_EPOCHS) * updates_per_epoch),
        warmup=int(train.WARMUP_EPOCHS * updates_per_epoch),
        warmup_lr=rates.warmup,
        minimum=rates.minimum,
        warmup_prefix=bool(settings.WARMUP_PREFIX),
        decay_every=max(1, int(settings.DECAY_EPOCHS * updates_per_epoch)),
        decay_rate=settings.GAMMA if name == "multistep" else settings.DECAY_RATE,
        milestones=tuple(sorted(int(epoch * updates_per_epoch) for epoch in settings.MULTISTEPS)),
    )
    _check(config, schedule, updates_per_epoch)
    return schedule


def _check(config, schedule: Schedule, updates_per_epoch: int) -> None:
    train = config.TRAIN
    if updates_per_epoch < 1:
        raise ScheduleError(
            "an epoch has no update: fewer batches than TRAIN.ACCUMULATION_STEPS"
            f" {train.ACCUMULATION_STEPS}; lower it or DATA.BATCH_SIZE {config.DATA.BATCH_SIZE}"
        )
    if schedule.warmup > schedule.total:
        cooldown = (
            f" - TRAIN.COOLDOWN_EPOCHS {train.COOLDOWN_EPOCHS}" if train.COOLDOWN_EPOCHS else ""
        )
        raise ScheduleError(
            f"TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS} is longer than TRAIN.EPOCHS"
            f" {train.EPOCHS}{cooldown}; set it to {max(0, train.EPOCHS - train.COOLDOWN_EPOCHS)}"
            " or less"
        )
    if train.COOLDOWN_EPOCHS and schedule.name not in ("cosine", "linear"):
        raise ScheduleError(
            f"TRAIN.COOLDOWN_EPOCHS {train.COOLDOWN_EPOCHS} acts on cosine and linear, which end;"
            f" with TRAIN.LR_SCHEDULER.NAME {schedule.name} set it to 0"
        )
    if schedule.name != "multistep":
        return
    if not schedule.milestones:
        raise ScheduleError(
            "TRAIN.LR_SCHEDULER.MULTISTEPS is empty; give the epochs at which the rate falls, as in"
            " [150, 225]"
        )
    if schedule.warmup > schedule.milestones[0]:
        raise ScheduleError(
            f"TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS} ends after the first of"
            f" TRAIN.LR_SCHEDULER.MULTISTEPS {list(train.LR_SCHEDULER.MULTISTEPS)}; shorten the"
            " warm-up"
        )


def build_scheduler(
    config, optimizer: torch.optim.Optimizer, n_iter_per_epoch: int, rates: Rates
) -> LRScheduler:
    """The schedule of `config` on this optimizer; n_iter_per_epoch counts updates (batches //
    accumulation).
    """
    return LRScheduler(optimizer, build_schedule(config, n_iter_per_epoch, rates))
