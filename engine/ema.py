"""Exponential moving average of the parameters."""

from timm.utils import ModelEmaV3
from torch import Tensor, nn

from registry import Interval
from utils import RunError

DECAY = Interval(0, 1, "[)")


class ParameterEma:
    """A second copy of a model whose parameters follow p_ema <- decay p_ema + (1 - decay) p;
    buffers are copied.

    Averaging buffers would blend integer index tables and running counts, which made earlier
    averages of Swin worse (microsoft/Swin-Transformer issue 111). The average looks back about 1 /
    (1 - decay) updates: choose decay for the run's length.

    Args:
        model: on its device; wrapped by DDP or compile or not.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        if not DECAY.holds(decay):
            raise RunError(f"MODEL.EMA.DECAY {decay} is outside {DECAY}")
        self._ema = ModelEmaV3(unwrap(model), decay=decay, exclude_buffers=True)
        self._ema.requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The averaged model, in eval mode and without gradients."""
        return self._ema.module

    def update(self, model: nn.Module) -> None:
        """Averages in the parameters after one update; no host synchronisation."""
        self._ema.update(unwrap(model))

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged model's own state dict."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues an average; names and shapes must agree (RuntimeError)."""
        self.module.load_state_dict(state, strict=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
