"""QK residual: W <-> W - I on the query and key rows, and how a file says which of the two it
holds.

With `qk_residual` a model computes q = W_q x + x, so the weight W of a plain model becomes W - I
there, and back. Nothing in the numbers tells the two apart; a file is therefore read by this rule,
first match first:

1. `source_residual` of the caller ('plain', 'qk_residual', 'q', 'k').
2. What the file says: `qk_residual` in its metadata, or the modifiers in the config stored beside
    the weights.
3. `attn.qk_weight_residual` of the original identity-sharpened implementation: 'both'.
4. The module names that torch records in a state dict: `attn.modifiers.qk_residual` is there or is
    not.
5. Names of timm, torchvision, Hugging Face, OpenMMLab or SimMIM: plain, these have no residual.
6. None of these, though the file holds other parameters of this project (crpw, pre_mlp): unknown,
    refused.
7. Otherwise it is a file as released: plain when fine-tuning. When resuming or evaluating (rule
   'exact') it is refused if the model has a residual, for a wrong guess would be a wrong result.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from registry import parse_call

from .errors import CheckpointError, check_option
from .weights import Weights, decode

# What a user can say a file was saved with; 'auto' is the rule above.
SOURCES = ("auto", "plain", "qk_residual", "q", "k")
SIDES = {"both": (0, 1), "q": (0,), "k": (1,), "none": ()}  # which thirds of the qkv weight
SPELLINGS = {"qk": "both", True: "both", False: "none", "plain": "none", "qk_residual": "both"}
# Implementations that have no residual.
FOREIGN = {"timm", "torchvision", "simmim", "rpe_mlp", "huggingface", "openmmlab"}
# Parameters that no released file has.
OURS = re.compile(r"\.attn\.modifiers\.|(^|\.)pre_mlp\.|\.sw_mlp\.")


def to_qk_residual(state: Mapping[str, Tensor], which: str = "both") -> dict[str, Tensor]:
    """A plain state dict -> the same function in a model with qk_residual: W - I on the q and/or k
    rows of every attn.qkv.weight.

    The result is float32 at least: half precision would round W - 1 to steps of 0.0005 to 0.004.
    """
    return shift_diagonal(state, which, -1)


def from_qk_residual(state: Mapping[str, Tensor], which: str = "both") -> dict[str, Tensor]:
    """The state dict of a model with qk_residual -> the same function in a plain one: W + I.
    Inverse of `to_qk_residual`.
    """
    return shift_diagonal(state, which, +1)


def shift_diagonal(state: Mapping[str, Tensor], which: str, amount: int) -> dict[str, Tensor]:
    thirds = SIDES[side_named(which)]
    changed = dict(state)
    for key, weight in state.items():
        if thirds and key.endswith("attn.qkv.weight"):
            changed[key] = with_diagonal(weight, thirds, amount)
    return changed


def side_named(which) -> str:
    """'both', 'q', 'k' or 'none' under any accepted spelling ('qk', True, False, 'plain',
    'qk_residual').
    """
    side = SPELLINGS.get(which, which)
    check_option("the side of qk_residual", side, [*SIDES, "qk_residual", "plain"])
    return side


def with_diagonal(weight: Tensor, thirds: tuple[int, ...], amount: int) -> Tensor:
    """(3C, C) -> copy with `amount` added to the diagonals of the named C x C thirds."""
    result = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for third in thirds:
        result.unflatten(0, (3, -1))[third].diagonal().add_(amount)
    return result


def model_residual(model: nn.Module) -> str:
    """Which of q and k a model adds its input to: 'none', 'q', 'k' or 'both'.

    Raises: CheckpointError if its blocks differ, which no conversion here covers.
    """
    sides = {
        side_named(module.parts)
        for name, module in model.named_modules()
        if name.endswith("modifiers.qk_residual")
    }
    if len(sides) > 1:
        raise CheckpointError(
            f"the model's blocks differ in qk_residual ({', '.join(sorted(sides))}); convert the"
            " weights by hand"
        )
    return sides.pop() if sides else "none"


def loses_bias(model: nn.Module) -> bool:
    """Whether qk_residual(drop_bias=True) switches biases off that a plain model uses."""
    return any(
        getattr(module, "drop_bias", False)
        for name, module in model.named_modules()
        if name.endswith("modifiers.qk_residual")
    )


def file_residual(weights: Weights, formats: list[str], target: str) -> tuple[str | None, str]:
    """Rules 2 to 7. formats: the names that were converted. target: the model's side. Returns:
    (side or None if unknown, reason).
    """
    said = stated_residual(weights.metadata)
    if said is not None:
        return said, "the file says so"
    if any(key.endswith(".qk_weight_residual") for key in weights):
        return "both", "the file holds attn.qk_weight_residual"
    if weights.modules is not None:
        has = any(name.endswith("modifiers.qk_residual") for name in weights.modules)
        # the names do not tell q from k; the model's side is the likely one
        side = "both" if target == "none" else target
        return (side if has else "none"), "the module names recorded in the file"
    if foreign := set(formats) & FOREIGN:
        return "none", f"{foreign.pop()} files have none"
    if any(OURS.search(key) for key in weights) or "identity" in formats:
        reason = "the file has parameters of this project but does not say whether it was saved"
        return None, f"{reason} with qk_residual"
    return None, "the file does not say"


def stated_residual(metadata: Mapping) -> str | None:
    """The side that a file's metadata or stored config states, None if they state nothing."""
    beside = metadata.get("metadata")
    inner = beside.get("qk_residual") if isinstance(beside, Mapping) else None
    said = metadata.get("qk_residual", inner)
    if isinstance(said, str):
        return side_named(said)
    modifiers = config_modifiers(decode(metadata.get("config")))
    return None if modifiers is None else modifiers_residual(modifiers)


def config_modifiers(config) -> list[str] | None:
    """MODEL.ATTENTION.MODIFIERS of a stored config; [] for Swin's own configs, which have no such
    node.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("MODEL"), Mapping):
        return None
    attention = config["MODEL"].get("ATTENTION")
    if not isinstance(attention, Mapping):
        return []
    modifiers = attention.get("MODIFIERS", ())
    if not isinstance(modifiers, (list, tuple)):
        raise CheckpointError("the config stored in the file has MODIFIERS that are no list")
    return [str(entry) for entry in modifiers]


def modifiers_residual(modifiers: list[str]) -> str:
    """['qk_residual(which=q)', ...] -> 'q'."""
    try:
        options = dict(map(parse_call, modifiers)).get("qk_residual")
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"the config stored in the file has unreadable modifiers: {error}"
        ) from error
    return "none" if options is None else side_named(options.get("which", "both"))


def match_residual(
    state: dict[str, Tensor], source: str, target: str
) -> tuple[dict[str, Tensor], str]:
    """Turns weights saved with residual `source` into those of a model with residual `target`.
    Returns: (state, note or '').
    """
    if source == target:
        return state, ""
    note = f"qk_residual on {source} became qk_residual on {target}"
    if source == "none":
        note = f"plain weights became the residual of a qk_residual model (W - I on {target} rows)"
    elif target == "none":
        note = f"weights of a qk_residual model became plain ones (W + I on {source} rows)"
    return to_qk_residual(from_qk_residual(state, source), target), note
