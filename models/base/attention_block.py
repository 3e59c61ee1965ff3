"""What a block does around its attention: it lets branch modifiers edit what it adds to the
residual stream, and hands the values of the first block of a chain down.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import SoftmaxAttention
from models.attention.modifiers import BranchModifier


class BranchEditor(nn.Module):
    """Base of blocks that add what their attention `attn` gives to the residual stream, and call
    `edited` on it before.
    """

    attn: nn.Module
    edits: tuple[str, ...] = ()  # names of the branch modifiers it was built with

    def note_edits(self) -> None:
        """To be called once `attn` is there."""
        if isinstance(self.attn, SoftmaxAttention):
            self.edits = tuple(self.attn.names_of(BranchModifier))

    def attended(self, *x: Any, first_v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What `attn` makes of x, and the values it hands down, if it does."""
        y = self.attn(*x) if first_v is None else self.attn(*x, first_v=first_v)
        return y if isinstance(y, tuple) else (y, None)

    def edited(self, o: Tensor, stream: Tensor) -> Tensor:
        """What the branch modifiers make of o, which is about to be added to `stream`, both (B, N,
        C).

        Raises: ValueError where the attention with these modifiers has been replaced by a module
            without them.
        """
        if hasattr(self.attn, "on_branch"):
            return self.attn.on_branch(o, stream)
        if self.edits:
            raise ValueError(
                f"{type(self.attn).__name__} stands in place of attn and has no on_branch(o,"
                f" stream), so {list(self.edits)} would be lost; give it one that calls that of the"
                " attention it replaces"
            )
        return o


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *place: Any, again: bool = False) -> Tensor:
    """Tokens (B, N, C) through blocks called as block(x, *place); what the first one hands down
    reaches the others as `first_v`.

    again: activations are computed again in the backward.
    """
    again = again and torch.is_grad_enabled()
    handed: dict[str, Tensor] = {}
    for block in blocks:
        if again:
            made = checkpoint(block, x, *place, use_reentrant=False, **handed)
        else:
            made = block(x, *place, **handed)
        if isinstance(made, tuple):
            x, handed = made[0], {"first_v": made[1]}
        else:
            x = made
    return x


def check_blocks(model: nn.Module) -> None:
    """Raises ValueError for branch modifiers that nobody would call, and for those of the values of
    a first block where there is no second one.
    """
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SoftmaxAttention)
    }
    readers = [module for module in attentions.values() if module.reads_first_v]
    if readers and not any(module.geometry.block for module in readers):
        raise ValueError(
            f"{list(readers[0].spec.modifiers)}: no stage has a second block to which the values of"
            " the first one could be handed; make one deeper"
        )
    for name, module in attentions.items():
        if module.ends_branch:
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        names = module.names_of(BranchModifier)
        if names and not isinstance(block, BranchEditor):
            raise ValueError(
                f"{', '.join(names)} edits what a block adds to the residual stream, which"
                f" {type(block).__name__} ({name}) does not let it do; leave it out, or take"
                " MODEL.TYPE swin, swinv2, vit, cait, pit, t2t or refined_vit"
            )
