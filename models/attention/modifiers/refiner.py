"""Refiner: attention expansion, distributed local attention (a convolution over the map), linear
reduction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.window_attention import WindowLayout
from models.attention.geometry import Geometry
from models.attention.regions import by_region, zero_masked

from .base import MODIFIERS, MapModifier
from .talking_heads import mix_heads

PRESETS = {
    "paper": dict(act="none", bn=False, residual=False, init="identity"),
    "release": dict(act="relu6", bn=True, residual=True, init="uniform"),
}
ALLOWED = {
    "act": ("none", "relu6"),
    "bn": (True, False),
    "residual": (True, False),
    "init": ("identity", "uniform"),
    "renorm": ("none", "row"),
    "geometry": ("raster", "key_grid", "query_grid"),
    "cls": ("include", "exclude"),
}
MAX_SIZE = 64  # of expand and kernel
SMALLEST_SUM = 1e-6  # of a row that is divided by its sum


@MODIFIERS.register("refiner")
class Refiner(MapModifier):
    """Refines the softmaxed map: more heads by a linear mixture, a k x k convolution over each, and
    back to H heads.

        paper:    A' = R conv(E A)
        release:  A' = BN(BN(R relu6(BN(conv(relu6(BN(E A)))))) + A)

    E is (r H, H), R is (H, r H), both act on the heads; conv has one k x k kernel per expanded
    head, zeros beyond the edge and, in shifted or padded windows, beyond the region that the mask
    lets a token see. As conv is linear, row i of conv(A) V is sum_a A_{i+a} (sum_b w_ab
    V_{.-b}): neighbouring queries' attention, applied to values aggregated locally. Rows of A' sum
    to nothing in particular, and entries may be negative.

    Args:
        preset: "paper" or "release"; gives act, bn, residual and init where these are left at
            "preset".
        expand: r; at 1 there is no E (nor the norm and activation behind it).
        kernel: side k; of an even one the extra zero goes to the end.
        reduce: False leaves out R: V is cut into r H heads of C / (r H) channels instead.
        act: "none" or "relu6".
        bn: BatchNorm over heads after each step and at the end.
        residual: add A to what R returns.
        init: "identity" (A' = A, exactly so without bn) or "uniform", what convolutions start with.
        rescale: multiply by head_dim^-0.5.
        renorm: "none", or "row": divide rows by their sums, at least 1e-6 in size.
        geometry: the plane of the convolution: "raster", queries x keys as numbered row by row (one
            step is one column, or a jump to the next row); "key_grid", the keys' own grid, for each
            query; "query_grid", the other way round.
        cls: whether the convolution takes class tokens in; a grid has no place for them.
    Shapes: map (B*nW, H, N, N) -> the same, or (B*nW, r H, N, N) without `reduce`; expansion (r H,
        H), kernel (r H, 1, k, k), reduction (H, r H): matrices, which weight decay reaches.
    Raises: ValueError for what is not one of the above, and for combinations without a meaning,
        with the reason.
    Source: Refiner, arXiv:2106.03714, and github.com/zhoudaquan/Refiner_ViT. This is what one block
        can do on its own: the release's carry of a map into later blocks and its sharing of maps
            between blocks are models/refined_vit.py's.
    """

    mixes_pairs = True

    def __init__(
        self,
        place: Geometry,
        /,
        preset: str = "paper",
        expand: int = 3,
        kernel: int = 3,
        reduce: bool = True,
        act: str = "preset",
        bn: bool | str = "preset",
        residual: bool | str = "preset",
        init: str = "preset",
        rescale: bool = False,
        renorm: str = "none",
        geometry: str = "raster",
        cls: str = "include",
    ):
        super().__init__(place)
        if preset not in PRESETS:
            raise ValueError(f"refiner(preset={preset}): allowed are {', '.join(PRESETS)}")
        given = dict(
            act=act, bn=bn, residual=residual, init=init, renorm=renorm, geometry=geometry, cls=cls
        )
        given = {
            name: "none" if value is None else value for name, value in given.items()
        }  # a YAML's bare none
        options = {
            **given,
            **{name: value for name, value in PRESETS[preset].items() if given[name] == "preset"},
        }
        _check(options, place, expand, kernel, reduce)
        self.act, self.residual, self.init, self.plane = (
            options[name] for name in ("act", "residual", "init", "geometry")
        )
        self.renorm = options["renorm"]
        self.factor = place.head_channels**-0.5 if rescale else 1.0
        self.excluded = place.prefix if options["cls"] == "exclude" else 0
        self._create(place.num_heads, expand, kernel, reduce, options["bn"])
        self.initialise(self)

    def _create(self, heads: int, expand: int, side: int, reduce: bool, bn: bool) -> None:
        wide = heads * expand
        self.expansion = nn.Parameter(torch.empty(wide, heads)) if expand > 1 else None
        self.kernel = nn.Parameter(torch.empty(wide, 1, side, side))
        self.reduction = nn.Parameter(torch.empty(heads, wide)) if reduce else None
        sizes = {
            "expanded": wide * (expand > 1),
            "local": wide,
            "reduced": heads * reduce,
            "refined": heads if reduce else wide,
        }
        self.norms = nn.ModuleDict(
            {name: nn.BatchNorm2d(size) for name, size in sizes.items() if size and bn}
        )

    @torch.no_grad()
    def initialise(self, attention: nn.Module) -> None:
        """Uniform values by fan-in everywhere, or those of the identity, with random mixtures in
        the heads that nobody reads yet.
        """
        for parameter in (self.expansion, self.kernel, self.reduction):
            if parameter is not None:
                nn.init.uniform_(
                    parameter, -(parameter[0].numel() ** -0.5), parameter[0].numel() ** -0.5
                )
        if self.init == "identity":
            self._set_identity()

    def _set_identity(self) -> None:
        heads, side = self.geometry.num_heads, self.kernel.shape[-1]
        expand, eye = len(self.kernel) // heads, torch.eye(heads)
        self.kernel.zero_()[:, :, (side - 1) // 2, (side - 1) // 2] = 1
        if self.reduction is not None:
            self.reduction.zero_()[:, ::expand] = eye
        if self.expansion is not None and self.reduction is not None:
            self.expansion[::expand] = eye
        elif self.expansion is not None:
            self.expansion.copy_(eye.repeat_interleave(expand, 0))
        if self.residual:
            (self.kernel if self.reduction is None else self.reduction).zero_()

    def forward(self, attn: Tensor, layout: WindowLayout | None = None) -> Tensor:
        """(B*nW, H, N, N) of the windows of `layout` (None: not masked) -> (B*nW, H or r H, N,
        N).
        """
        maps = attn
        if self.expansion is not None:
            maps = self._activate(self._norm("expanded", mix_heads(attn, self.expansion)))
        maps = self._activate(self._norm("local", self.aggregate(maps, layout)))
        if self.reduction is not None:
            maps = self._norm("reduced", mix_heads(maps, self.reduction))
        if self.residual:
            maps = maps + attn
        return self._norm("refined", maps) * self.factor

    def num_maps(self) -> int:
        """H, or r H without `reduce`."""
        return len(self.kernel) if self.reduction is None else len(self.reduction)

    def after_mask(self, attn: Tensor) -> Tensor:
        """Normalises the rows, where that is asked for, once the masked pairs are zero."""
        if self.renorm == "none":
            return attn
        total = attn.sum(-1, keepdim=True)
        return attn / torch.where(total.abs() < SMALLEST_SUM, SMALLEST_SUM, total)

    def aggregate(self, maps: Tensor, layout: WindowLayout | None = None) -> Tensor:
        """The convolution of each expanded map, (B*nW, r H, N, N) -> the same; pairs with an
        excluded token pass.
        """
        skip = self.excluded
        if not skip:
            return self._convolve(maps, layout)
        inner = maps[..., skip:, skip:]
        return maps + F.pad(self._convolve(inner, layout) - inner, (skip, 0, skip, 0))

    def _convolve(self, maps: Tensor, layout: WindowLayout | None) -> Tensor:
        if self.plane == "raster":
            return by_region(maps, layout, lambda maps: depthwise(maps, self.kernel))
        if layout is not None:  # of one query or key: zeros for what it may not see are enough
            maps = zero_masked(maps, layout.mask)
        maps = maps if self.plane == "key_grid" else maps.mT
        grids = (
            maps.transpose(1, 2).flatten(0, 1).unflatten(2, self.geometry.window)
        )  # (B*nW*N, r H, Mh, Mw)
        maps = (
            depthwise(grids, self.kernel).flatten(2).unflatten(0, (len(maps), -1)).transpose(1, 2)
        )
        return maps if self.plane == "key_grid" else maps.mT

    def _norm(self, name: str, maps: Tensor) -> Tensor:
        return self.norms[name](maps) if name in self.norms else maps

    def _activate(self, maps: Tensor) -> Tensor:
        return F.relu6(maps) if self.act == "relu6" else maps


def depthwise(planes: Tensor, kernel: Tensor) -> Tensor:
    """(B, G, rows, columns) with kernel (G, 1, k, k) -> the same size: sum over a, b of w_ab
    x_{i+a, j+b}.
    """
    side = kernel.shape[-1]
    before, after = (side - 1) // 2, side // 2
    return F.conv2d(
        F.pad(planes, (before, after, before, after)), kernel.to(planes.dtype), groups=len(kernel)
    )


def _check(options: dict, place: Geometry, expand: int, kernel: int, reduce: bool) -> None:
    for name, value in options.items():
        if value not in ALLOWED[name]:
            raise ValueError(
                f"refiner({name}={value}): allowed are {', '.join(map(str, ALLOWED[name]))}"
            )
    if not (1 <= expand <= MAX_SIZE and 1 <= kernel <= MAX_SIZE):
        raise ValueError(
            f"refiner(expand={expand}, kernel={kernel}): both are at least 1, at most {MAX_SIZE}"
        )
    if not reduce and place.inner % (place.num_heads * expand):
        raise ValueError(
            f"refiner(expand={expand}, reduce=False): {place.inner} channels cannot be split into"
            f" {place.num_heads * expand} heads; choose expand so that it divides the channels of a"
            " head"
        )
    if not reduce and expand > 1 and options["residual"]:
        raise ValueError(
            f"refiner(expand={expand}, reduce=False, residual=True): the map has fewer heads than"
            " what it is added to"
        )
    if place.prefix and options["geometry"] != "raster" and options["cls"] == "include":
        raise ValueError(
            f"refiner(geometry={options['geometry']}): class tokens have no place on the grid; add"
            " cls=exclude"
        )
