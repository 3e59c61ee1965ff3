"""Config -> learning-rate schedule: closed forms of the update index, one rate per parameter group.

timm's schedulers are not used: since 0.5 they apply a group's `lr_scale` a second time, name
arguments differently, and let the warm-up shift the steps of `step`.
"""

import bisect
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from registry import Registry, UserError, did_you_mean

SHAPES = Registry("learning-rate schedule")
_logger = logging.getLogger(__name__)


class ScheduleError(UserError, ValueError):
    """A schedule that cannot be followed: one line with the keys and how to fix them."""


class Rates(NamedTuple):
    """Learning rates of a run: the peak, that of update 0, and the cosine's floor."""

    base: float
    warmup: float
    minimum: float


def scaled_rates(config, world_size: int) -> Rates:
    """TRAIN.{BASE_LR, WARMUP_LR, MIN_LR}, given per 512 images, for the images of one update: batch
    x processes x accumulation.
    """

    train = config.TRAIN

    def scaled(rate: float) -> float:
        of_batches = rate * config.DATA.BATCH_SIZE * world_size / 512.0
        return of_batches * max(train.ACCUMULATION_STEPS, 1)

    return Rates(scaled(train.BASE_LR), scaled(train.WARMUP_LR), scaled(train.MIN_LR))


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
        return SHAPES[self.name].rate(self, base, t)


@dataclass(frozen=True)
class Shape:
    """The course of the rate after the warm-up.

    rate: (schedule, base, t) -> rate at update t.
    ends: whether it reaches an end, from which on a cool-down (TRAIN.COOLDOWN_EPOCHS) runs at a
        constant rate.
    """

    rate: Callable[[Schedule, float, int], float]
    ends: bool = False


def register_shape(name: str, ends: bool = False) -> Callable:
    """Decorator of a function (schedule, base, t) -> rate: registers it under `name`."""

    def register(rate: Callable[[Schedule, float, int], float]) -> Callable:
        SHAPES.register(name, Shape(rate, ends))
        return rate

    return register


@register_shape("cosine", ends=True)
def _cosine(s: Schedule, base: float, t: int) -> float:
    if t >= s.total:
        return s.minimum
    start = s.warmup if s.warmup_prefix else 0
    angle = math.pi * (t - start) / (s.total - start)
    return s.minimum + 0.5 * (base - s.minimum) * (1 + math.cos(angle))


@register_shape("linear", ends=True)
def _linear(s: Schedule, base: float, t: int) -> float:
    done = 1.0
    if s.total > s.warmup:
        done = min(1.0, (t - s.warmup) / (s.total - s.warmup))
    return base - 0.99 * base * done


@register_shape("step")
def _step(s: Schedule, base: float, t: int) -> float:
    return base * s.decay_rate ** (t // s.decay_every)


@register_shape("multistep")
def _multistep(s: Schedule, base: float, t: int) -> float:
    return base * s.decay_rate ** bisect.bisect_right(s.milestones, t)


class LRScheduler:
    """Writes the schedule's rates into the optimizer's groups; the group's `lr` at construction is
    its peak.

    A peak already has its layer's factor (`lr_scale`), which is applied nowhere else; warm-up
    start and floor are the same for all groups, as in Swin.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule):
        self.optimizer, self.schedule = optimizer, schedule
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_update: int | None = None
        self._write(0)

    def step_update(self, update: int) -> None:
        """Called after update number `update`, counted from 0, with that number: updates 0 and 1
        both run at the rate of 0, as in Swin.
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
        are logged and returned.
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


def check_schedule(train) -> None:
    """What TRAIN.{EPOCHS, WARMUP_EPOCHS, COOLDOWN_EPOCHS, LR_SCHEDULER} must agree on.

    Raises: ScheduleError for an unknown name, a warm-up longer than the run or than the first of
        multistep's epochs, a cool-down after a schedule that does not end, or no epochs at all.
    """
    settings = train.LR_SCHEDULER
    name, milestones = settings.NAME, sorted(settings.MULTISTEPS)
    if name not in SHAPES:
        raise ScheduleError(
            f"TRAIN.LR_SCHEDULER.NAME {name!r} is not known; allowed: {', '.join(SHAPES)}"
            + did_you_mean(name, SHAPES)
        )
    if train.COOLDOWN_EPOCHS and not SHAPES[name].ends:
        ending = " and ".join(shape for shape in SHAPES if SHAPES[shape].ends)
        raise ScheduleError(
            f"TRAIN.COOLDOWN_EPOCHS {train.COOLDOWN_EPOCHS} acts on {ending}, which end; with"
            f" TRAIN.LR_SCHEDULER.NAME {name} set it to 0"
        )
    available = train.EPOCHS - train.COOLDOWN_EPOCHS
    if train.WARMUP_EPOCHS > available:
        cooldown = ""
        if train.COOLDOWN_EPOCHS:
            cooldown = f" - TRAIN.COOLDOWN_EPOCHS {train.COOLDOWN_EPOCHS}"
        raise ScheduleError(
            f"TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS} is longer than TRAIN.EPOCHS"
            f" {train.EPOCHS}{cooldown}; set it to {max(0, available)} or less"
        )
    if name != "multistep":
        return
    if not milestones:
        raise ScheduleError(
            "TRAIN.LR_SCHEDULER.MULTISTEPS is empty; give the epochs at which the rate falls, as in"
            " [150, 225]"
        )
    if train.WARMUP_EPOCHS > milestones[0]:
        raise ScheduleError(
            f"TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS} ends after the first of"
            f" TRAIN.LR_SCHEDULER.MULTISTEPS {milestones}; shorten the warm-up"
        )


def build_schedule(config, updates_per_epoch: int, rates: Rates) -> Schedule:
    """TRAIN.{EPOCHS, WARMUP_EPOCHS, COOLDOWN_EPOCHS, LR_SCHEDULER} in updates; `total` ends where
    the cool-down begins.

    Raises: ScheduleError for an epoch without an update, and whatever `check_schedule` refuses.
    """
    train, settings = config.TRAIN, config.TRAIN.LR_SCHEDULER
    check_schedule(train)
    if updates_per_epoch < 1:
        raise ScheduleError(
            "an epoch has no update: fewer batches than TRAIN.ACCUMULATION_STEPS"
            f" {train.ACCUMULATION_STEPS}; lower it or DATA.BATCH_SIZE {config.DATA.BATCH_SIZE}"
        )
    return Schedule(
        name=settings.NAME,
        total=int((train.EPOCHS - train.COOLDOWN_EPOCHS) * updates_per_epoch),
        warmup=int(train.WARMUP_EPOCHS * updates_per_epoch),
        warmup_lr=rates.warmup,
        minimum=rates.minimum,
        warmup_prefix=bool(settings.WARMUP_PREFIX),
        decay_every=max(1, int(settings.DECAY_EPOCHS * updates_per_epoch)),
        decay_rate=settings.GAMMA if settings.NAME == "multistep" else settings.DECAY_RATE,
        milestones=tuple(sorted(int(epoch * updates_per_epoch) for epoch in settings.MULTISTEPS)),
    )


def build_scheduler(
    config, optimizer: torch.optim.Optimizer, n_iter_per_epoch: int, rates: Rates
) -> LRScheduler:
    """The schedule of `config` on this optimizer; n_iter_per_epoch counts updates (batches //
    accumulation).
    """
    return LRScheduler(optimizer, build_schedule(config, n_iter_per_epoch, rates))
