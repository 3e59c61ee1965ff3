"""The one update that every kind of training here shares, and what it changes."""

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from checkpoint import CheckpointError
from engine.agreement import DRIFTED, WeightCheck, agree, checksums
from engine.clip import clip_gradients
from engine.ema import ParameterEma
from engine.guard import guarded_step
from engine.restore import (
    check_kinds,
    check_shapes,
    refuse_lost_moments,
    restoring,
    without_moments,
)
from engine.state import Layout, TrainState, place
from engine.statistics import UpdateStatistics
from utils import World, autocast_factory, capture_rng, memory_format, restore_rng

LOGGER = logging.getLogger(__name__)
Batch = tuple[Tensor, Tensor]


class Trainer:
    """Everything that an update changes, and the update.

    Args:
        model: on its device, bare.
        optimizer, scheduler: over its parameters; scheduler has step_update(n), state_dict,
            load_state_dict.
        loss: (images, logits, targets) -> scalar, the mean over the batch, formed in float32 or
            wider.
        layout: batch_size, world_size and accumulation (micro-batches of one update).
        dtype: of autocast; float16 turns on the gradient scaler, float32 turns autocast off.
        clip, clip_mode: for `engine.clip.clip_gradients`.
        mixup: (images, targets) -> (images, soft targets), or None.
        two_heads: the loss takes the pair of logits of `model.forward_heads`, class head first,
            instead of the model's result.
        ema: `engine.ema.ParameterEma` or None.
        ema_leads: it is evaluated too, and the best checkpoint is chosen by it (`leader`: the model
            that decides).
        check_ranks: updates between two comparisons of the processes' weights, 0 none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        loss: Callable[..., Tensor],
        *,
        world: World,
        layout: Layout,
        dtype: torch.dtype = torch.float32,
        clip: float | None = None,
        clip_mode: str = "norm",
        mixup: Callable[..., Batch] | None = None,
        ema: ParameterEma | None = None,
        ema_leads: bool = True,
        compile: bool = False,
        channels_last: bool = False,
        two_heads: bool = False,
        check_ranks: int = 0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loss = loss
        self.world = world
        self.device = world.device
        self.layout = layout
        self.clip = clip
        self.clip_mode = clip_mode
        self.mixup = mixup
        self.ema = ema
        self.leader = ema.module if ema is not None and ema_leads else model
        self.autocast = autocast_factory(self.device, dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.memory_format = memory_format(channels_last)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        names = model.classifiers() if hasattr(model, "classifiers") else []
        heads = [model.get_submodule(name) for name in names]
        self.classifier = [p for head in heads for p in head.parameters()]
        network = BothHeads(model) if two_heads else model  # shares the model's weights
        self.network = torch.compile(network) if compile else network
        self.parallel = parallel(self.network, world)
        self.statistics = UpdateStatistics(self.device)
        self.state = TrainState()
        self.weight_check = WeightCheck(world, check_ranks)
        self.without_moments: list[tuple[str, nn.Parameter]] = []  # of a restored optimizer

    def update(self, batches: list[Batch]) -> None:
        """One optimizer update from the micro-batches of a window. Nothing is read back from the
        device.
        """
        loss = torch.zeros((), device=self.device)
        with self.world.waiting("the gradients of an update"):
            for index, (images, targets) in enumerate(batches):
                with self._reduction(last=index + 1 == len(batches)):
                    part = self._forward(images, targets) / len(batches)
                    self.scaler.scale(part).backward()
                loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        # Gradients, and so the norm, are the same on all processes.
        norm = clip_gradients(self.parameters, self.clip, self.clip_mode, self.classifier)
        finite = torch.isfinite(norm)
        if self.without_moments:
            refuse_lost_moments(self.without_moments)
            self.without_moments = []
        guarded_step(self.optimizer, finite)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        self.statistics.add(loss, norm, finite)

    def _forward(self, images: Tensor, targets: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        targets = targets.to(self.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with self.autocast():
            return self.loss(images, self.parallel(images), targets)

    def _reduction(self, last: bool) -> AbstractContextManager:
        """Gradients are averaged over the processes with the last micro-batch of a window only."""
        return nullcontext() if last or self.parallel is self.network else self.parallel.no_sync()

    def advance(self, batches_per_epoch: int) -> None:
        """Moves the position, and the learning rate, past an update.

        The schedule's argument is Swin's: the index of the update's last micro-batch,
        counted over all epochs, divided by the accumulation.
        """
        state = self.state
        state.update += 1
        state.batch += self.layout.accumulation
        self.scheduler.step_update(
            (state.epoch * batches_per_epoch + state.batch - 1) // self.layout.accumulation
        )
        self.weight_check.after_update(state.update, self.position, self.replicated)

    def position(self) -> dict[str, int]:
        """Where the run stands, for a comparison of processes."""
        state = self.state
        rates = [group["lr"] for group in self.optimizer.param_groups]
        bits = torch.tensor(rates, dtype=torch.float64).view(torch.int64).sum()
        return {
            "the number of updates": state.update,
            "the epoch": state.epoch,
            "the batch": state.batch,
            "the learning rate": int(bits),
        }

    def replicated(self) -> dict[str, Tensor]:
        """All tensors of the model and its average that every process must hold alike, by name: not
        the running statistics of BatchNorm, which each forms of its own images.
        """
        found = replicated_tensors(self.model)
        if self.ema is not None:
            averages = replicated_tensors(self.ema.module)
            found |= {f"{name} (average)": tensor for name, tensor in averages.items()}
        return found

    def compare_processes(self, what: str, remedy: str) -> None:
        """Compares position, weights and the optimizer's state over the processes, and waits for
        the device. Every process must call it.

        Raises: RunError, on every process.
        """
        if self.world.control is None:
            return
        tensors = self.replicated()
        names = {p: name for name, p in self.model.named_parameters()}
        numbers = self.position()
        for parameter, kept in self.optimizer.state.items():
            for key, value in kept.items():
                name = f"{names.get(parameter, 'a parameter')} (optimizer's {key})"
                if isinstance(value, Tensor):
                    tensors[name] = value
                else:
                    numbers[name] = value
        agree(self.world, what, numbers | checksums(tensors), remedy, shown=False)

    def share_statistics(self) -> None:
        """Gives all processes the main one's running statistics of BatchNorm, which are those that
        are saved, so that all evaluate the same network. Every process must call it.
        """
        if self.world.control is None:
            return
        networks = [self.model] if self.ema is None else [self.model, self.ema.module]
        for buffer in [b for network in networks for b in running_statistics(network).values()]:
            dist.broadcast(buffer, src=0)

    def capture(self) -> dict[str, Any] | None:
        """All of it as tensors and plain data, on the main process; None elsewhere. Every process
        must call it.

        Raises: RunError where the processes no longer hold the same.
        """
        if self.weight_check.every:
            self.compare_processes(f"what to save after update {self.state.update}", DRIFTED)
        ranks = self.world.gather(
            {"rng": capture_rng(self.device), "tally": self.statistics.values.cpu()}
        )
        if not self.world.is_main:
            return None
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.state),
            "layout": asdict(self.layout),
            "ranks": ranks,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Puts back what `capture` took, on every process.

        Settings (rates, decay, ...) are this run's, not the saved ones. With another number of
        processes the random states cannot be met, and a warning says so.
        Raises: CheckpointError where the model or the position does not fit.
        """
        layout = Layout(**saved["layout"])
        self.state = place(TrainState(**saved["progress"]), layout, self.layout)
        check_kinds(self.model, saved["model"])
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint holds another model: {' '.join(str(error).split())[:300]}"
            ) from error
        if saved["ema"]:
            check_kinds(self.model, saved["ema"])
        with restoring("ema"):
            self._restore_ema(saved["ema"])
        self.restore_optimizer(saved["optimizer"], saved["scaler"])
        with restoring("lr_scheduler"):
            self.scheduler.load_state_dict(saved["lr_scheduler"])
        if layout.world_size == self.layout.world_size:
            mine = saved["ranks"][self.world.rank]
            self.statistics.values = mine["tally"].to(self.statistics.values)
            with restoring(f"ranks[{self.world.rank}].rng"):
                restore_rng(mine["rng"], self.device)
        else:
            LOGGER.warning(
                "resuming with %d processes a run of %d: drop path and mixup draw other numbers"
                " than before",
                self.layout.world_size,
                layout.world_size,
            )

    def restore_optimizer(
        self, optimizer: dict[str, Any], scaler: dict[str, Any] | None = None
    ) -> None:
        """Puts back the moments and, where gradients are scaled, the scaler.

        Raises: CheckpointError where a moment does not have its parameter's shape.
        """
        with restoring("optimizer"):
            self.optimizer.load_state_dict(optimizer)
        if self.scaler.is_enabled() and scaler:
            with restoring("scaler"):
                self.scaler.load_state_dict(scaler)
        check_shapes(self.model, self.optimizer)
        self.without_moments = without_moments(self.model, self.optimizer)

    def _restore_ema(self, saved: dict[str, Tensor] | None) -> None:
        if self.ema is None:
            if saved is not None:
                LOGGER.warning(
                    "resuming: the checkpoint's average of the parameters is dropped,"
                    " MODEL.EMA.ENABLE is False"
                )
            return
        if saved is None:
            LOGGER.warning(
                "resuming: the checkpoint has no average of the parameters; it starts from its"
                " weights"
            )
        self.ema.load_state_dict(self.model.state_dict() if saved is None else saved)


class BothHeads(nn.Module):
    """A model as the trainer calls it where its two heads have different teachers: images -> (class
    logits, distillation logits).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, K) twice."""
        return self.model.forward_heads(images)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of BatchNorm layers, by name."""
    return {
        f"{prefix}.{name}": buffer
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, buffer in module.named_buffers(recurse=False)
    }


def replicated_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, but for running statistics, by name."""
    own = running_statistics(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in own}
    return {**dict(model.named_parameters()), **buffers}


def parallel(network: nn.Module, world: World) -> nn.Module:
    """The network, wrapped so that backward averages gradients over the processes; as it is where
    there is only one.
    """
    if world.size == 1:
        return network
    options = {"gradient_as_bucket_view": True}
    if world.device.type == "cuda":
        options["device_ids"] = [world.device.index]
    known = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in known  # in torch 2.15
    options["forward_sync_buffers" if renamed else "broadcast_buffers"] = False
    return DistributedDataParallel(network, **options)
