"""Multiply-accumulates of a model, counted by running it: nothing has to be kept up to date when a
layer changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kernels.modes import without_autocast
from models.attention.modifiers import LogitMixer, MapModifier
from models.attention.softmax import SoftmaxAttention

_ATEN = torch.ops.aten
# PyTorch before 2.15 has no formula for its attention on the CPU; it is that of the same operation
# on CUDA.
_FORMULAS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    **flop_registry,
}


@dataclass
class Macs:
    """Multiply-accumulates of one image, by kind. Element-wise work (softmax, masks, activations)
    is in none of them.

    linear: linear layers and convolutions.
    attention: products of two activations, such as q kᵀ and map times v, and all that modifiers do
        to an N x N matrix.
    norm: 2 per number that a LayerNorm writes.

    Local attention is counted as it is computed, tile by tile: more than the k² products per pixel
    of its own `flops`.
    """

    linear: int = 0
    attention: int = 0
    norm: int = 0

    @property
    def with_attention(self) -> int:
        """Linear layers, convolutions and attention products; no norms. Most papers' FLOPs are
        these.
        """
        return self.linear + self.attention

    @property
    def without_attention(self) -> int:
        """Linear layers, convolutions and norms; no attention products: what counters of layers
        alone report.

        The counts published for the Gaussian mixture mask (arXiv:2309.05375) are these.
        """
        return self.linear + self.norm

    def __sub__(self, other: "Macs") -> "Macs":
        return Macs(
            self.linear - other.linear, self.attention - other.attention, self.norm - other.norm
        )


def count_macs(model: nn.Module, images: Tensor) -> Macs:
    """Multiply-accumulates that one image more costs, in eval mode and full precision.

    images: (B, C, H, W), of which the first is used. It runs as a batch of two and of three; the
    difference leaves out what is worked out once for all images, such as a position bias. The model
    is left as it was.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with (
            torch.no_grad(),
            without_autocast(images.device.type),
            _plain_attention(model),
        ):
            # Evaluation keeps what follows from the parameters alone; it must be there in both
            # counts or in neither.
            model(images[:1])
            two, three = (
                _count(model, images[:1].expand(batch, -1, -1, -1).contiguous()) for batch in (2, 3)
            )
    finally:
        for module in training:
            module.training = True
    return three - two


def _count(model: nn.Module, images: Tensor) -> Macs:
    counter = _Counter()
    handles = [
        handle
        for module in model.modules()
        if isinstance(module, (LogitMixer, MapModifier))
        for handle in (
            module.register_forward_pre_hook(counter.enter),
            module.register_forward_hook(counter.leave),
        )
    ]
    try:
        with counter:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return counter.macs


class _Counter(TorchDispatchMode):
    """Sees every operation that PyTorch carries out, in hand-written autograd functions too;
    PyTorch's own formulas count its FLOPs.
    """

    def __init__(self):
        super().__init__()
        # modifiers: how many of the N x N matrix are at work, one inside the other
        self.macs = Macs()
        self.modifiers = 0

    def enter(self, *_) -> None:
        self.modifiers += 1

    def leave(self, *_) -> None:
        self.modifiers -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func._overloadpacket
        if operation is _ATEN.native_layer_norm:
            self.macs.norm += 2 * args[0].numel()
        elif operation in _FORMULAS:
            count = _FORMULAS[operation](*args, **kwargs, out_val=out) // 2
            if self.modifiers or _is_product(str(operation), args):
                self.macs.attention += count
            else:
                self.macs.linear += count
        return out


def _is_product(operation: str, args: tuple) -> bool:
    """Whether two activations are multiplied; a weight that is the same for the whole batch has
    stride 0 there.
    """
    if "attention" in operation:
        return True
    return "bmm" in operation and all(matrix.stride(0) for matrix in args[-2:])


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Inside, attention is computed by the plain formula: the counter does not see into fused
    kernels.
    """
    modules = [module for module in model.modules() if isinstance(module, SoftmaxAttention)]
    specs = [module.spec for module in modules]
    try:
        for module in modules:
            module.spec = replace(module.spec, backend="reference")
        yield
    finally:
        for module, spec in zip(modules, specs, strict=True):
            module.spec = spec
