"""The attention modules of timm's transformers, rebuilt as this project's: same parameters, same
state-dict keys, same function.

Each class takes over the layers of a timm module, weights included; what modifiers add comes under
`modifiers.<name>`.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.linear import is_untouched
from kernels.window_attention import OffsetTerms
from kernels.window_attention.layout import Size

from .geometry import Geometry
from .global_attention import GlobalAttention
from .spec import AttentionSpec
from .talking_attention import ClassAttention, TalkingHeadsAttention


def _geometry(module: nn.Module, grid: Size, prefix: int) -> Geometry:
    width = module.qkv.out_features // 3
    dim = module.qkv.in_features
    head_dim = 0 if width == dim else width // module.num_heads
    return Geometry(dim, module.num_heads, grid, prefix=prefix, head_dim=head_dim)


def _with_drop(spec: AttentionSpec, module: nn.Module) -> AttentionSpec:
    """The config's dropout of the map, or else the module's own."""
    return replace(spec, drop=spec.drop or module.attn_drop.p)


class TimmAttention(GlobalAttention):
    """timm.layers.Attention, the attention of ViT and DeiT, with its options.

    Args:
        module: what it replaces.
        grid, prefix: tokens (rows, columns) of the patches, and tokens in front of them.
    Shapes: (B, N, C) -> (B, N, out). State dict: qkv, q_norm, k_norm (of each head's q and k), norm
        (of the heads' results together), gate, proj.
    Raises: ValueError in the forward for a mask or for causal attention.
    """

    def __init__(self, module: nn.Module, grid: Size, prefix: int, spec: AttentionSpec):
        super().__init__(
            _geometry(module, grid, prefix),
            _with_drop(spec, module),
            module.qkv.bias is not None,
            module.scale,
            out_dim=module.proj.out_features,
        )
        self.qkv = module.qkv
        self.proj = module.proj
        self.proj_drop = module.proj_drop
        self.q_norm = getattr(module, "q_norm", nn.Identity())
        self.k_norm = getattr(module, "k_norm", nn.Identity())
        self.norm = getattr(module, "norm", nn.Identity())
        self.gate = getattr(module, "gate", None)

    def project(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3C) with q and k normed head by head, where the module does that."""
        qkv = super().project(x)
        if all(is_untouched(norm, nn.Identity) for norm in (self.q_norm, self.k_norm)):
            return qkv
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return torch.stack(
            [self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v], dim=-3
        ).flatten(-3)

    def before_projection(self, y: Tensor, x: Tensor) -> Tensor:
        """The heads' results normed, and gated by the module's input."""
        y = self.norm(y)
        return y if self.gate is None else y * self.gate(x).sigmoid()

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) -> (B, N, out)."""
        if attn_mask is not None or is_causal:
            raise ValueError(
                "timm attention: masks are not supported here; call the model without attn_mask and"
                " is_causal"
            )
        return super().forward(x)


class TimmBeitAttention(TimmAttention):
    """timm.models.beit.Attention: a bias per relative offset, three more for the class token, and
    no bias of k.

    State dict: q_bias, v_bias (C,), relative_position_bias_table (T + 3, heads), qkv, proj.
    Raises: ValueError in the forward for a bias that all blocks share.
    """

    def __init__(self, module: nn.Module, grid: Size, prefix: int, spec: AttentionSpec):
        super().__init__(module, grid, prefix, spec)
        self.q_bias = module.q_bias
        self.v_bias = module.v_bias
        self.relative_position_bias_table = module.relative_position_bias_table
        self.register_buffer(
            "relative_position_index", module.relative_position_index, persistent=False
        )

    def term_parameters(self) -> list[Tensor]:
        """The bias table, where there is one."""
        return (
            [] if self.relative_position_bias_table is None else [self.relative_position_bias_table]
        )

    def base_terms(self) -> OffsetTerms:
        """scale (1, heads); bias (heads, N, N), class token included."""
        terms, table = super().base_terms(), self.relative_position_bias_table
        if table is None:
            return terms
        bias = table[self.relative_position_index].permute(2, 0, 1).contiguous()
        return terms.replace(bias=bias)

    def extra_bias_parameters(self) -> list[Tensor | None]:
        """The biases of q and of v."""
        return [self.q_bias, self.v_bias]

    def extra_bias(self) -> Tensor | None:
        """(3C,): k has no bias."""
        if self.q_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if shared_rel_pos_bias is not None:
            raise ValueError(
                "timm beit: a position bias shared by all blocks is not supported; set"
                " use_shared_rel_pos_bias=False"
            )
        return super().forward(x)


class TimmTalkingHeads(TalkingHeadsAttention):
    """timm.models.cait.TalkingHeadAttn, the attention among the patches; the class token is not
    among them.
    """

    def __init__(self, module: nn.Module, grid: Size, prefix: int, spec: AttentionSpec):
        super().__init__(
            _geometry(module, grid, 0),
            _with_drop(spec, module),
            module.qkv.bias is not None,
            module.scale,
        )
        self.qkv = module.qkv
        self.proj = module.proj
        self.proj_drop = module.proj_drop
        for ours, theirs in ((self.proj_l, module.proj_l), (self.proj_w, module.proj_w)):
            ours.weight = theirs.weight
            ours.bias = theirs.bias


class TimmClassAttention(ClassAttention):
    """timm.models.cait.ClassAttn: one query, so modifiers of the map leave it as it is. (B, 1 + N,
    C) -> (B, 1, C).
    """

    def __init__(self, module: nn.Module, grid: Size, prefix: int, spec: AttentionSpec):
        drop = _with_drop(spec, module).drop
        super().__init__(
            Geometry(module.q.in_features, module.num_heads, grid),
            module.q.bias is not None,
            attn_drop=drop,
        )
        self.q = module.q
        self.k = module.k
        self.v = module.v
        self.proj = module.proj
        self.proj_drop = module.proj_drop

    def forward(self, x: Tensor) -> Tensor:
        """Class token first: (B, 1 + N, C) -> (B, 1, C)."""
        return super().forward(x[:, :1], x)


# By timm's full name of the class: nothing is imported for a model that is not built. ViT's has
# moved between releases of timm.
REPLACEMENTS = {
    "timm.layers.attention.Attention": TimmAttention,
    "timm.models.vision_transformer.Attention": TimmAttention,
    "timm.models.beit.Attention": TimmBeitAttention,
    "timm.models.cait.TalkingHeadAttn": TimmTalkingHeads,
    "timm.models.cait.ClassAttn": TimmClassAttention,
}


def replacement(module: nn.Module) -> type[nn.Module] | None:
    """What replaces a timm module; None for one that is no attention of a known class."""
    return REPLACEMENTS.get(full_name(module))


def full_name(module: nn.Module) -> str:
    """Of its class, as in REPLACEMENTS."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
