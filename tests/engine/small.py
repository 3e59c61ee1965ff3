"""A trainer small enough that a test can run it hundreds of times, and its data."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from engine.ema import ParameterEma
from engine.losses import make_criterion, with_distillation
from engine.signals import StopSignal
from engine.state import CheckpointFolder, Layout
from engine.train import Plan, fit
from engine.trainer import Trainer
from utils import World, seed_everything


class Net(nn.Module):
    """Dropout (torch's generator), a buffer, a head."""

    def __init__(self, features: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * features, 16), nn.GELU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(16, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.head(self.body(x))

    def classifiers(self):
        return ["head"]


class Cosine:
    """A schedule with the interface of lr_scheduler's."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.position = optimizer, None

    def step_update(self, update: int) -> None:
        self.position = update
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * 0.9**update

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        if state["position"] is not None:
            self.step_update(state["position"])


class Loader:
    """`batches` fixed batches an epoch; images (size, 3, 8), five classes."""

    def __init__(self, batches: int = 6, size: int = 4) -> None:
        self.batches, self.size = batches, size

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start_batch: int = 0):
        for index in range(start_batch, self.batches):
            generator = torch.Generator().manual_seed(1000 * epoch + index)
            yield (
                torch.randn(self.size, 3, 8, generator=generator),
                torch.randint(0, 5, (self.size,), generator=generator),
            )


def numpy_mix(images, targets):
    """Blends each image with its mirror image in the batch, by a share drawn from NumPy's
    generator; soft targets.
    """
    share = float(np.random.beta(0.8, 0.8))
    soft = nn.functional.one_hot(targets, 5).float()
    return share * images + (1 - share) * images.flip(0), share * soft + (1 - share) * soft.flip(0)


def make_trainer(
    *,
    seed: int = 0,
    accumulation: int = 1,
    size: int = 4,
    mix: bool = False,
    ema: bool = False,
    optimizer=None,
    world=None,
    model=None,
    **options,
) -> Trainer:
    """A trainer of `model` (default: `Net`) with AdamW; options go to Trainer."""
    seed_everything(seed)
    model, world = model or Net(), world or World("cpu")
    optimizer = (optimizer or torch.optim.AdamW)(model.parameters(), lr=0.01)
    return Trainer(
        model,
        optimizer,
        Cosine(optimizer),
        with_distillation(make_criterion(mix, 0.1), None),
        world=world,
        layout=Layout(size, world.size, accumulation),
        mixup=numpy_mix if mix else None,
        ema=ParameterEma(model, 0.9) if ema else None,
        **options,
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of the parameters."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


class Silent:
    """A report that says nothing and counts what it is told."""

    def __init__(self) -> None:
        self.updates, self.validations = 0, []
        self.read_every = 1

    def start_epoch(self, state) -> None:
        logging.debug("begin %s", state)

    def update(self, trainer):
        self.updates += 1
        return trainer.statistics.read() if self.updates % self.read_every == 0 else None

    def end_epoch(self, trainer, complete: bool = True) -> None:
        logging.debug("end %s", trainer.state)

    def validation(self, state, kind: str, result) -> None:
        self.validations.append((kind, state.update, result.acc1))

    def no_score(self, state, kind: str, error) -> float:
        self.validations.append((kind, state.update, math.nan))
        return math.nan

    def best(self, state) -> None:
        logging.debug("best %s", state)


def evaluation(acc1: float = 50.0) -> SimpleNamespace:
    """The result of an evaluation."""
    return SimpleNamespace(acc1=acc1, acc5=90.0, loss=1.0, count=10)


class NoFiles:
    """A checkpoint folder that writes nothing."""

    def save(self, payload, copies=None) -> None:
        pass

    def keep_best(self, *args, **kwargs) -> None:
        pass

    def keep_epoch(self, *args, **kwargs) -> None:
        pass


def run_fit(trainer: Trainer, loader, epochs: int, folder=None, validate=None, **plan):
    """Trains and returns (trainer, silent report); the checkpoints go to `folder`, if there is one,
    and plan's keywords are those of `Plan`.
    """
    report = Silent()
    with StopSignal(trainer.world) as stop:
        fit(
            trainer,
            loader,
            lambda model, **_: validate(model) if validate else evaluation(),
            plan=Plan(epochs, **plan),
            folder=CheckpointFolder(folder) if folder else NoFiles(),
            report=report,
            stop=stop,
        )
    return trainer, report
