"""State dict -> model: convert the names, fit the shapes, count what fits, refuse the rest. The
model is touched last, or not at all.
"""

import logging
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .classes import match_classes
from .convert import from_rpe_mlp, is_rebuilt, to_reference
from .errors import CheckpointError, check_option, list_keys
from .fit import HEAD_NAMES, fit, kept_heads
from .grids import FileGrids, compare_grids, model_grids
from .initial import check_initial, overwrite
from .registers import match_registers
from .report import LoadReport, describe, reasons
from .residual import (
    OURS,
    file_residual,
    loses_bias,
    match_residual,
    model_residual,
    side_named,
)
from .soundness import check_finite, check_form, same_kind
from .transfer import stretched
from .weights import Weights, unwrap

RULES = ("finetune", "exact")
RESIZE_METHODS = ("auto", "bicubic", "geometric")
# what a fresh parameter belongs to
GROUP = re.compile(r"attn\.modifiers\.\w+|pre_mlp|sw_mlp|^reg_token$")


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
    init_over: bool = False,
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Loads weights of any supported origin into a model, or raises and leaves the model as it was.

    Buffers that follow from the geometry (position index, coordinates, masks) are never taken from
    the file.

    Args:
        state_dict: what `read_weights` returned, or any bare or wrapped state dict.
        rule: 'finetune' fits other windows, image sizes, class counts and a one-channel input, lets
            a headless file keep the model's head, and lets the parameters that a modifier adds, and
            registers, keep their initial values where the file has none of that modifier (a
            released file cannot have them), or no registers. 'exact' (resume, evaluation) converts
            names, and the positions of registers, only: every parameter must be there in its shape.
        head: see `heads.fit_head` ('auto', 'reset', 'keep', 'evaluate'); only under 'finetune'.
        allow_partial: load what fits although keys are missing, unexpected or of another shape.
        source_residual: one of residual.SOURCES: which function the file's qkv weights stand for.
        resize: 'bicubic', 'geometric' (SimMIM's rule for Swin's tables) or 'auto': geometric for
            files with the prefix encoder.
        init_over: modifiers that only set initial values (init_identity) set them over the loaded
            weights; False refuses such a model. Neither happens under 'exact' or to be evaluated.
        classes: names of the data's classes. A head that is kept must be of these, where the file
            names its own; one in another order is put into theirs. None: nothing is compared.
    Raises: CheckpointError, one line, that names the keys.
    """
    check_option("rule", rule, RULES)
    check_option("resize", resize, RESIZE_METHODS)
    model = getattr(model, "_orig_mod", model)  # torch.compile keeps the model here
    weights = unwrap(state_dict)
    check_form(weights, weights.source)
    starts = rule == "finetune" and head != "evaluate"
    if starts:
        check_initial(model, init_over, weights.source)
    state, report = convert(model, weights, rule, source_residual)
    kept = [] if head == "reset" and rule == "finetune" else kept_heads(model, state)
    state = match_classes(weights, state, kept, classes, report, remedy(rule, head))
    grids = FileGrids(weights, state)
    own = model_grids(model).get("pos_embed")
    state, note = match_registers(state, model.state_dict(), own, grids["pos_embed"])
    report.notes += [note] if note else []
    if note := stretched(state, model.state_dict()):
        note_transfer(note, rule, weights, report)
    if rule == "finetune":
        state = fit(model, state, report, head, resize, grids)
    state = compare(model, state, report, rule, grids)
    leave_outside(weights.outside, report)
    report.text = describe(model.state_dict(), report)
    refuse_without_head(model, weights, report, head)
    if (report.missing or report.unexpected) and not (allow_partial and report.loaded):
        raise CheckpointError(
            f"{weights.source} does not fit the model: {'; '.join(reasons(model, report, rule))}"
        )
    check_finite({key: state[key] for key in report.loaded}, weights.source)
    model.load_state_dict(state, strict=False)
    if starts and init_over and (notes := overwrite(model)):
        report.notes += notes
        report.text = "; ".join([report.text, *notes])
    if logger is not None:
        doubtful = (report.missing, report.unexpected, report.unsure, report.by_position)
        logger.log(logging.WARNING if any(doubtful) else logging.INFO, report.text)
    return report


def note_transfer(note: str, rule: str, weights: Weights, report: LoadReport) -> None:
    """Another function than the file's is not exact; raises CheckpointError then."""
    if rule == "exact":
        raise CheckpointError(f"{weights.source}: {note}; set it to these, stage by stage")
    report.notes.append(f"{note}: it will be stretched")


def remedy(rule: str, head: str) -> str:
    """What helps where a file's classes are not the data's."""
    anew = "" if rule == "exact" or head == "evaluate" else ", MODEL.HEAD_RESET True for a new head"
    return f"give the data of its training{anew}, or MODEL.MATCH_CLASSES False to go by position"


