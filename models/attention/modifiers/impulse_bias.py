"""Each head starts as the shift by one offset, written into the position bias."""

import math
from typing import Literal

import torch
from torch import nn

from models.attention.geometry import Geometry
from models.layers.init import set_values

from .base import MODIFIERS, Modifier

RELEASED = (4, 1, 5, 3, 7, 0, 2, 6, 8)  # places of the 3 x 3, row by row


@MODIFIERS.register("impulse_bias")
class ImpulseBias(Modifier):
    """Initialises one entry of the position bias of each head, and changes nothing else.

        bias[j - i = delta_h, h] = scale

    Head h attends from i to i + delta_h, one of the kernel x kernel places around i, nearest first:
    the first head to the token itself. With more heads than places the order begins again. Where
    i + delta_h lies outside of the window, the row starts without an impulse. No parameter is
    added, nothing is neutral. An initialiser that comes later in the list wins.

    Args:
        kernel: side of the square of places, odd; 3 takes them in the order of the released code,
            in which the sense of the shifts is not verified.
        scale: of the entry, above 0; auto is log(N - 1) for N tokens of a window, which gives it
            half of the row where the other logits are equal.
    Shapes: sets H entries of attention.relative_position_bias_table (T or more, H).
    Raises: ValueError for a kernel that is even or reaches out of the window, a scale that is not
        above 0, and, by the backbone, for attention without such a table: SwinV2's bias is the
        output of an MLP, ViT and its relatives have none (timm's BEiT has).
    Source: after Structured Initialization, arXiv:2505.19985, which makes W_q and W_k of a ViT
        give such a map; its form for Swin is not released, this one is ours.
    """

    def __init__(
        self, geometry: Geometry, kernel: int = 3, scale: float | Literal["auto"] = "auto"
    ):
        super().__init__(geometry)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"impulse_bias(kernel={kernel}): allowed are odd numbers from 1 on")
        if kernel // 2 >= min(geometry.window):
            rows, columns = geometry.window
            raise ValueError(
                f"impulse_bias(kernel={kernel}): a window of {rows}x{columns} has no offset of"
                f" {kernel // 2}; choose a smaller kernel"
            )
        if scale != "auto" and scale <= 0:
            raise ValueError(f"impulse_bias(scale={scale}): allowed are numbers above 0, and auto")
        self.kernel = kernel
        tokens = geometry.window[0] * geometry.window[1]
        self.scale = math.log(max(2, tokens - 1)) if scale == "auto" else float(scale)

    @torch.no_grad()
    def initialise(self, attention: nn.Module) -> None:
        """Sets the entries."""
        table = getattr(attention, "relative_position_bias_table", None)
        if table is None:
            why = "has no position bias"
            if attention.cosine:
                why = "makes its position bias by an MLP"
            raise ValueError(
                f"impulse_bias: {type(attention).__name__} {why}, so there is no table to set;"
                " leave it out, or take MODEL.TYPE swin"
            )
        for head, row in enumerate(self.rows()):
            set_values((table[row, head],), lambda: [torch.tensor(self.scale, device="cpu")])

    def rows(self) -> list[int]:
        """The row of the offset table for each head."""
        rows, columns = self.geometry.window
        half = self.kernel // 2
        places = sorted(range(self.kernel**2), key=self._nearness)
        found = []
        for head in range(self.geometry.num_heads):
            down, right = (n - half for n in divmod(places[head % len(places)], self.kernel))
            # a table's row counts from query minus key, the shift is key minus query
            found.append((rows - 1 - down) * (2 * columns - 1) + columns - 1 - right)
        return found

    def _nearness(self, place: int) -> tuple[int, int]:
        if self.kernel == 3:
            return 0, RELEASED.index(place)
        down, right = (n - self.kernel // 2 for n in divmod(place, self.kernel))
        return down**2 + right**2, place
