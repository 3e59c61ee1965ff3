"""Run under torchrun with two processes by test_distributed.py; writes what happened as JSON to the
file named on the command line.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # noqa: E402

from engine.guard import DivergedError  # noqa: E402
from engine.signals import StopSignal  # noqa: E402
from engine.train import validate  # noqa: E402
from tests.engine.small import Loader, Silent, evaluation, make_trainer, run_fit, weights  # noqa: E402
from tests.engine.two_programs import QUICK, run_cases  # noqa: E402
from utils import World  # noqa: E402


def flat(trainer) -> list[float]:
    return torch.cat([p.flatten() for p in weights(trainer).values()]).tolist()


def no_dropout(trainer):
    trainer.model.body[3].p = 0.0
    return trainer


def my_half(batch, world):
    return tuple(part[world.rank :: world.size] for part in batch)


def averaging(world) -> dict:
    """Two processes with half a batch each, and the reductions of a window of three
    micro-batches.
    """
    reductions = []

    def hook(state, bucket):
        reductions.append(bucket.index())
        return allreduce_hook(state, bucket)

    trainer = no_dropout(make_trainer(world=world, accumulation=3, clip=1.0))
    trainer.parallel.register_comm_hook(None, hook)
    for epoch in range(3):
        trainer.update([my_half(batch, world) for batch in Loader(3).epoch(epoch)])
    return {"reductions": len(reductions), "weights": flat(trainer)}


def nan_on_one_rank(world) -> dict:
    """The second process meets a NaN."""
    trainer, (images, targets) = make_trainer(world=world), next(Loader().epoch(0))
    before = flat(trainer)
    trainer.update([(images * float("nan") if world.rank == 1 else images, targets)])
    return {"unchanged": flat(trainer) == before, **trainer.statistics.read()}


def divergence(world) -> str:
    """All updates bad, on the second process only."""

    class Broken(Loader):
        def epoch(self, epoch, start_batch=0):
            factor = float("nan") if world.rank == 1 else 1.0
            return (
                (images * factor, targets) for images, targets in super().epoch(epoch, start_batch)
            )

    try:
        run_fit(make_trainer(world=world), Broken(), epochs=1, max_nonfinite=2)
    except DivergedError as error:
        return str(error)
    return ""


def signal_to_one_rank(world) -> dict:
    """SIGTERM to the second process alone, after its second update."""

    class Signalled(Loader):
        def epoch(self, epoch, start_batch=0):
            for index, batch in enumerate(super().epoch(epoch, start_batch)):
                if index == 2 and world.rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    trainer, _ = run_fit(make_trainer(world=world), Signalled(50), epochs=1)
    return {"update": trainer.state.update}


def running_statistics(world) -> dict:
    """What each process evaluates of a BatchNorm that has seen other images than the others'."""
    seen = []

    def look(model, **_):
        seen.append(model[2].running_mean.tolist())
        return evaluation()

    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    trainer = make_trainer(world=world, model=model, ema=True)
    trainer.update([my_half(next(Loader().epoch(0)), world)])
    own = model[2].running_mean.tolist()
    with StopSignal(world) as stop:
        validate(trainer, look, Silent(), stop)
    return {"own": own, "evaluated": seen}


def no_signal(world) -> int:
    with StopSignal(world) as stop:
        return max([stop.poll() for _ in range(5)] + [stop.agree()])


def main() -> None:
    with World("cpu") as world:
        mine = {
            "averaging": averaging(world),
            "nan": nan_on_one_rank(world),
            "divergence": divergence(world),
            "signal": signal_to_one_rank(world),
            "statistics": running_statistics(world),
            "no_signal": no_signal(world),
            "mean": world.mean(world.rank + 1.0),
            "broadcast": world.broadcast(f"from {world.rank}"),
        }
        gathered = world.gather(mine)
    out = Path(sys.argv[1])
    if world.is_main:
        out.write_text(json.dumps(gathered))
    run_cases(out.parent, QUICK)


if __name__ == "__main__":
    main()