def convert(
    model: nn.Module, weights: Weights, rule: str, source_residual
) -> tuple[dict[str, Tensor], LoadReport]:
    """Swin's names, and the model's kind of qkv weights."""
    if any(key.startswith("encoder.") for key in model.state_dict()):  # masked image modelling
        state, steps = from_rpe_mlp(weights), []
    else:
        state, steps = to_reference(weights)
    report = LoadReport(format="+".join(name for name, _ in steps) or "reference")
    report.notes += [f"{name} names were converted ({reason})" for name, reason in steps]
    if weights.entry:
        report.notes.append(f"taken from the file's entry '{weights.entry}'")
    if weights.others:
        report.notes.append(
            f"the file also has {list_keys(weights.others)}, to be chosen with MODEL.ENTRY"
        )
    if not weights.checked:
        report.notes.append("the file carries no checksum, so damage to it may pass unnoticed")
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


def compare(
    model: nn.Module, state: dict[str, Tensor], report: LoadReport, rule: str, grids: FileGrids
) -> dict[str, Tensor]:
    """Fills the report's lists; returns the entries that fit: of the model's shape, and, as far as
    the file says, on its grid of tokens.
    """
    wanted = {key: value for key, value in model.state_dict().items() if not is_rebuilt(key)}
    given = {key: value for key, value in state.items() if not is_rebuilt(key)}
    asked = {key: value for key, value in given.items() if key not in report.resized}
    scrambled, report.unsure = compare_grids(asked, wanted, model_grids(model), grids)
    fits = {
        key: given[key]
        for key in wanted
        if key in given and fits_as_it_is(given[key], wanted[key]) and key not in scrambled
    }
    absent = [key for key in wanted if key not in fits]
    if rule == "finetune":
        report.fresh += [key for key in absent if key not in report.fresh and is_fresh(key, given)]
    report.loaded = [key for key in fits if key not in report.fresh]
    report.missing = [key for key in absent if key not in report.fresh]
    report.shapes = {
        key: misfit(given[key], wanted[key]) for key in absent if key in given
    } | scrambled
    if report.unsure:
        report.notes.append(
            f"the file does not say how many rows of tokens {list_keys(report.unsure)} lies on:"
            " taken as the model's"
        )
    report.unexpected = [key for key in given if key not in wanted]
    counted = sum(wanted[key].numel() for key in wanted if key not in report.fresh)
    report.coverage = sum(wanted[key].numel() for key in report.loaded) / max(counted, 1)
    return fits


def fits_as_it_is(given: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor of the file may be copied: the same shape, and the same kind of numbers."""
    return given.shape == wanted.shape and same_kind(given, wanted)


def misfit(given: Tensor, wanted: Tensor) -> str:
    """Both shapes, or both types where the shapes agree."""
    shapes = [str(tuple(tensor.shape)) for tensor in (given, wanted)]
    if shapes[0] == shapes[1]:
        shapes = [str(tensor.dtype).removeprefix("torch.") for tensor in (given, wanted)]
    return " (file {}, model {})".format(*shapes)


def leave_outside(outside: Sequence[str], report: LoadReport) -> None:
    """Keys beside the network that the model does not have are left out, and named."""
    left = [key for key in report.unexpected if key in outside]
    if left and report.loaded:
        report.unexpected = [key for key in report.unexpected if key not in left]
        report.notes.append(f"left out, no part of the network: {list_keys(left)}")


def refuse_without_head(model: nn.Module, weights: Weights, report: LoadReport, head: str) -> None:
    """Raises CheckpointError where an evaluation would lack nothing but the classifier, or one of
    as many classes.
    """
    names = getattr(model, "head_names", HEAD_NAMES)
    heads = [key for key in report.missing if key.rpartition(".")[0] in names]
    if head != "evaluate" or not heads or heads != report.missing or report.unexpected:
        return
    if misfits := [key + report.shapes[key] for key in heads if key in report.shapes]:
        raise CheckpointError(
            f"{weights.source}: its classifier has other classes than the model:"
            f" {list_keys(misfits)}; evaluate it on the data it was trained for"
        )
    beside = f"; beside the network it has {list_keys(weights.outside)}" if weights.outside else ""
    raise CheckpointError(
        f"{weights.source}: the file has no classifier ({', '.join(heads)}), so there is nothing to"
        f" evaluate; train one first{beside}"
    )


def is_fresh(key: str, given: Mapping[str, Tensor]) -> bool:
    """A parameter that this project adds, or registers, of a kind the file has nothing of."""
    group = GROUP.search(key) if OURS.search(key) or key == "reg_token" else None
    return group is not None and not any(group[0] in other for other in given)
