"""Attention of CaiT: the heads of the patches' attention mix, and the class token asks the patches
in layers of its own.
"""

import torch
from torch import Tensor, nn

from kernels.modes import without_autocast
from registry import check_choice

from .geometry import Geometry
from .global_attention import GlobalAttention
from .modifiers import LogitMixer, MapModifier
from .modifiers.talking_heads import LogitMixing, MapMixing
from .spec import AttentionSpec

MIXINGS = ("small", "normal", "identity")


def head_mixings(geometry: Geometry, mixing: str, bias: bool) -> tuple[LogitMixing, MapMixing]:
    """The mixing of logits and that of maps, with initial values "small" (N(0, 0.02^2)), "normal"
    (N(0, 1)) or "identity".
    """
    check_choice("cait: mixing", mixing, MIXINGS)
    mixings = LogitMixing(geometry, mixing, bias), MapMixing(geometry, mixing, bias)
    for part in mixings:
        part.initialise(part)
    return mixings


class TalkingHeadsAttention(GlobalAttention):
    """Global attention whose heads are mixed linearly before and after the softmax; scales and
    masks of modifiers come before both.

    Args:
        mixing: initial values of the mixings, see `head_mixings`.
        mixing_bias: whether they have a bias; that of proj_l is constant along a row of the
            softmax, so it has no effect and no gradient.
    Shapes: (B, N, C) -> (B, N, C). State dict: qkv, proj, proj_l and proj_w (H, H) [to, from], as
        in timm's CaiT.
    Raises: ValueError for a mixer instead of softmax attention: it has no maps of heads to mix.
    Source: Talking-Heads Attention, arXiv:2003.02436; CaiT, arXiv:2103.17239.
    """

    built_in_kinds = (LogitMixer, MapModifier)

    def __init__(
        self,
        geometry: Geometry,
        spec: AttentionSpec,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        mixing: str = "small",
        mixing_bias: bool = True,
    ):
        if spec.mixer != "softmax":
            raise ValueError(
                f"talking heads mix the maps of softmax attention, which mixer {spec.mixer} does"
                " not form; set MODEL.ATTENTION.MIXER softmax, or take MODEL.TYPE vit"
            )
        super().__init__(geometry, spec, qkv_bias, qk_scale, proj_drop)
        self.proj_l, self.proj_w = head_mixings(geometry, mixing, mixing_bias)

    def built_in(self) -> tuple[LogitMixing, MapMixing]:
        """The mixing of the logits and that of the map."""
        return self.proj_l, self.proj_w


class ClassAttention(nn.Module):
    """softmax(q kᵀ * D^-0.5) v with one query, the class token, over a context of tokens.

    Args:
        mixing: None, or mix the heads as TalkingHeadsAttention does.
    Shapes: token (B, 1, C), context (B, N, C) -> (B, 1, C). State dict: q, k, v, proj (and proj_l,
        proj_w), as in timm's CaiT.
    Source: CaiT, arXiv:2103.17239, section 3.
    """

    def __init__(
        self,
        geometry: Geometry,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        mixing: str | None = None,
        mixing_bias: bool = True,
    ):
        super().__init__()
        self.dim = geometry.dim
        self.inner = geometry.inner
        self.num_heads = geometry.num_heads
        self.scale = geometry.head_channels**-0.5
        self.q = nn.Linear(geometry.dim, geometry.inner, bias=qkv_bias)
        self.k = nn.Linear(geometry.dim, geometry.inner, bias=qkv_bias)
        self.v = nn.Linear(geometry.dim, geometry.inner, bias=qkv_bias)
        self.proj = nn.Linear(geometry.inner, geometry.dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        if mixing:
            self.proj_l, self.proj_w = head_mixings(geometry, mixing, mixing_bias)
        else:
            self.proj_l = nn.Identity()
            self.proj_w = nn.Identity()
        self.logit_tap = nn.Identity()
        self.map_tap = nn.Identity()

    def forward(self, token: Tensor, context: Tensor) -> Tensor:
        """token (B, 1, C), context (B, N, C) -> (B, 1, C); the map is formed in float32."""
        q = self._heads(self.q(token))  # (B, H, 1, D)
        k = self._heads(self.k(context))  # (B, H, N, D)
        v = self._heads(self.v(context))
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q @ k.mT).to(wide) * self.scale  # (B, H, 1, N)
        with without_autocast(token.device.type):
            attn = self.proj_w(self.logit_tap(self.proj_l(logits)).softmax(-1))
        y = self.attn_drop(self.map_tap(attn)).to(v.dtype) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, H * D) -> (B, H, N, D)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for a context of `tokens` tokens: projections, both products, both
        mixings.
        """
        mixing = 0 if isinstance(self.proj_l, nn.Identity) else 2 * tokens * self.num_heads**2
        return 2 * self.dim * self.inner * (1 + tokens) + 2 * tokens * self.inner + mixing
