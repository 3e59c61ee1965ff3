"""Softmax attention within windows, y = map(softmax((q kᵀ) * scale + bias + mask)) v, and its Swin
and SwinV2 forms.
"""

import math
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import (
    EvalCache,
    Linear,
    PreparedLinear,
    computed_in,
    linear,
    may_prepare_weights,
    result_dtype,
)
from kernels.window_attention import (
    OffsetTerms,
    WindowLayout,
    relative_position_index,
    window_attention,
)
from kernels.window_attention.reference import add_mask, merge_windows, split_windows
from models.layers.init import trunc_normal

from .geometry import Geometry, relative_coords_table
from .modified import Modified
from .modifiers import LogitMixer, MapModifier, ProjectionModifier, TermModifier
from .modifiers.base import Modifier
from .regions import zero_masked
from .spec import AttentionSpec

MAX_LOGIT_SCALE = 100.0
# per channel: below, adding the input to q and k touches fewer numbers than adding the identity to
# a (3C, C) weight
FEW_TOKENS = 1.5


class SoftmaxAttention(Modified):
    """What all forms share: projections, modifiers and the choice between the fast path and the
    open one.

    A subclass creates its parameters under the released names, then calls `_finish`, and says its
    `base_terms` and `packed_bias`.
    Shapes: x (B, H, W, C) -> (B, H, W, C).
    """

    cosine = False

    def __init__(self, geometry: Geometry, spec: AttentionSpec):
        super().__init__()
        self.geometry = geometry
        self.spec = spec
        self.dim = geometry.dim
        self.num_heads = geometry.num_heads
        self.window_size = geometry.window
        if not geometry.head_dim and geometry.dim % geometry.num_heads:
            raise ValueError(
                f"attention: {geometry.dim} channels cannot be split into {geometry.num_heads}"
                " heads; choose NUM_HEADS that divides EMBED_DIM * 2^stage"
            )
        self.cache = EvalCache()

    def _finish(self, qkv_bias: bool, proj_drop: float, out_dim: int = 0) -> None:
        """Creates the projections (to `out_dim` channels, by default C) and the modifiers, last:
        the released order of the state dict.
        """
        self.qkv = nn.Linear(self.dim, 3 * self.geometry.inner, bias=qkv_bias)
        self.proj = Linear(self.geometry.inner, out_dim or self.dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.add_modifiers(self.spec.modifiers, self.geometry)
        self.logit_tap = nn.Identity()
        self.map_tap = nn.Identity()

    def base_terms(self) -> OffsetTerms:
        """The unmodified scale and bias, float32 tables (1, heads) and (T, heads)."""
        raise NotImplementedError

    def term_parameters(self) -> list[Tensor]:
        """The parameters that `base_terms` reads."""
        raise NotImplementedError

    def packed_bias(self) -> Tensor | None:
        """(3C,) bias of q, k and v, or None."""
        raise NotImplementedError

    def built_in(self) -> tuple[Modifier, ...]:
        """What a form of attention always does to logits and map, before any modifier of the
        config; by default nothing.
        """
        return ()

    def _stage(self, kind: type[Modifier]) -> list[Modifier]:
        parts = chain(
            self.built_in(), *(modifier.members() for modifier in self.modifiers.values())
        )
        return [part for part in parts if isinstance(part, kind)]

    def terms(self) -> OffsetTerms:
        """Scale and bias with all term modifiers applied, in float32; kept in evaluation while the
        parameters stay the same.
        """
        sources = [
            *self.term_parameters(),
            *chain.from_iterable(modifier.parameters() for modifier in self._stage(TermModifier)),
        ]
        return self.cache.get("terms", sources, self._modified_terms)

    def _modified_terms(self) -> OffsetTerms:
        with torch.autocast(self.qkv.weight.device.type, enabled=False):
            terms = self.base_terms()
            for modifier in self._stage(TermModifier):
                terms = modifier(terms)
        return terms

    def _projection(self, fold: bool) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of q, k and v, with what the modifiers do to the bias and, where they
        `fold`, to the weight.
        """
        weight = self.qkv.weight
        bias = self.packed_bias()
        for modifier in self._stage(ProjectionModifier):
            bias = modifier.fold_bias(bias)
            if fold:
                weight = modifier.fold(weight)
        return weight, bias

    def _folds(self, x: Tensor) -> bool:
        """Whether projection modifiers change the weight, not the projected tokens.

        They do so in evaluation, where that is done once, and in training on a GPU, where passes
        over the tokens cost most; in training on the CPU where the weight keeps its full precision,
        unless there are so few tokens that adding to the tokens is the smaller work.
        """
        own = self.qkv.weight.dtype
        wide = torch.float64 if own == torch.float64 else torch.float32
        if own != wide:
            return False
        if may_prepare_weights() or x.device.type != "cpu":
            return True
        exact = computed_in(result_dtype(x), x.device.type) == wide
        return exact and x.numel() > FEW_TOKENS * self.dim * self.dim

    def project(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3C): q, then k, then v."""
        fold = self._folds(x)
        if may_prepare_weights():
            qkv = self._prepared(fold, result_dtype(x), x.device.type)(x)
        else:
            qkv = linear(x, *self._projection(fold))
        if not fold:
            for modifier in self._stage(ProjectionModifier):
                qkv = modifier.add(x, qkv)
        return qkv

    def _prepared(self, fold: bool, dtype: torch.dtype, device: str) -> PreparedLinear:
        """The projection for evaluation, cached while the parameters stay the same."""
        parameters = (*self._parameters.values(), *self.qkv.parameters())
        return self.cache.get(
            f"projection {fold} {dtype} {device}",
            [parameter for parameter in parameters if parameter is not None],
            lambda: PreparedLinear(*self._projection(fold), dtype, device),
        )

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:
        """x: (B, H, W, C) with the grid of `layout` -> (B, H, W, C)."""
        qkv = self.project(x)
        terms = self.terms()
        dropout = self.spec.drop if self.training else 0.0
        if self.is_open():
            y, _ = self._open(qkv, terms, layout, dropout)
        else:
            backend = self.spec.backend
            y = window_attention(qkv, terms, layout, self.num_heads, self.cosine, dropout, backend)
        return self._result(y, x, qkv)

    def with_map(
        self, x: Tensor, layout: WindowLayout, carried: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same in the open, and the map that multiplied v, (B*nW, G, N, N), before dropout.

        carried: (B*nW, H, N, N), added to the softmaxed map before the modifiers of the map.
        """
        qkv = self.project(x)
        dropout = self.spec.drop if self.training else 0.0
        y, attn = self._open(qkv, self.terms(), layout, dropout, carried)
        return self._result(y, x, qkv), attn

    def _result(self, y: Tensor, x: Tensor, qkv: Tensor) -> Tensor:
        return self.finish(self.proj_drop(self.proj(self.before_projection(y, x))), x, qkv)

    def before_projection(self, y: Tensor, x: Tensor) -> Tensor:
        """The heads' results y, given the module's input x; a form that norms or gates them does it
        here.
        """
        return y

    def finish(self, y: Tensor, x: Tensor, qkv: Tensor) -> Tensor:
        """The result y, given the module's input x and its projection qkv; a form with a skip of
        its own adds it here.
        """
        return y

    def is_open(self) -> bool:
        """Whether the N x N matrix is formed in the open: a modifier needs it, or a hook looks at
        it through a tap.
        """
        hooked = self.logit_tap._forward_hooks or self.map_tap._forward_hooks
        modifiers = [*self._stage(LogitMixer), *self._stage(MapModifier)]
        return len(hooked) > 0 or len(modifiers) > 0  # torch 2.10 traces no bool of a list

    def _open(
        self,
        qkv: Tensor,
        terms: OffsetTerms,
        layout: WindowLayout,
        dropout: float,
        carried: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same with the N x N matrix in the open, for modifiers of the matrix itself and for
        hooks on the two taps.
        """
        q, k, v = split_windows(qkv, layout, self.num_heads)
        if self.cosine:
            q = F.normalize(q, dim=-1)
            k = F.normalize(k, dim=-1)
        logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * terms.dense("scale")
        if terms.bias is not None:
            logits = logits + terms.dense("bias")
        with torch.autocast(qkv.device.type, enabled=False):
            attn = self.map_tap(self._map(logits, terms, layout, carried))
        return merge_windows(weigh(attn, v, dropout), layout), attn

    def _map(
        self, logits: Tensor, terms: OffsetTerms, layout: WindowLayout, carried: Tensor | None
    ) -> Tensor:
        """Scaled and biased logits (B*nW, H, N, N) -> the map that multiplies v, (B*nW, G, N, N),
        modifiers and all in float32.
        """
        for modifier in self._stage(LogitMixer):
            logits = modifier(logits)
        attn = self.logit_tap(add_mask(logits, layout.mask)).softmax(-1)
        if terms.post is not None:
            attn = attn * terms.dense("post")
            if terms.renormalise:
                attn = attn / attn.sum(-1, keepdim=True)
        if carried is not None:
            attn = attn + carried
        for modifier in self._stage(MapModifier):
            attn = modifier(attn, layout) if modifier.mixes_pairs else modifier(attn)
            attn = modifier.after_mask(zero_masked(attn, layout.mask))
        return attn

    def map_flops(self, layout: WindowLayout) -> int:
        """Multiply-accumulates for all windows of one map."""
        return layout.num_windows * self.flops(layout.area)

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for one window of `tokens` tokens, by Swin's count:
        projections and the two products.
        """
        inner = self.geometry.inner
        return (
            tokens * self.dim * 3 * inner
            + 2 * tokens * tokens * inner
            + tokens * inner * self.proj.out_features
        )


def weigh(attn: Tensor, v: Tensor, dropout: float) -> Tensor:
    """A map (B*nW, G, N, N) times v (B*nW, H, N, D), whose channels are cut anew for a map of more
    heads: (B*nW, G, N, H D / G).
    """
    heads = attn.shape[1]
    if v.shape[1] != heads:
        v = v.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
    return F.dropout(attn, dropout).to(v.dtype) @ v


class WindowAttention(SoftmaxAttention):
    """Swin's attention: logits (q kᵀ) * scale plus a learned bias per relative offset.

    Args:
        qk_scale: the scale; None is head_dim^-0.5.
    State dict: relative_position_bias_table (T, heads), relative_position_index (N, N), qkv, proj.
    Source: Swin Transformer, arXiv:2103.14030, eq. 4.
    """

    def __init__(
        self,
        geometry: Geometry,
        spec: AttentionSpec,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__(geometry, spec)
        self.scale = qk_scale or geometry.head_channels**-0.5
        self.relative_position_bias_table = nn.Parameter(
            trunc_normal(torch.empty(geometry.num_offsets, geometry.num_heads), 0.02)
        )
        self.register_buffer("relative_position_index", relative_position_index(geometry.window))
        self.register_buffer(
            "uniform_scale", torch.full((1, geometry.num_heads), self.scale), persistent=False
        )
        self._finish(qkv_bias, proj_drop)

    def term_parameters(self) -> list[Tensor]:
        """The bias table."""
        return [self.relative_position_bias_table]

    def base_terms(self) -> OffsetTerms:
        """scale (1, heads), bias (T, heads)."""
        return OffsetTerms(self.window_size, self.uniform_scale, self.relative_position_bias_table)

    def packed_bias(self) -> Tensor | None:
        """(3C,) or None."""
        return self.qkv.bias


class WindowAttentionV2(SoftmaxAttention):
    """SwinV2's attention: cosine of q and k times a learned scale, plus a bias that an MLP reads
    off log-spaced offsets.

    State dict: logit_scale (heads, 1, 1), q_bias and v_bias (C,), relative_coords_table,
        relative_position_index, cpb_mlp, qkv, proj.
    Source: Swin Transformer V2, arXiv:2111.09883, eq. 2 to 4; the scale is at most 100, the bias 16
        sigmoid(mlp).
    """

    cosine = True

    def __init__(
        self, geometry: Geometry, spec: AttentionSpec, qkv_bias: bool = True, proj_drop: float = 0.0
    ):
        super().__init__(geometry, spec)
        if not 0 < spec.logit_scale_init <= MAX_LOGIT_SCALE:
            raise ValueError(
                f"logit_scale_init is {spec.logit_scale_init}; it must be above 0 and at most"
                f" {MAX_LOGIT_SCALE:g}"
            )
        self.logit_scale = nn.Parameter(
            torch.full((geometry.num_heads, 1, 1), math.log(spec.logit_scale_init))
        )
        self.q_bias = nn.Parameter(torch.zeros(geometry.dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(geometry.dim)) if qkv_bias else None
        self.register_buffer(
            "relative_coords_table",
            relative_coords_table(geometry.window, geometry.pretrained_window),
        )
        self.register_buffer("relative_position_index", relative_position_index(geometry.window))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, geometry.num_heads, bias=False)
        )
        self._finish(False, proj_drop)

    def term_parameters(self) -> list[Tensor]:
        """The scale and the bias MLP."""
        return [self.logit_scale, *self.cpb_mlp.parameters()]

    def base_terms(self) -> OffsetTerms:
        """scale (1, heads) in (0, 100], bias (T, heads) in (0, 16), or unbounded without the
        sigmoid.
        """
        scale = self.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp().view(1, -1)
        bias = self.cpb_mlp(self.relative_coords_table.flatten(0, 2))
        if self.spec.bias_sigmoid:
            bias = 16 * torch.sigmoid(bias)
        return OffsetTerms(self.window_size, scale, bias)

    def packed_bias(self) -> Tensor | None:
        """(3C,): k has no bias."""
        if self.q_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
