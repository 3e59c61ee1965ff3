"""Stand-alone self-attention: a drop-in for a k x k convolution, every pixel attending to the k x k
pixels around it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from registry import check_choice

from .neighbourhood import neighbourhood_attention

MAX_KERNEL = 255


class LocalAttention(nn.Module):
    """Local attention with relative rows and columns; no output projection, no bias.

        y_ij = concat_heads sum_ab softmax_ab(q_ij · k_ab + q_ij · r_(a-i, b-j)) v_ab
        r = [row embedding; column embedding]

    Args:
        dim: channels of the input.
        num_heads: heads; each has out_dim / num_heads channels D.
        out_dim: by default `dim`.
        kernel_size: side of the neighbourhood in pixels, odd.
        stride: attention at the input's resolution, then average pooling over stride x stride
            pixels (incomplete squares at the border are averaged over what there is).
        rel: shared (one embedding for all heads), per_head, or none.
        pad: mask leaves pixels outside the image out of the softmax, zero counts them as zeros with
            logit q · r.
        scale: none (the paper), or sqrt_d divides the logits by sqrt(D).
        content: False leaves q · k out, and with it the key projection: the logits are q · r alone.
        grouped: each head projects its own share of the channels only, dim² / num_heads numbers a
            projection; the paper's words say so, its parameter counts say full projections.
    Shapes: (B, dim, H, W) -> (B, out_dim, ceil(H / stride), ceil(W / stride)). Parameters: 3 dim
        out_dim (2 without content), and kernel_size D numbers for positions (times num_heads with
        per_head).
    Raises: ValueError for sizes that cannot be, with the reason.
    Source: Stand-Alone Self-Attention in Vision Models, arXiv:1906.05909, eq. 2 and 3; the width of
        the initial embeddings is ours.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        out_dim: int | None = None,
        kernel_size: int = 7,
        stride: int = 1,
        rel: str = "shared",
        pad: str = "mask",
        scale: str = "none",
        grouped: bool = False,
        content: bool = True,
    ):
        super().__init__()
        out_dim = out_dim or dim
        rel = str(rel or "none").lower()
        scale = str(scale or "none").lower()
        self.rel = check_choice("local attention: rel", rel, ("shared", "per_head", "none"))
        self.pad = check_choice("local attention: pad", pad, ("mask", "zero"))
        check_choice("local attention: scale", scale, ("none", "sqrt_d"))
        _check_sizes(dim, out_dim, num_heads, kernel_size, stride, rel != "none", grouped)
        if rel == "none" and not content:
            raise ValueError(
                "local attention: content=False leaves q · r alone, and rel=none leaves that out"
                " too; choose one of them"
            )
        head_dim = out_dim // num_heads
        self.dim = dim
        self.out_dim = out_dim
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.stride = stride
        self.scale = head_dim**-0.5 if scale == "sqrt_d" else 1.0
        groups = num_heads if grouped else 1
        self.query, self.key, self.value = (
            nn.Conv2d(dim, out_dim, 1, groups=groups, bias=False) if wanted else None
            for wanted in (True, content, True)
        )
        shape = (num_heads if rel == "per_head" else 1, kernel_size, head_dim // 2)
        self.rel_row, self.rel_col = (
            nn.Parameter(torch.randn(shape) * head_dim**-0.5) if rel != "none" else None
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, out_dim, ceil(H / stride), ceil(W / stride))."""
        q, k, v = (
            layer and layer(x).unflatten(1, (self.num_heads, -1))
            for layer in (self.query, self.key, self.value)
        )
        q = q if self.scale == 1 else q * self.scale
        y = neighbourhood_attention(
            q, k, v, self.rel_row, self.rel_col, self.kernel_size, self.pad == "mask"
        ).flatten(1, 2)
        return y if self.stride == 1 else F.avg_pool2d(y, self.stride, ceil_mode=True)

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for `tokens` input pixels: projections, q · k (or q · r alone) and
        the sum of values; q · r beside q · k is not counted.
        """
        weights = sum(
            layer.weight.numel()
            for layer in (self.query, self.key, self.value)
            if layer is not None
        )
        return tokens * (weights + 2 * self.kernel_size**2 * self.out_dim)

    def no_weight_decay(self) -> set[str]:
        """The position embeddings."""
        return set() if self.rel_row is None else {"rel_row", "rel_col"}

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return (
            f"heads={self.num_heads}, kernel={self.kernel_size}, stride={self.stride},"
            f" rel={self.rel}, pad={self.pad}"
        )


def _check_sizes(
    dim: int,
    out_dim: int,
    num_heads: int,
    kernel_size: int,
    stride: int,
    positions: bool,
    grouped: bool,
) -> None:
    if not 1 <= kernel_size <= MAX_KERNEL or kernel_size % 2 == 0:
        raise ValueError(
            f"local attention: kernel_size is {kernel_size}; it must be odd, so that it has a"
            f" centre, and from 1 to {MAX_KERNEL}"
        )
    if stride < 1:
        raise ValueError(f"local attention: stride is {stride}; it must be at least 1")
    if num_heads < 1 or out_dim % num_heads or (grouped and dim % num_heads):
        raise ValueError(
            f"local attention: {dim} -> {out_dim} channels cannot be split into {num_heads} heads; "
            "choose a num_heads that divides them"
        )
    if positions and out_dim // num_heads % 2:
        raise ValueError(
            f"local attention: {out_dim // num_heads} channels a head cannot be halved between row"
            " and column embeddings; choose fewer heads, or rel=none"
        )
