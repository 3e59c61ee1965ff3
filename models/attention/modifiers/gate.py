"""Gates of the heads' results, read off the module's input."""

from typing import Any

from torch import Tensor, nn

from kernels.linear import run_linear
from kernels.window_attention import WindowLayout
from models.attention.geometry import Geometry
from models.layers.init import trunc_normal
from registry import check_choice

from .base import MODIFIERS, OutputModifier

PAPER_STD = 0.02


@MODIFIERS.register("gate")
class Gate(OutputModifier):
    """Multiplies what each head gives by a gate that the token itself sets, before the output
    projection.

        open:   y <- y * 2 sigmoid(x W_g)       W_g starts at 0: gates at 1, exactly neutral
        paper:  y <- y * sigmoid(x W_g)         W_g starts at N(0, 0.02²): gates near 1/2

    Args:
        kind: head (one gate a head) or element (one a channel).
        init: open or paper; it chooses the formula, too.
    Shapes: y (B, H, W, inner), x (B, H, W, C) -> y's; `linear.weight` is W_gᵀ, (heads, C) or
        (inner, C), without a bias: a matrix, which weight decay pulls towards equal gates. That
        adds C H or C² numbers a layer; an MLP of C / 2 more hidden units has as many as the latter.
    Raises: ValueError for a word that is not one of the above.
    Source: Gated Attention for Large Language Models, arXiv:2505.06708 (sigmoid, head-specific,
        after the product). The open start is not the paper's.
    """

    def __init__(self, geometry: Geometry, kind: str = "head", init: str = "open"):
        super().__init__(geometry)
        check_choice("gate: kind", kind, ("head", "element"))
        check_choice("gate: init", init, ("open", "paper"))
        self.per_head = kind == "head"
        self.start = 0.0 if init == "open" else PAPER_STD
        self.most = 2.0 if init == "open" else 1.0  # what a gate can become
        gates = geometry.num_heads if self.per_head else geometry.inner
        self.linear = nn.Linear(geometry.dim, gates, bias=False)

    def initialise(self, attention: nn.Module) -> None:
        """Sets W_g to 0, or draws it."""
        trunc_normal(self.linear.weight, self.start)

    def forward(self, y: Tensor, v: Tensor, x: Tensor, layout: WindowLayout, **read: Any) -> Tensor:
        """y (B, H, W, inner) times its gates, which are float32 or wider."""
        scores = run_linear(self.linear, x)  # (B, H, W, heads or inner)
        gates = self.most * scores.to(self.linear.weight.dtype).sigmoid()
        if not self.per_head:
            return (y * gates).to(y.dtype)
        heads = y.unflatten(-1, (self.geometry.num_heads, -1))
        return (heads * gates.unsqueeze(-1)).flatten(-2).to(y.dtype)

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates of x W_g."""
        return tokens * self.linear.weight.numel()
