"""Softmax attention within windows, y = map(softmax((q kᵀ) * scale + bias + mask)) v, and its Swin
and SwinV2 forms.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import is_untouched, kept_for, run_linear
from kernels.modes import without_autocast
from kernels.window_attention import (
    OffsetTerms,
    WindowLayout,
    relative_position_index,
    window_attention,
)
from kernels.window_attention.reference import add_mask, merge_windows, split_windows, unit
from models.layers.init import trunc_normal

from .geometry import Geometry, relative_coords_table
from .map_flops import modifier_flops
from .modifiers import LogitMixer, MapModifier, TermModifier
from .modifiers.base import Modifier
from .projection import Projection, present
from .regions import zero_masked
from .spec import AttentionSpec

MAX_LOGIT_SCALE = 100.0


class SoftmaxAttention(Projection):
    """What all forms share: projections, modifiers and the choice between the fast path and the
    open one.

    A subclass creates its parameters under the released names, then calls `_finish`, and says its
    `base_terms` and, where q, k and v have a bias beside that of `qkv`, its `extra_bias`. What
    stands in place of `qkv` or `proj` is called.
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

    def _finish(self, qkv_bias: bool, proj_drop: float, out_dim: int = 0) -> None:
        """Creates the projections (to `out_dim` channels, by default C) and the modifiers, last:
        the released order of the state dict.
        """
        self.qkv = nn.Linear(self.dim, 3 * self.geometry.inner, bias=qkv_bias)
        self.out_dim = out_dim or self.dim
        self.proj = nn.Linear(self.geometry.inner, self.out_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.add_modifiers(self.spec.modifiers, self.geometry)
        self.logit_tap = nn.Identity()
        self.map_tap = nn.Identity()

    def base_terms(self) -> OffsetTerms:
        """The unmodified scale and bias, float32 tables (1, heads) and (T, heads)."""
        raise NotImplementedError

    def term_parameters(self) -> list[Tensor]:
        """The parameters that `base_terms` reads itself."""
        raise NotImplementedError

    def term_modules(self) -> list[nn.Module]:
        """The modules that `base_terms` calls; by default none."""
        return []

    def terms(self) -> OffsetTerms:
        """Scale and bias with all term modifiers applied, in float32; inside `evaluation` kept
        while the parameters stay the same.
        """
        cache = kept_for(self)
        if cache is None:
            return self._modified_terms()
        found = _read_by([*self.term_modules(), *self._stage(TermModifier)])
        if found is None:
            return self._modified_terms()
        modules, read = found
        sources = [*self.term_parameters(), *present(self._buffers.values()), *read]
        return cache.get(("terms", *modules), sources, self._modified_terms)

    def _modified_terms(self) -> OffsetTerms:
        with without_autocast(next(self.buffers()).device.type):
            terms = self.base_terms()
            for modifier in self._stage(TermModifier):
                terms = modifier(terms)
        return terms

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
        y = run_linear(self.proj, self.before_projection(y, x))
        return self.finish(self.proj_drop(y), x, qkv)

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
        """Whether the N x N matrix is formed in the open: a modifier needs it, or a tap is hooked
        or replaced.
        """
        taps = (self.logit_tap, self.map_tap)
        # torch 2.10 traces no bool of a list
        return len(self._on_maps()) > 0 or not all(is_untouched(tap, nn.Identity) for tap in taps)

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
            q, k = unit(q), unit(k)
        logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * terms.dense("scale")
        if terms.bias is not None:
            logits = logits + terms.dense("bias")
        with without_autocast(qkv.device.type):
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
            ours = isinstance(modifier, MapModifier)  # a built-in one may be replaced
            attn = modifier(attn, layout) if ours and modifier.mixes_pairs else modifier(attn)
            attn = zero_masked(attn, layout.mask)
            attn = modifier.after_mask(attn) if ours else attn
        return attn

    def map_flops(self, layout: WindowLayout) -> int:
        """Multiply-accumulates for all windows of one map."""
        on_maps = modifier_flops(self._on_maps(), self.num_heads, layout.area, layout)
        return layout.num_windows * self._unmodified_flops(layout.area) + on_maps

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for one window of `tokens` tokens: by Swin's count, projections and
        the two products, and what modifiers do to the map.
        """
        on_map = modifier_flops(self._on_maps(), self.num_heads, tokens)
        return self._unmodified_flops(tokens) + on_map

    def _unmodified_flops(self, tokens: int) -> int:
        inner = self.geometry.inner
        return (
            tokens * self.dim * 3 * inner
            + 2 * tokens * tokens * inner
            + tokens * inner * self.out_dim
        )

    def _on_maps(self) -> list[nn.Module]:
        """What forms the N x N matrix anew, in its order."""
        return [*self._stage(LogitMixer), *self._stage(MapModifier)]


def _read_by(modules: list[nn.Module]) -> tuple[list[nn.Module], list[Tensor]] | None:
    """All modules in modules, and their parameters and buffers; None where these may not be called
    once for many forwards: something in them is hooked, replaced or in training.
    """
    seen, read, waiting = [], [], list(modules)
    while waiting:
        module = waiting.pop()
        seen.append(module)
        known = isinstance(module, Modifier) or type(module).__module__.startswith("torch.nn.mod")
        if module.training or not known or not is_untouched(module, type(module)):
            return None
        if "parametrizations" in module._modules:
            return None
        read += module._parameters.values()
        read += module._buffers.values()
        waiting += present(module._modules.values())
    return seen, present(read)


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
        """The scale."""
        return [self.logit_scale]

    def base_terms(self) -> OffsetTerms:
        """scale (1, heads) in (0, 100], bias (T, heads) in (0, 16), or unbounded without the
        sigmoid.
        """
        scale = self.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp().view(1, -1)
        bias = self.cpb_mlp(self.relative_coords_table.flatten(0, 2))
        if self.spec.bias_sigmoid:
            bias = 16 * torch.sigmoid(bias)
        return OffsetTerms(self.window_size, scale, bias)

    def term_modules(self) -> list[nn.Module]:
        """The bias MLP."""
        return [self.cpb_mlp]

    def extra_bias_parameters(self) -> list[Tensor | None]:
        """The biases of q and of v."""
        return [self.q_bias, self.v_bias]

    def extra_bias(self) -> Tensor | None:
        """(3C,): k has no bias."""
        if self.q_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
