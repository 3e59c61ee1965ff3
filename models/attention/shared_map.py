"""Attention that hands its map to the next block, and attention that takes the map it is handed."""

from torch import Tensor, nn

from kernels.linear import run_linear
from kernels.modes import without_autocast

from .geometry import Geometry
from .global_attention import GlobalAttention
from .map_flops import modifier_flops
from .modified import Modified
from .modifiers import MapModifier, OutputModifier
from .softmax import weigh
from .spec import AttentionSpec


class MapAttention(GlobalAttention):
    """Global attention that also returns its map A, to be handed to the next block as a value: no
    module keeps one.

        A = modifiers(softmax(logits) + carry * D^-0.5 * A_previous)        y = proj(A v)

    Args:
        carry: whether the map of the previous blocks is added.
        shared: whether other blocks (SharedMapAttention) take its map; these have no modifiers.
    Shapes: x (B, N, C), previous (B, H, N, N) or None -> (B, N, C) and A (B, H, N, N), float32 or
        wider, before dropout.
    State dict: qkv, proj, as GlobalAttention.
    Raises: ValueError for a mixer, which has no map, for a modifier that changes the number of
        maps, and, where the map is shared, for one of what the heads give.
    Source: Refiner, arXiv:2106.03714, in the form of github.com/zhoudaquan/Refiner_ViT, which hands
        the map on behind the dropout.
    """

    def __init__(
        self,
        geometry: Geometry,
        spec: AttentionSpec,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        carry: bool = True,
        shared: bool = False,
    ):
        if spec.mixer != "softmax":
            raise ValueError(
                f"mixer {spec.mixer} forms no map that the next block could share; set"
                " MODEL.ATTENTION.MIXER softmax, or SHARE_EVERY 1, CARRY False and COS_REG 0"
            )
        super().__init__(geometry, spec, qkv_bias, None, proj_drop)
        self.carry = geometry.head_channels**-0.5 if carry else 0.0
        for modifier in self._stage(MapModifier):
            if modifier.num_maps() != geometry.num_heads:
                raise ValueError(
                    f"{type(modifier).__name__} makes {modifier.num_maps()} maps of"
                    f" {geometry.num_heads}, which the next block cannot take; keep the number"
                    " (refiner: reduce=True), or SHARE_EVERY 1, CARRY False, COS_REG 0"
                )
        for modifier in self._stage(OutputModifier) if shared else ():
            raise ValueError(
                f"{type(modifier).__name__} changes what the heads give, and blocks that share a"
                " map have no modifiers; set MODEL.REFINED_VIT.SHARE_EVERY 1, or leave it out"
            )

    def is_open(self) -> bool:
        """Always: the next block needs the map."""
        return True

    def forward(self, x: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N, C), previous (B, H, N, N) or None -> the result (B, N, C) and the map (B, H, N,
        N).
        """
        x, layout = self.as_window(x)
        carried = None
        if self.carry and previous is not None:
            carried = previous * self.carry
        y, attn = self.with_map(x, layout, carried)
        return y.flatten(1, 2), attn


class SharedMapAttention(Modified):
    """Attention with the map of an earlier block, refined: no queries and keys.

        y = proj(refine(A_previous) v)

    Args:
        refine: the modifier of maps that works on what is handed in, "name(option=value)".
        drop: dropout of the refined map.
    Shapes: x (B, N, C), previous (B, H, N, N) -> (B, N, C), and `previous` itself, which the next
        block is handed unrefined.
    State dict: v, proj, modifiers.<name>.
    Raises: ValueError where `refine` is not a modifier of maps.
    Source: as MapAttention.
    """

    def __init__(
        self,
        geometry: Geometry,
        refine: str,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop: float = 0.0,
    ):
        super().__init__()
        self.geometry = geometry
        self.num_heads = geometry.num_heads
        self.drop = drop
        self.v = nn.Linear(geometry.dim, geometry.inner, bias=qkv_bias)
        self.proj = nn.Linear(geometry.inner, geometry.dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.add_modifiers((refine,), geometry)
        if not all(isinstance(modifier, MapModifier) for modifier in self.modifiers.values()):
            raise ValueError(
                f"REFINE {refine}: a shared block is handed a map; take a modifier of maps, refiner"
                " or re_attention"
            )
        self.map_tap = nn.Identity()

    def forward(self, x: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, C), previous (B, H, N, N) -> the result (B, N, C) and `previous`."""
        v = run_linear(self.v, x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        with without_autocast(x.device.type):
            attn = previous
            for modifier in self.modifiers.values():
                attn = modifier.after_mask(modifier(attn))
        dropout = self.drop if self.training else 0.0
        y = weigh(self.map_tap(attn), v, dropout)
        y = run_linear(self.proj, y.transpose(1, 2).flatten(2))
        return self.proj_drop(y), previous

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for an image of `tokens` tokens: two projections, the map times v,
        and the refinement of the map.
        """
        inner = self.geometry.inner
        on_map = modifier_flops(list(self.modifiers.values()), self.num_heads, tokens)
        return 2 * tokens * self.geometry.dim * inner + tokens * tokens * inner + on_map
