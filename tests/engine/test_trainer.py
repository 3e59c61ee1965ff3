"""Each option of a trainer has its effect on the update."""

import pytest
import torch
from torch import nn

from engine import trainer as module
from engine.trainer import parallel
from tests.engine.small import Loader, make_trainer, weights
from utils import World


def test_the_average_follows_the_weights_after_each_update():
    trainer = make_trainer(ema=True)
    expected = weights(trainer)
    for batch in Loader(3).epoch(0):
        trainer.update([batch])
        for name, p in weights(trainer).items():
            expected[name] = 0.9 * expected[name] + 0.1 * p
    for name, p in trainer.ema.module.named_parameters():
        torch.testing.assert_close(p, expected[name])


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_reach_the_model_in_the_chosen_order(channels_last):
    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def forward(self, images):
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return self.head(images.mean((2, 3)))

    seen = []
    trainer = make_trainer(model=Watch(), channels_last=channels_last)
    trainer.update([(torch.randn(4, 3, 6, 6), torch.randint(0, 5, (4,)))])
    assert seen == [channels_last]


@pytest.mark.parametrize("chosen", [True, False])
def test_a_compiled_network_is_what_an_update_calls(monkeypatch, chosen):
    class Compiled(nn.Module):
        def __init__(self, network) -> None:
            super().__init__()
            self.network = network

        def forward(self, images):
            calls.append(len(images))
            return self.network(images)

    calls = []
    monkeypatch.setattr(torch, "compile", Compiled)
    trainer = make_trainer(compile=chosen)
    trainer.update(list(Loader(1).epoch(0)))
    assert calls == ([4] if chosen else [])


@pytest.mark.parametrize("chosen", [True, False])
def test_a_loss_of_two_heads_gets_the_pair_of_logits(chosen):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def forward(self, images):
            return self.head(images.mean((2, 3)))

        def forward_heads(self, images):
            logits = self.forward(images)
            return logits, 2 * logits

    trainer, seen = make_trainer(model=Pair(), two_heads=chosen), []
    trainer.loss = lambda images, logits, targets: seen.append(type(logits)) or sum(logits).mean()
    trainer.update([(torch.randn(4, 3, 6, 6), torch.randint(0, 5, (4,)))])
    assert seen == [tuple if chosen else torch.Tensor]


def test_a_restored_trainer_has_the_saved_position_of_the_schedule():
    trainer = make_trainer()
    for batch in Loader(3).epoch(0):
        trainer.update([batch])
        trainer.advance(3)
    again = make_trainer()
    again.restore(trainer.capture())
    assert again.scheduler.position == 2
    assert again.optimizer.param_groups[0]["lr"] == trainer.optimizer.param_groups[0]["lr"]
    assert again.state == trainer.state


def test_the_loss_of_an_update_is_the_mean_of_its_micro_batches():
    trainer = make_trainer(accumulation=2)
    losses = iter([1.0, 4.0])
    trainer.loss = lambda images, logits, targets: 0 * logits.sum() + next(losses)
    trainer.update(list(Loader(2).epoch(0)))
    assert trainer.statistics.read()["loss"] == 2.5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_several_processes_share_gradients_but_no_buffers(monkeypatch, device):
    told = {}

    def wrapper(network, device_ids=None, gradient_as_bucket_view=False, broadcast_buffers=True):
        told.update(
            devices=device_ids, views=gradient_as_bucket_view, broadcast_buffers=broadcast_buffers
        )
        return nn.Identity()

    monkeypatch.setattr(module, "DistributedDataParallel", wrapper)
    world, network = World("cpu"), nn.Linear(1, 1)
    assert parallel(network, world) is network
    world.size, world.device = 2, torch.device(device, 1 if device == "cuda" else 0)
    assert parallel(network, world) is not network
    devices = [1] if device == "cuda" else None
    assert told == {"devices": devices, "views": True, "broadcast_buffers": False}
