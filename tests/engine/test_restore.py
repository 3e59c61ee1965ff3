"""A training state that does not fit this run is refused in one line."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from checkpoint import Checkpoint, CheckpointError
from engine.resume import resume
from engine.state import TrainState
from tests.checkpoint.states import MISSING, changed
from tests.engine.small import Loader, make_trainer


def resumed(saved, optimizer=None):
    """A trainer that goes on from a training state, after an update."""
    trainer = make_trainer(ema=True, optimizer=optimizer)
    trainer.restore(saved)
    trainer.update([next(iter(Loader().epoch(1)))])
    return trainer


def captured():
    trainer = make_trainer(ema=True)
    trainer.update([next(iter(Loader().epoch(0)))])
    return trainer.capture()


@pytest.mark.parametrize(
    "place, value, says",
    [
        ("optimizer.state.0.exp_avg", torch.zeros(3), "exp_avg of shape .3,. for body.1.weight"),
        ("optimizer.state.2", MISSING, "no moments of head.weight"),
        ("lr_scheduler.position", MISSING, "lr_scheduler cannot be put back .KeyError"),
        ("optimizer.state", 3, "optimizer cannot be put back"),
        ("ema.calls", MISSING, "ema cannot be put back"),
        ("ranks.0.rng.torch", torch.zeros(9, dtype=torch.uint8), r"rng cannot be put back"),
    ],
)
def test_what_does_not_fit_the_run_is_one_line_that_names_the_entry(place, value, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        resumed(changed(captured(), place, value))
    assert "\n" not in str(caught.value)


def test_a_parameter_that_stays_without_a_gradient_may_stay_without_moments():
    saved = changed(captured(), "optimizer.state.2")
    trainer = make_trainer(ema=True)
    trainer.restore(saved)
    trainer.model.head.weight.requires_grad_(False)
    trainer.update([next(iter(Loader().epoch(1)))])
    assert trainer.without_moments == []


def test_a_run_of_swin_goes_on_after_its_epoch_in_updates_of_several_batches():
    before, after = (make_trainer(accumulation=2, dtype=torch.float16) for _ in range(2))
    before.update(list(Loader(2).epoch(0)))
    before.scaler.update(new_scale=512.0)
    saved = {
        "model": before.model.state_dict(),
        "optimizer": before.optimizer.state_dict(),
        "scaler": before.scaler.state_dict(),
        "epoch": 3,
        "max_accuracy": 41.5,
    }
    after.update(list(Loader(2).epoch(0)))  # so that its scaler has begun
    with patch.object(after.scheduler, "step_update") as stepped:
        resume(after, Checkpoint(saved, "swin.pth", Path("swin.pth")), {}, batches_per_epoch=9)
    assert after.state == TrainState(epoch=4, update=4 * 4, best=41.5, best_epoch=3)
    assert after.scaler.get_scale() == 512
    stepped.assert_called_once_with((4 * 9 - 1) // 2)
