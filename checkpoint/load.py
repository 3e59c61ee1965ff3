"""State dict -> model: convert the names, fit the shapes, count what fits, refuse the rest. The
model is touched last, or not at all.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .convert import from_rpe_mlp, is_rebuilt, to_reference
from .errors import CheckpointError, list_keys
from .heads import CLASSIFIERS, fit_head
from .residual import (
    OURS,
    file_residual,
    loses_bias,
    match_residual,
    model_residual,
    side_named,
)
from .resize import grid_extent, resize_absolute, resize_bias_table, table_extent
from .weights import Weights, unwrap

TABLE = re.compile(r"^(.*\.attn\.)(relative_position_bias_table|modifiers\.\w+\.table)$")
GROUP = re.compile(r"attn\.modifiers\.\w+|pre_mlp|sw_mlp")  # what a fresh parameter belongs to
FAMILIES = {
    "relative_position_bias_table": "Swin",
    "logit_scale": "SwinV2",
    "spatial_mlp": "Swin-MLP",
}
UNSHIFTED_REACH = (
    1.0567  # SwinV2's largest coordinate, log2(9) / 3, where the window is the pretrained one
)


@dataclass
class LoadReport:
    """What became of each parameter.

    loaded: keys that came from the file (resized ones included). resized: those whose shape was
    fitted. missing: keys of the model that the file lacks or holds in a wrong shape. unexpected:
    keys of the file that the model lacks. fresh: keys that keep their initial value, or zero, by a
    rule (a new head, a modifier's own parameters), not counted in the coverage.
    coverage: loaded elements / (all elements - fresh ones), in [0, 1]. notes: conversions and rules
        that applied, one line each.
    shapes: of misfits, " (file ..., model ...)". format: the names the file used. text: all of it
        in one paragraph, for the log.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    coverage: float = 0.0
    format: str = "reference"
    text: str = ""


def load_weights(
    model: nn.Module,
    state_dict: Mapping,
    *,
    rule: str = "finetune",
    head: str = "auto",
    allow_partial: bool = False,
    logger: logging.Logger | None = None,
    source_residual: str | bool = "auto",
    resize: str = "auto",
) -> LoadReport:
    """Loads weights of any supported origin into a model, or raises and leaves the model as it was.

    state_dict: what `read_weights` returned, or any bare or wrapped state dict.
    rule: 'finetune' fits other windows, image sizes, class counts and a one-channel input, lets a
    headless file keep the model's head, and lets the parameters that a modifier adds keep their
    initial values where the file has none of that modifier (a released file cannot have them).
    'exact' (resume, evaluation) converts names only: every parameter must be there in its shape.
    head: see `heads.fit_head` ('auto', 'reset', 'keep', 'evaluate'); only under 'finetune'.
    allow_partial: load what fits although keys are missing, unexpected or of another shape.
    source_residual: 'auto', 'plain', 'qk_residual', 'q' or 'k': which function the file's qkv
        weights stand for, see residual.py.
    resize: 'bicubic', 'geometric' (SimMIM's rule for Swin's tables) or 'auto': geometric for files
    with the encoder. prefix. Buffers that follow from the geometry (position index, coordinates,
    masks) are never taken from the file.
    Raises: CheckpointError, one line, that names the keys.
    """
    check_options(rule, resize)
    model = getattr(model, "_orig_mod", model)  # torch.compile keeps the model here
    weights = unwrap(state_dict)
    state, report = convert(model, weights, rule, source_residual)
    if rule == "finetune":
        state = fit(model, state, report, head, resize)
    state = compare(model, state, report, rule)
    if (report.missing or report.unexpected) and not (allow_partial and report.loaded):
        raise CheckpointError(
            f"{weights.source} does not fit the model: {'; '.join(reasons(model, report, rule))}"
        )
    model.load_state_dict(state, strict=False)
    if logger is not None:
        logger.log(
            logging.WARNING if report.missing or report.unexpected else logging.INFO, report.text
        )
    return report


def check_options(rule: str, resize: str) -> None:
    for name, value, allowed in (
        ("rule", rule, ("finetune", "exact")),
        ("resize", resize, ("auto", "bicubic", "geometric")),
    ):
        if value not in allowed:
            raise CheckpointError(
                f"load_weights({name}={value!r}): choose from {', '.join(allowed)}"
            )


def convert(
    model: nn.Module, weights: Weights, rule: str, source_residual
) -> tuple[dict[str, Tensor], LoadReport]:
    """The reference's names, and the model's kind of qkv weights."""
    own_encoder = any(
        key.startswith("encoder.") for key in model.state_dict()
    )  # a masked-image-modelling model
    state, steps = (from_rpe_mlp(weights), []) if own_encoder else to_reference(weights)
    report = LoadReport(format="+".join(name for name, _ in steps) or "reference")
    report.notes += [f"{name} names were converted ({reason})" for name, reason in steps]
    if weights.entry:
        also = f" (it also has {list_keys(weights.others)})" if weights.others else ""
        report.notes.append(f"taken from the file's entry '{weights.entry}'{also}")
    target = model_residual(model)
    source = decide_residual(weights, steps, target, rule, source_residual, report)
    state, note = match_residual(state, source, target)
    report.notes += [note] if note else []
    if target != "none" and source == "none" and loses_bias(model):
        report.notes.append(
            "qk_residual(drop_bias=True) ignores q and k biases that the plain model used: the"
            " function is not the same"
        )
    return state, report


def decide_residual(
    weights: Weights, steps: list, target: str, rule: str, asked, report: LoadReport
) -> str:
    """Which side's residual the file's weights are, by the rule in residual.py. Raises
    CheckpointError where a guess could be wrong.
    """
    if asked != "auto":
        return side_named(asked)
    side, reason = file_residual(weights, [name for name, _ in steps], target)
    if side is not None:
        return side
    if target != "none" and (rule == "exact" or any(OURS.search(key) for key in weights)):
        raise CheckpointError(
            f"{weights.source}: {reason}, and this model has qk_residual; set MODEL.SOURCE"
            " (source_residual=), or write a file that says so: python tools/convert_checkpoint.py"
            " IN OUT --source-residual plain|qk_residual"
        )
    if target != "none":
        report.notes.append(
            "the file does not say whether it was saved with qk_residual: taken as plain, as"
            " released files are"
        )
    return "none"


def fit(
    model: nn.Module, state: dict[str, Tensor], report: LoadReport, head: str, resize: str
) -> dict[str, Tensor]:
    """The rules of fine-tuning: head, input channels, position tables."""
    wanted = model.state_dict()
    for layer in [layer for layer in CLASSIFIERS if f"{layer}.weight" in wanted] or CLASSIFIERS:
        classes = len(wanted[f"{layer}.weight"]) if f"{layer}.weight" in wanted else 0
        state, note = fit_head(state, classes, head, layer)
        if note:
            report.notes.append(note if layer == "head" else f"{layer}: {note}")
            report.fresh += [
                key
                for key in (f"{layer}.weight", f"{layer}.bias")
                if key in wanted and "mapped" not in note
            ]
    method = (
        ("geometric" if "simmim" in report.format else "bicubic") if resize == "auto" else resize
    )
    for key in [key for key in state if key in wanted]:
        fitted = fit_tensor(key, state, wanted, model, method)
        if fitted is not state[key]:
            report.resized.append(key)
            state = state | {key: fitted}
    warn_of_transfer(state, wanted, report)
    return state


def fit_tensor(
    key: str,
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    model: nn.Module,
    method: str,
) -> Tensor:
    """One tensor in the model's shape where a rule exists, itself where none does."""
    value, like = state[key], wanted[key]
    if found := TABLE.match(key):
        index = found[1] + "relative_position_index"
        return fit_table(value, like, state.get(index), wanted.get(index), method)
    if value.shape == like.shape:
        return value
    if (
        key in ("absolute_pos_embed", "pos_embed")
        and value.dim() == like.dim() == 3
        and value.shape[-1] == like.shape[-1]
    ):
        return fit_positions(value, like, model)
    if (
        key == "pos_embed"
        and value.dim() == like.dim() == 3
        and value.shape[-1] == like.shape[-1]
        and hasattr(model, "patch_embed")
    ):
        extra = (
            like.shape[1] - model.patch_embed.num_patches
        )  # class tokens come first and are kept
        fitted = resize_absolute(
            value[:, extra:],
            grid_extent(value.shape[1] - extra),
            tuple(model.patch_embed.patches_resolution),
        )
        return torch.cat([value[:, :extra], fitted], dim=1)
    if key == "patch_embed.proj.weight" and like.shape == (value.shape[0], 1, *value.shape[2:]):
        return value.sum(
            1, keepdim=True
        )  # a grey image repeated over the channels gives the same result
    return value


def fit_positions(value: Tensor, like: Tensor, model: nn.Module) -> Tensor:
    """An absolute position embedding (1, prefix + positions, C) for another grid; tokens in front,
    as many in both, keep theirs.

    Where the file's cannot be, because what remains is no square, it is returned as it is, to be
    reported.
    """
    embed = getattr(model, "patch_embed", None)
    grid = getattr(embed, "patches_resolution", None) or getattr(
        embed, "grid_size", None
    )  # the latter is timm's word
    prefix = like.shape[1] - grid[0] * grid[1] if grid else 0
    if prefix and math.isqrt(value.shape[1] - prefix) ** 2 != value.shape[1] - prefix:
        return value
    extent = grid_extent(like.shape[1] - prefix, tuple(grid) if grid else None)
    return torch.cat(
        [
            value[:, :prefix],
            resize_absolute(value[:, prefix:], grid_extent(value.shape[1] - prefix), extent),
        ],
        dim=1,
    )


def fit_table(
    value: Tensor, like: Tensor, index: Tensor | None, like_index: Tensor | None, method: str
) -> Tensor:
    """A table over relative offsets (T, heads); the indices tell windows that are not square."""
    if value.shape[1:] != like.shape[1:] or (value.shape == like.shape and index is None):
        return value
    return resize_bias_table(
        value, table_extent(len(value), index), table_extent(len(like), like_index), method
    )


def warn_of_transfer(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], report: LoadReport
) -> None:
    """SwinV2 with another window, but coordinates that do not know the window of pre-training."""
    tables = [
        key
        for key in state
        if key.endswith("relative_coords_table")
        and key in wanted
        and state[key].shape != wanted[key].shape
    ]
    stages = {
        int(key.split(".")[1]): (state[key].shape[1] + 1) // 2
        for key in tables
        if wanted[key].abs().max() < UNSHIFTED_REACH
    }
    if stages:
        windows = ", ".join(f"stage {stage}: {window}" for stage, window in sorted(stages.items()))
        report.notes.append(
            f"the file's windows ({windows}) differ from the model's and PRETRAINED_WINDOW_SIZES"
            " does not say so: its position bias will be stretched"
        )


