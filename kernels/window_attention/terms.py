"""What multiplies the logits and what is added to them, as tables over relative offsets.

A table has one row per offset between two tokens of a window, T = (2 Mh - 1)(2 Mw - 1), and one
column per head. A fused kernel reads the tables; the open path gathers them to N x N. Terms that
are no function of the offset are given dense, (heads, N, N).
"""

import torch
from torch import Tensor

from .layout import Size, WindowLayout, relative_position_index

NAMES = ("scale", "bias", "post", "renormalise")
FORMER_NAMES = {"weight": "scale"}


class OffsetTerms:
    """`scale`, `bias` and `post` of softmax(q kᵀ * scale + bias + mask) * post.

    Args:
        scale: (T, heads), or (1, heads) when it is the same for all pairs, or dense (heads, N,
            N).
        bias: (T, heads), dense (heads, N, N), or None.
        post: multiplies the softmaxed map; shapes as `bias`.
        renormalise: divide the rows of the map by their sum after `post`.
        prefix: leading tokens without a place on the grid (class tokens); in a table's gathered
            form their pairs have scale `neutral` (1, heads), bias 0 and post 1.
        neutral: by default the scale given here, which must then be (1, heads).
        weight: the former name of `scale`; read everywhere a term is named.
    Gathered forms are cached on the object, which is made once per step in training and once per
    set of parameters in evaluation.
    """

    def __init__(
        self,
        window: Size,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        post: Tensor | None = None,
        renormalise: bool = False,
        prefix: int = 0,
        neutral: Tensor | None = None,
        weight: Tensor | None = None,
    ):
        self.window = window
        self.scale = weight if scale is None else scale
        self.bias = bias
        self.post = post
        self.renormalise = renormalise
        self.prefix = prefix
        self.neutral = self.scale if neutral is None else neutral
        self._cache: dict = {}
        self.checked: dict = {}  # what these terms were found to fit, see arguments.py
        if self.scale is None:
            raise TypeError("OffsetTerms: no scale is given; pass one of shape (1 or T, heads)")

    @property
    def weight(self) -> Tensor:
        """The former name of `scale`."""
        return self.scale

    def replace(self, **changes) -> "OffsetTerms":
        """A copy with some of scale, bias, post and renormalise exchanged."""
        fields = {name: getattr(self, name) for name in NAMES}
        fields.update({FORMER_NAMES.get(name, name): value for name, value in changes.items()})
        return OffsetTerms(self.window, **fields, prefix=self.prefix, neutral=self.neutral)

    def scale_heads(self, factor: Tensor) -> "OffsetTerms":
        """A copy whose scale is multiplied by a factor per head (heads,), in whichever form it is
        given; the pairs of class tokens too.
        """
        copy = self.replace(scale=_times_heads(self.scale, factor))
        if self.prefix:
            copy.neutral = _times_heads(self.neutral, factor)
        return copy

    def dense(self, name: str) -> Tensor | None:
        """The term `name` gathered over pairs: (heads, N, N), or (heads, 1, 1) for one that is the
        same everywhere.
        """
        name = FORMER_NAMES.get(name, name)
        if name not in self._cache:
            self._cache[name] = self._gather(name)
        return self._cache[name]

    def _gather(self, name: str) -> Tensor | None:
        table = getattr(self, name)
        if table is None or table.dim() == 3:
            return table
        if len(table) == 1 and (name == "scale" or self.window != (1, 1)):
            return table.t()[:, :, None]  # one number per head
        if self.repeats:
            table = table[:1]
        gathered = gather_offsets(table, self.window)
        if not self.prefix:
            return gathered
        neutral = {
            "scale": self.neutral.t()[:, :, None],
            "bias": gathered.new_zeros(1),
            "post": gathered.new_ones(1),
        }[name]
        return self._with_prefix(gathered, neutral)

    @property
    def repeats(self) -> bool:
        """Whether a table of the one offset of a single patch comes twice, see `matching`."""
        return self.prefix > 0 and self.window == (1, 1)

    def matching(self, name: str, table: Tensor, neutral: float) -> Tensor:
        """`table` (T, heads) in the form of the term `name`: gathered, with `neutral` at the
        prefix, where that is dense.

        A single row (a grid of one token) comes twice where there is a prefix: as one row it would
        be one number per head, which acts on the prefix too.
        """
        term = getattr(self, FORMER_NAMES.get(name, name))
        if term is None or term.dim() == 2:
            return table.expand(2, -1) if self.repeats else table
        return self.over_pairs(table, neutral)

    def over_pairs(self, table: Tensor, neutral: float) -> Tensor:
        """`table` (T, heads) gathered over pairs, (heads, N, N), with `neutral` at the prefix."""
        return self._with_prefix(gather_offsets(table, self.window), table.new_full((1,), neutral))

    def _with_prefix(self, gathered: Tensor, neutral: Tensor) -> Tensor:
        if not self.prefix:
            return gathered
        heads, count = gathered.shape[0], gathered.shape[-1] + self.prefix
        column = neutral.expand(heads, count - self.prefix, self.prefix)
        row = neutral.expand(heads, self.prefix, count)
        return torch.cat([row, torch.cat([column, gathered], dim=2)], dim=1)

    def masked_bias(self, layout: WindowLayout) -> Tensor | None:
        """bias + mask: (nW, heads, N, N), or (1, heads, N, N) without a mask, or None; cached per
        layout.
        """
        if layout not in self._cache:
            self._cache[layout] = self._add_mask(layout)
        return self._cache[layout]

    def _add_mask(self, layout: WindowLayout) -> Tensor | None:
        bias = self.dense("bias")
        if layout.mask is None:
            return None if bias is None else bias[None]
        mask = layout.mask[:, None].to(self.scale.dtype)
        return mask if bias is None else bias + mask


def _times_heads(term: Tensor, factor: Tensor) -> Tensor:
    """(rows, heads) or dense (heads, N, N), times (heads,)."""
    return term * (factor if term.dim() == 2 else factor[:, None, None])


def gather_offsets(table: Tensor | None, window: Size) -> Tensor | None:
    """(T, heads) -> (heads, N, N); (1, heads) -> (heads, 1, 1); dense terms and None pass.

    Raises: ValueError for a table with another number of rows.
    """
    if table is None or table.dim() == 3:
        return table
    if table.shape[0] == 1 and window != (1, 1):
        return table.t()[:, :, None]
    area, offsets = window[0] * window[1], (2 * window[0] - 1) * (2 * window[1] - 1)
    if table.shape[0] != offsets:
        raise ValueError(
            f"OffsetTerms: a table of {table.shape[0]} rows; a window of {window[0]}x{window[1]}"
            f" tokens has {offsets} offsets"
        )
    index = relative_position_index(window, table.device).flatten()
    return table.t().contiguous().gather(1, index.expand(table.shape[1], -1)).view(-1, area, area)
