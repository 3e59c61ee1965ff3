"""A mixer instead of softmax attention: over all tokens of an image, or window by window."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.window_attention import WindowLayout, window_partition, window_reverse

from .geometry import Geometry
from .mixers import MIXERS
from .regions import axis_regions
from .spec import AttentionSpec


class MixerAttention(nn.Module):
    """What both forms share: the mixer that `spec` names, and the refusal of what only softmax
    attention has.

    Args:
        geometry: dim, heads, and the class tokens, which are ordinary tokens of a mixer that pools.
            The other arguments are those of softmax attention; only proj_drop, dropout of the
            result, acts on a mixer.
    State dict: mixer.*, the mixer's own parameters.
    Raises: ValueError with the reason for arguments without a meaning, and for class tokens where a
        mixer needs every token's place.
    """

    def __init__(
        self,
        geometry: Geometry,
        spec: AttentionSpec,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        out_dim: int = 0,
    ):
        super().__init__()
        refuse_softmax_options(spec)
        others = {
            "qkv_bias": qkv_bias is not True,
            "qk_scale": qk_scale is not None,
            "head_dim": bool(geometry.head_dim),
            "another number of channels": out_dim not in (0, geometry.dim),
            "a pretrained window": any(geometry.pretrained_window),
        }
        _refuse(spec, [name for name, given in others.items() if given])
        self.geometry = geometry
        self.spec = spec
        self.mixer = MIXERS.create(spec.mixer, geometry.dim, geometry.num_heads)
        width = getattr(self.mixer, "out_dim", geometry.dim)
        if width != geometry.dim:
            raise ValueError(
                f"mixer {spec.mixer} makes {width} channels of {geometry.dim}; leave out_dim out"
            )
        if geometry.prefix and self.mixer.needs_places:
            raise ValueError(
                f"mixer {spec.mixer} gives every token its neighbours on the grid, and a class"
                " token or register has none: leave it out (CLASS_TOKEN False and POOL mean,"
                " REGISTERS 0)"
            )
        self.proj_drop = nn.Dropout(proj_drop)

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for `tokens` tokens."""
        return self.mixer.flops(tokens)


class GlobalMixer(MixerAttention):
    """Shapes: (B, N, C) -> (B, N, C), N = prefix + rows * columns of the geometry's grid."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.proj_drop(self.mixer(x, self.geometry.window))


class WindowMixer(MixerAttention):
    """Every region of every window by itself, see `by_regions`.

    Shapes: x (B, H, W, C) -> (B, H, W, C).
    """

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:
        """x: (B, H, W, C) with the grid of `layout` -> (B, H, W, C)."""
        return self.proj_drop(by_regions(x, layout, self.mixer))

    def map_flops(self, layout: WindowLayout) -> int:
        """Multiply-accumulates for one map; padding is not computed."""
        return self.flops(layout.grid[0] * layout.grid[1])


def by_regions(
    x: Tensor, layout: WindowLayout, attend: Callable[[Tensor, tuple[int, int]], Tensor]
) -> Tensor:
    """Attention within the windows of `layout` without a mask: what the mask allows to meet is cut
    out and attended to by itself.

    A cyclic shift by s fills the last window of an axis with the axis' first s rows and its last M
    - s ones, which the mask keeps apart. So an axis falls into s rows, whole windows and a rest,
    cut at the edge of the map: no padding takes part. Regions of one size go through `attend`
        together, at most 9 calls.

    Args:
        attend: (tokens (B', n, C), their (rows, columns)) -> (B', n, C).
    Shapes: x (B, H, W, C) -> (B, H, W, C).
    """
    by_row, by_column = (
        axis_regions(*axis) for axis in zip(layout.grid, layout.window, layout.shift, strict=True)
    )
    strips = []
    for (rows, down), strip in zip(
        by_row, x.split([side * count for side, count in by_row], 1), strict=True
    ):
        parts = []
        for (columns, across), part in zip(
            by_column, strip.split([side * count for side, count in by_column], 2), strict=True
        ):
            y = attend(window_partition(part, (rows, columns)).flatten(1, 2), (rows, columns))
            parts.append(
                window_reverse(
                    y.unflatten(1, (rows, columns)), (rows, columns), rows * down, columns * across
                )
            )
        strips.append(torch.cat(parts, 2))
    return torch.cat(strips, 1)


def refuse_softmax_options(spec: AttentionSpec) -> None:
    """Raises ValueError for what `spec` asks of a softmax, a map or a kernel that its mixer does
    not have.
    """
    if spec.modifiers:
        raise ValueError(
            f"attention modifiers {list(spec.modifiers)} change parts of softmax attention, which"
            f" mixer {spec.mixer} does not form; set MODEL.ATTENTION.MODIFIERS [] or"
            " MODEL.ATTENTION.MIXER softmax"
        )
    neutral = AttentionSpec()
    _refuse(
        spec,
        [
            f"MODEL.ATTENTION.{name.upper()}"
            for name in ("drop", "logit_scale_init", "bias_sigmoid", "backend")
            if getattr(spec, name) != getattr(neutral, name)
        ],
    )


def _refuse(spec: AttentionSpec, names: list[str]) -> None:
    if names:
        raise ValueError(
            f"{', '.join(names)}: only softmax attention has that, mixer {spec.mixer} does not;"
            " leave the default"
        )