def compare(
    model: nn.Module, state: dict[str, Tensor], report: LoadReport, rule: str
) -> dict[str, Tensor]:
    """Fills the report's lists; returns the entries that fit."""
    wanted = {key: value for key, value in model.state_dict().items() if not is_rebuilt(key)}
    given = {key: value for key, value in state.items() if not is_rebuilt(key)}
    fits = {
        key: given[key] for key in wanted if key in given and given[key].shape == wanted[key].shape
    }
    absent = [key for key in wanted if key not in fits]
    if rule == "finetune":
        report.fresh += [key for key in absent if key not in report.fresh and is_fresh(key, given)]
    report.loaded = [key for key in fits if key not in report.fresh]
    report.missing = [key for key in absent if key not in report.fresh]
    report.shapes = {
        key: f" (file {tuple(given[key].shape)}, model {tuple(wanted[key].shape)})"
        for key in absent
        if key in given
    }
    report.unexpected = [key for key in given if key not in wanted]
    counted = sum(wanted[key].numel() for key in wanted if key not in report.fresh)
    report.coverage = sum(wanted[key].numel() for key in report.loaded) / max(counted, 1)
    report.text = describe(wanted, report)
    return fits


def is_fresh(key: str, given: Mapping[str, Tensor]) -> bool:
    """A parameter that this project adds, of a kind the file has nothing of."""
    group = GROUP.search(key) if OURS.search(key) else None
    return group is not None and not any(group[0] in other for other in given)


