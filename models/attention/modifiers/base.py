"""The places at which attention can be modified: A = softmax((q kᵀ) * scale + bias + mask), y =
map(A) v, o = proj(y), and the residual stream s + o.
"""

from typing import Any

from torch import Tensor, nn

from kernels.window_attention import Epilogue, OffsetTerms, WindowLayout
from models.attention.geometry import Geometry
from registry import Registry

MODIFIERS = Registry("attention modifier")


class Modifier(nn.Module):
    """Built as `cls(geometry, **options)`. Its parameters appear in the state dict under
    `attn.modifiers.<name>`.

    written: what the config says between the brackets, "a=1"; "" where it says nothing.
    """

    written = ""

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.geometry = geometry

    def extra_repr(self) -> str:
        """Its options as the config gives them, shown by print(model)."""
        return self.written

    def initialise(self, attention: nn.Module) -> None:
        """Called once after the backbone has initialised `attention`, with random numbers of its
        own.
        """

    def members(self) -> tuple["Modifier", ...]:
        """The modifiers it consists of, each of one of the kinds below, in their order; by default
        itself alone.
        """
        return (self,)

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that weight decay leaves alone; by default none."""
        return set()

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates of own matrix products for a window of `tokens` tokens; what works
        on N x N matrices is counted by running it.
        """
        return 0


class ProjectionModifier(Modifier):
    """Changes the projections q, k, v = x Wᵀ + b before the head split, in one of two equal ways.

    `fold` works on the weight: no pass over the tokens. `add` works on the projected tokens: exact
    where the weight would be rounded to 16 bits first. `fold_bias` serves both. Raises ValueError
    where q and k are not as wide as x.
    """

    def __init__(self, geometry: Geometry):
        super().__init__(geometry)
        if geometry.inner != geometry.dim:
            raise ValueError(
                f"{type(self).__name__}: x has {geometry.dim} channels, q and k have"
                f" {geometry.inner} ({geometry.num_heads} heads of {geometry.head_channels}); x can"
                " be added to q and k only where both agree"
            )

    def fold(self, weight: Tensor) -> Tensor:
        """(3C, C) -> (3C, C)."""
        return weight

    def fold_bias(self, bias: Tensor | None) -> Tensor | None:
        """(3C,) -> (3C,), or None where there is no bias."""
        return bias

    def add(self, x: Tensor, qkv: Tensor) -> Tensor:
        """x (..., C), qkv (..., 3C) of the unfolded weight -> (..., 3C); may work in place on
        `qkv`.
        """
        return qkv


WeightModifier = ProjectionModifier  # its former name


class TokenModifier(Modifier):
    """Changes the projected tokens, after all projection modifiers and before attention; keeps the
    fused kernel.

    reads: what its forward is given besides, by keyword: "first_v", the projected v of the first
        block of the chain (see Geometry.block), (..., C); None in that block itself.
    """

    reads: tuple[str, ...] = ()

    def forward(self, qkv: Tensor, **read: Any) -> Tensor:
        """(..., 3C), q, k and v, each split into heads -> the same; not in place."""
        raise NotImplementedError


class TermModifier(Modifier):
    """Changes what multiplies and what is added to the logits: tables over relative offsets, fused
    kernels included.

    A table (T, H) is combined with a term through `terms.matching`, which leaves class tokens alone
    on every grid; a factor per head (H,) acts on them too: `terms.scale_heads`.

    forbids: True for one that needs a weight of exactly 0 between tokens that a shift brought
        together, whatever their logits; Swin's mask of -100 gives them exp(-100) of it.
    """

    forbids = False

    def forward(self, terms: OffsetTerms) -> OffsetTerms:
        """terms.scale (T or 1, H), terms.bias (T, H) or None -> the same."""
        raise NotImplementedError

    def after_mixing(self, logits: Tensor, terms: OffsetTerms) -> Tensor:
        """Logits (B*nW, H, N, N) whose heads logit mixers have mixed -> the same; for a mask, which
        must not be mixed.
        """
        return logits


class LogitMixer(Modifier):
    """Changes the logits before the mask is added; takes the open path."""

    def forward(self, logits: Tensor) -> Tensor:
        """(B*nW, H, N, N) -> (B*nW, H, N, N)."""
        raise NotImplementedError


class MapModifier(Modifier):
    """Changes the softmaxed map itself; takes the open path.

    mixes_pairs: True for one that mixes different pairs of a map, not the heads of a pair alone.
        Its forward is given the layout of the windows too, and does that region by region
        (models/attention/regions.py): the mask keeps apart what a shift brought together.
    """

    mixes_pairs = False

    def forward(self, attn: Tensor) -> Tensor:
        """(B*nW, H, N, N) -> (B*nW, G, N, N); masked pairs are set to zero again afterwards.

        G is H, or a multiple of it that divides the channels: V is then cut into G heads.
        """
        raise NotImplementedError

    def num_maps(self) -> int:
        """G."""
        return self.geometry.num_heads

    def after_mask(self, attn: Tensor) -> Tensor:
        """(B*nW, G, N, N) -> the same, after masked pairs have become zero; must leave them so.

        A subclass may still call it `settle`, its former name.
        """
        former = getattr(self, "settle", None)
        return former(attn) if former else attn


class OutputModifier(Modifier):
    """Changes what the heads give, before the output projection; keeps the fused kernel. A class
    token counts as any token.

    reads: what its forward is given besides, by keyword: "lse", the logarithm of each row's sum of
        exp(logits), (B, H, W, heads), float32; "qkv", the projected tokens (B, H, W, 3C);
        "first_v", the projected v of the first block of the chain (see Geometry.block); "attend", a
        function of terms and layout, which gives what the same tokens receive by them, (B, H, W,
        inner), with the dropout and the backend of the module.
    """

    reads: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        """A subclass with a forward of its own has no epilogue unless it says one."""
        super().__init_subclass__(**options)
        if "forward" in vars(cls) and "epilogue" not in vars(cls):
            cls.epilogue = OutputModifier.epilogue

    def forward(self, y: Tensor, v: Tensor, x: Tensor, layout: WindowLayout, **read: Any) -> Tensor:
        """y = A v, v (B, H, W, inner), the module's input x (B, H, W, C) -> (B, H, W, inner)."""
        raise NotImplementedError

    def epilogue(self) -> Epilogue | None:
        """The same as an epilogue of the kernel, or its first step, which `after_epilogue` follows;
        None where it has none. Used for the first of the output modifiers.
        """
        return None

    def after_epilogue(self, y: Tensor, v: Tensor, layout: WindowLayout) -> Tensor:
        """What is left of it when the kernel has done the epilogue; by default nothing."""
        return y


class BranchModifier(Modifier):
    """Changes the branch of attention where the block adds it to the residual stream: behind the
    projection, SwinV2's norm and ViT's layer scale, in front of stochastic depth.

    reads_stream: whether its forward needs `stream`. One that does not also acts in timm's pre-norm
        blocks, at the end of the attention module: there `stream` is None, o is (B, H, W, C), and
        timm's layer scale comes behind it.
    """

    reads_stream = True

    def forward(self, o: Tensor, stream: Tensor | None) -> Tensor:
        """o, what the block would add to `stream`, both (B, N, C) -> the same."""
        raise NotImplementedError
