"""Softmax attention within windows, y = map(softmax((q kᵀ) * scale + bias + mask)) v."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import are_all_hooked, is_untouched, kept_for, run_linear
from kernels.modes import without_autocast
from kernels.window_attention import (
    Epilogue,
    OffsetTerms,
    WindowLayout,
    window_attention,
)
from kernels.window_attention.reference import (
    add_mask,
    merge_windows,
    softmaxed,
    split_windows,
    unit,
)
from registry import check_choice

from .geometry import Geometry
from .map_flops import modifier_flops
from .modifiers import (
    BranchModifier,
    LogitMixer,
    MapModifier,
    OutputModifier,
    TermModifier,
    TokenModifier,
)
from .modifiers.base import Modifier
from .projection import Projection, present
from .regions import zero_masked
from .spec import AttentionSpec

# what the forward of a modifier can ask for
READABLE = {TokenModifier: ("first_v",), OutputModifier: ("lse", "qkv", "first_v", "attend")}


class SoftmaxAttention(Projection):
    """What all forms share: projections, modifiers and the choice between the fast path and the
    open one.

    A subclass creates its parameters under the released names, then calls `_finish`, and says its
    `base_terms` and, where q, k and v have a bias beside that of `qkv`, its `extra_bias`. What
    stands in place of `qkv` or `proj` is called.
    Shapes: x (B, H, W, C) -> (B, H, W, C).
    """

    cosine = False
    ends_branch = False  # whether the branch modifiers act at its end, not in the block

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
        self._check_output_modifiers()
        self._check_reads()
        parts = [*self._configured(TokenModifier), *self._configured(OutputModifier)]
        self.reads_first_v = _any_reads(parts, "first_v")
        self.logit_tap = nn.Identity()
        self.map_tap = nn.Identity()

    def _check_output_modifiers(self) -> None:
        """Raises: ValueError for those behind a modifier that changes the number of heads."""
        outputs = self._configured(OutputModifier)
        for mapped in self._configured(MapModifier):
            if outputs and mapped.num_maps() != self.num_heads:
                raise ValueError(
                    f"{type(outputs[0]).__name__} works head by head, and"
                    f" {type(mapped).__name__} makes {mapped.num_maps()} heads of"
                    f" {self.num_heads}; keep the number (refiner: reduce=True), or leave one out"
                )

    def _check_reads(self) -> None:
        """Raises: ValueError for a modifier that asks for what its kind is not given."""
        for kind, given in READABLE.items():
            for modifier in self._configured(kind):
                for name in modifier.reads:
                    check_choice(f"{type(modifier).__name__}.reads", name, given)

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

    def tokens(self, x: Tensor, first_v: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., 3C): the projected tokens as attention takes them.

        first_v: v of the first block of the chain, (..., C).
        Raises: ValueError where a modifier needs it and it was not handed down.
        """
        if self.reads_first_v and self.geometry.block and first_v is None:
            raise ValueError(
                f"attention of block {self.geometry.block}: {list(self.spec.modifiers)} need the"
                " values of the first block of its chain; call the blocks through the model, with"
                " the first one's attention in its place"
            )
        qkv = self.project(x)
        for modifier in self._stage(TokenModifier):
            qkv = modifier(qkv, first_v=first_v) if "first_v" in modifier.reads else modifier(qkv)
        return qkv

    def forward(
        self, x: Tensor, layout: WindowLayout, first_v: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, H, W, C) with the grid of `layout` -> (B, H, W, C).

        In the first block of a chain whose modifiers read its values also these, (B, H, W, inner);
        `first_v` are these in the others.
        """
        qkv = self.tokens(x, first_v)
        starts = self.reads_first_v and self.geometry.block == 0
        if starts:
            first_v = qkv[..., -self.geometry.inner :]
        layout = self._masked(layout)
        outputs = self._stage(OutputModifier)
        with_lse = _any_reads(outputs, "lse")
        if self.is_open():
            y, lse, _ = self._open(qkv, self.terms(), layout, with_lse)
        else:
            epilogue = _epilogue(outputs)
            y = window_attention(
                qkv,
                self.terms(),
                layout,
                self.num_heads,
                self.cosine,
                self._dropout(),
                self.spec.backend,
                epilogue=epilogue,
                return_lse=with_lse,
            )
            y, lse = y if with_lse else (y, None)
            if epilogue is not None:
                y = outputs[0].after_epilogue(y, qkv[..., -self.geometry.inner :], layout)
                outputs = outputs[1:]
        y = self._result(self._edit(outputs, y, x, layout, qkv, lse, first_v), x, qkv)
        return (y, first_v) if starts else y

    def with_map(
        self, x: Tensor, layout: WindowLayout, carried: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same in the open, and the map that multiplied v, (B*nW, G, N, N), before dropout.

        carried: (B*nW, H, N, N), added to the softmaxed map before the modifiers of the map.
        """
        qkv = self.tokens(x)
        layout = self._masked(layout)
        outputs = self._stage(OutputModifier)
        with_lse = _any_reads(outputs, "lse")
        y, lse, attn = self._open(qkv, self.terms(), layout, with_lse, carried)
        return self._result(self._edit(outputs, y, x, layout, qkv, lse), x, qkv), attn

    def _masked(self, layout: WindowLayout) -> WindowLayout:
        """The layout with the mask that the term modifiers need."""
        for modifier in self._stage(TermModifier):
            if modifier.forbids:
                return layout.forbidding()
        return layout

    def _attend(self, qkv: Tensor, terms: OffsetTerms, layout: WindowLayout) -> Tensor:
        """Attention of the same tokens by other terms, which an output modifier may ask for; never
        by cosine: (B, H, W, 3C) -> (B, H, W, C).
        """
        drop, backend = self._dropout(), self.spec.backend
        return window_attention(qkv, terms, layout, self.num_heads, False, drop, backend)

    def _dropout(self) -> float:
        return self.spec.drop if self.training else 0.0

    def _edit(
        self,
        outputs: list[OutputModifier],
        y: Tensor,
        x: Tensor,
        layout: WindowLayout,
        qkv: Tensor,
        lse: Tensor | None,
        first_v: Tensor | None = None,
    ) -> Tensor:
        """What the output modifiers make of the heads' results y."""
        given = {"qkv": qkv, "lse": lse, "first_v": first_v, "attend": partial(self._attend, qkv)}
        v = qkv[..., -self.geometry.inner :]
        for modifier in outputs:
            y = modifier(y, v, x, layout, **{name: given[name] for name in modifier.reads})
        return y

    def _result(self, y: Tensor, x: Tensor, qkv: Tensor) -> Tensor:
        y = run_linear(self.proj, self.before_projection(y, x))
        o = self.finish(self.proj_drop(y), x, qkv)
        return self.on_branch(o, None) if self.ends_branch else o

    def on_branch(self, o: Tensor, stream: Tensor | None) -> Tensor:
        """What the branch modifiers make of o, which the block is about to add to the residual
        stream: both (B, N, C) -> the same.
        """
        for modifier in self._stage(BranchModifier):
            o = modifier(o, stream)
        return o

    def reads_stream(self) -> bool:
        """Whether a branch modifier needs the residual stream."""
        return any(modifier.reads_stream for modifier in self._stage(BranchModifier))

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
        with_lse: bool,
        carried: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same with the N x N matrix in the open, for modifiers of the matrix itself and for
        hooks on the two taps: y, the rows' log-sum-exp where it is asked for, and the map.
        """
        q, k, v = split_windows(qkv, layout, self.num_heads)
        if self.cosine:
            q, k = unit(q), unit(k)
        logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * terms.dense("scale")
        if terms.bias is not None:
            logits = logits + terms.dense("bias")
        with without_autocast(qkv.device.type):
            mixers = self._stage(LogitMixer)
            for modifier in mixers:
                logits = modifier(logits)
            for modifier in self._stage(TermModifier) if len(mixers) > 0 else ():
                logits = modifier.after_mixing(logits, terms)
            logits = self.logit_tap(add_mask(logits, layout.mask))
            attn = self.map_tap(self._map(logits, terms, layout, carried))
            lse = None
            if with_lse:
                lse = merge_windows(logits.logsumexp(-1, keepdim=True), layout)
        return merge_windows(weigh(attn, v, self._dropout()), layout), lse, attn

    def _map(
        self, logits: Tensor, terms: OffsetTerms, layout: WindowLayout, carried: Tensor | None
    ) -> Tensor:
        """Logits with everything added (B*nW, H, N, N) -> the map that multiplies v, (B*nW, G, N,
        N), modifiers and all in float32.
        """
        attn = softmaxed(logits, terms)
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
        by_window = self._unmodified_flops(layout.area) + self._added_flops(layout.area)
        return layout.num_windows * by_window + on_maps

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for one window of `tokens` tokens: by Swin's count, projections and
        the two products, and what modifiers do to the map.
        """
        on_map = modifier_flops(self._on_maps(), self.num_heads, tokens)
        return self._unmodified_flops(tokens) + self._added_flops(tokens) + on_map

    def _added_flops(self, tokens: int) -> int:
        return sum(modifier.flops(tokens) for modifier in self._configured(Modifier))

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


def _any_reads(outputs: list[TokenModifier | OutputModifier], name: str) -> bool:
    """Whether one of the modifiers asks for `name`."""
    for modifier in outputs:
        if name in modifier.reads:
            return True
    return False


def _epilogue(outputs: list[OutputModifier]) -> Epilogue | None:
    """The first modifier as an epilogue of the kernel; None where it has none, or where it must be
    called because it is hooked.
    """
    if len(outputs) == 0 or not is_untouched(outputs[0], type(outputs[0])) or are_all_hooked():
        return None
    return outputs[0].epilogue()


def weigh(attn: Tensor, v: Tensor, dropout: float) -> Tensor:
    """A map (B*nW, G, N, N) times v (B*nW, H, N, D), whose channels are cut anew for a map of more
    heads: (B*nW, G, N, H D / G).
    """
    heads = attn.shape[1]
    if v.shape[1] != heads:
        v = v.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
    return F.dropout(attn, dropout).to(v.dtype) @ v