def percent(share: float) -> str:
    """Never 100 % unless it is all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9999):.4f} %"


def describe(wanted: Mapping[str, Tensor], report: LoadReport) -> str:
    def count(keys):
        return sum(wanted[key].numel() for key in keys)

    total = count(report.loaded) + count(report.missing)
    lines = [
        f"loaded {count(report.loaded):,} of {total:,} parameters ({percent(report.coverage)})"
    ]
    if report.fresh:
        lines.append(f"{count(report.fresh):,} more are new to the file: {list_keys(report.fresh)}")
    if report.resized:
        lines.append(f"resized {list_keys(report.resized)}")
    for name, keys in (("missing", report.missing), ("unexpected", report.unexpected)):
        lines += [f"{name}: {list_keys(keys)}"] if keys else []
    return "; ".join(lines + report.notes)


def reasons(model: nn.Module, report: LoadReport, rule: str) -> list[str]:
    """Why weights are refused and what would help, in the order a reader needs it."""
    if not report.loaded:
        return ["no key is one of this model's", f"it holds {list_keys(report.unexpected)}"]
    file, own = family(report.unexpected + report.loaded), family(model.state_dict())
    misfits = [key + report.shapes.get(key, "") for key in report.missing]
    return [
        *([f"it holds {file}, the model is {own}"] if file and own and file != own else []),
        f"{percent(report.coverage)} of the parameters would be loaded",
        *([f"missing or of another shape: {list_keys(misfits)}"] if misfits else []),
        *([f"unexpected: {list_keys(report.unexpected)}"] if report.unexpected else []),
        "set MODEL.PARTIAL_LOAD True to load what fits"
        + (", or give it as MODEL.PRETRAINED, which fits sizes" if rule == "exact" else ""),
    ]


def family(keys) -> str | None:
    return next((name for part, name in FAMILIES.items() if any(part in key for key in keys)), None)
