"""The branch of attention without its component along the residual stream."""

import torch
from torch import Tensor

from .base import MODIFIERS, BranchModifier

EPS = 1e-8


@MODIFIERS.register("orthogonal_update")
class OrthogonalUpdate(BranchModifier):
    """Removes, token by token, what a block's attention would add along the residual stream.

        s <- s + o - (o . s) / max(|s|², 1e-8) s

    Where s is 0, o stays. `exclusive` removes the direction of the token's own value, this one that
    of the token itself. There is no neutral value. The formula runs in float32 or wider; gradients
    flow through s too (whether the published code does that is not verified, nor its eps).

    Shapes: o and stream (B, N, C) -> same; no parameter is added.
    Raises: by the model, ValueError where the block does not add the branch itself (T2T's token
        transformers, blocks of Refined ViT that share maps, all of timm's).
    Source: Revisiting Residual Connections: Orthogonal Updates, arXiv:2505.11881, where MLPs may be
        edited too (not verified); here attention alone.
    """

    def forward(self, o: Tensor, stream: Tensor) -> Tensor:
        """o, stream (B, N, C) -> (B, N, C), in the wider of their dtypes."""
        wide = torch.promote_types(o.dtype, torch.float32)
        kept = torch.promote_types(o.dtype, stream.dtype)
        o, s = o.to(wide), stream.to(wide)
        square = torch.linalg.vector_norm(s, dim=-1, keepdim=True).square()
        along = (o * s).sum(-1, keepdim=True) / square.clamp(min=EPS)
        return torch.addcmul(o, along, s, value=-1).to(kept)
