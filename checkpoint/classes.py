"""Names of the classes that a head was trained for: compared with those of the data, and put into
their order.

A head says nothing of its classes: with a class folder renamed, added or left out, each row would
quietly stand for another class.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import CheckpointError, list_keys
from .report import LoadReport
from .schema import are_names
from .weights import Weights, decode

CLASSES = "class_names"  # the entry of a checkpoint, and of a weights file's metadata


def names_as_metadata(names: Sequence[str]) -> dict[str, str]:
    """Class names as metadata of a weights file, which are text alone."""
    return {CLASSES: json.dumps(list(names))} if names else {}


def stored_classes(weights: Weights) -> list[str] | None:
    """The names that a file states, in the order of the head's rows; None if it states none."""
    beside = weights.metadata.get("metadata")
    for place in (weights.metadata, beside):
        names = decode(place.get(CLASSES)) if isinstance(place, Mapping) else None
        if names and are_names(names):
            return list(names)
    return None


def match_classes(
    weights: Weights,
    state: dict[str, Tensor],
    heads: Sequence[str],
    wanted: Sequence[str] | None,
    report: LoadReport,
    remedy: str,
) -> dict[str, Tensor]:
    """The state dict with the rows of its heads in the order of the data's classes.

    Args:
        heads: names of the layers to the classes that are kept as the file has them.
        wanted: the data's class names, None where nothing is compared.
        remedy: what else the user can do, for the error.
    Raises: CheckpointError where the classes are not the same.
    """
    given = stored_classes(weights)
    keys = [
        key
        for head in heads
        for key in (f"{head}.weight", f"{head}.bias")
        if given and key in state and len(state[key]) == len(given)
    ]
    if not wanted or not keys or len(given) != len(wanted):
        return state
    given, wanted = normal(given), normal(wanted)
    if given == wanted:
        return state
    if sorted(given) != sorted(wanted) and (is_numbered(given) or is_numbered(wanted)):
        report.by_position = True
        report.notes.append(
            "the classes of the file or of the data are numbers alone, so their names cannot be"
            " compared: they are taken by position"
        )
        return state
    refuse_other_classes(given, wanted, weights.source, remedy)
    rows = torch.tensor([given.index(name) for name in wanted])
    moved = int((rows != torch.arange(len(rows))).sum())
    report.notes.append(
        f"the data's classes are the file's in another order: {moved} rows of the head were moved"
        " to their names"
    )
    return state | {key: state[key][rows] for key in keys}


def check_same_classes(
    given: object, wanted: Sequence[str] | None, source: str, remedy: str
) -> None:
    """Raises CheckpointError unless a training state's classes are the data's, in their order; one
    without names, or with numbers alone on one side, passes.
    """
    if not wanted or not given or not are_names(given):
        return
    given, wanted = normal(given), normal(wanted)
    if given == wanted:
        return
    if sorted(given) != sorted(wanted) and (is_numbered(given) or is_numbered(wanted)):
        return
    refuse_other_classes(given, wanted, source, remedy)
    first = next(place for place, pair in enumerate(zip(given, wanted)) if pair[0] != pair[1])
    raise CheckpointError(
        f"{source}: class {first} of the file is {given[first]!r}, that of the data is"
        f" {wanted[first]!r}: the classes are the same in another order; {remedy}"
    )


def refuse_other_classes(given: list[str], wanted: list[str], source: str, remedy: str) -> None:
    """Raises CheckpointError unless both have the same names, each once."""
    lost, new = set(given) - set(wanted), set(wanted) - set(given)
    if lost or new:
        raise CheckpointError(
            f"{source}: its {len(given)} classes are not the {len(wanted)} of the data: in the file"
            f" alone {quoted(lost)}; in the data alone {quoted(new)}; {remedy}"
        )
    twice = (
        {name for name in given if given.count(name) > 1} if len(set(given)) < len(given) else ()
    )
    if twice:
        raise CheckpointError(
            f"{source}: its classes stand in another order than the data's and {quoted(twice)}"
            f" occurs twice, so the names do not tell which is which; {remedy}"
        )


def quoted(names) -> str:
    return list_keys([repr(name) for name in sorted(names)]) or "none"


def normal(names: Sequence[str]) -> list[str]:
    """Names as they are compared: file systems write the same accents in two ways."""
    return [unicodedata.normalize("NFC", name) for name in names]


def is_numbered(names: list[str]) -> bool:
    """Whether the names are the labels themselves: '0', '1', ... in order."""
    return names == [str(label) for label in range(len(names))]
