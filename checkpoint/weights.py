"""Bare and wrapped state dicts -> `Weights`, a dict of tensors that remembers where it came
from.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from registry import did_you_mean

from .errors import CheckpointError, list_keys
from .layouts import (
    find_network,
    is_clear,
    is_state_dict,
    offered,
    pick_entry,
    prefixed,
    without_wrappers,
)
from .sealed import read_sealed

# Plain data beside the weights.
DESCRIPTIONS = ("metadata", "config", "epoch", "args", "class_names")


class Weights(dict):
    """{key: tensor} plus what the file said about itself.

    Args:
        source: path or URL, for messages.
        entry: the part of the file that was taken, None for a bare dict.
        metadata: plain data beside the weights (safetensors' header; `config`, `metadata`, `args`,
            `epoch` and `class_names` of a training checkpoint).
        modules: names of the modules that wrote the dict if torch recorded them
            (`state_dict()._metadata`), else None.
        others: parts of the file that hold weights too, by the name to choose them.
        outside: keys that stood beside the network's prefix, or are no part of a network.
        checked: whether a checksum has vouched for the tensors.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (),
        source: str = "a state dict",
        entry: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        modules: list[str] | None = None,
        others: Iterable[str] = (),
        outside: Iterable[str] = (),
        checked: bool = True,
    ):
        super().__init__(tensors)
        self.source = source
        self.entry = entry
        self.metadata = dict(metadata or {})
        self.modules = modules
        self.others = list(others)
        self.outside = list(outside)
        self.checked = checked


def read_safetensors(path: Path, source: str) -> Weights:
    """All tensors and the header of a .safetensors file, under their names. Raises:
    CheckpointError.
    """
    tensors, metadata, checked = read_sealed(path)
    return Weights(tensors, source, metadata=metadata, checked=checked)


def unwrap(loaded: Any, source: str = "a state dict", entry: str | None = None) -> Weights:
    """Bare or wrapped dict -> Weights of one network: finds the state dict, keeps the plain data
    beside it, strips wrappers' prefixes. `Weights` stay as they are.

    entry: the part to take, a prefix of names or several in a row ("state_dict.teacher"); by
        default the trained network (layouts.TRAINED).
    Raises: CheckpointError where there are no weights, or several networks to choose from.
    """
    return loaded if isinstance(loaded, Weights) else select(loaded, source, entry)


def select(loaded: Any, source: str, entry: str | None = None) -> Weights:
    """As `unwrap`, also from the raw tensors of a .safetensors file."""
    outer, taken, others = loaded, [], []
    wanted = entry.split(".") if entry else []
    while isinstance(loaded, Mapping) and not is_state_dict(loaded):
        name = wanted[0] if wanted and isinstance(loaded.get(wanted[0]), Mapping) else None
        wanted = wanted[1:] if name else wanted
        if name is None and wanted and not is_clear(offered(loaded)):
            raise no_entry(source, ".".join(wanted), offered(loaded))
        name = name or pick_entry(loaded, source)
        others += [".".join((*taken, other)) for other in offered(loaded) if other != name]
        taken.append(name)
        loaded = loaded[name]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(loaded).__name__}, expected a dict of tensors or {{'model':"
            " dict of tensors}"
        )
    state = without_wrappers(loaded, source)
    if wanted:
        state = part_of(state, ".".join(wanted), source, [*taken, *others])
        taken += wanted
    network = find_network(state, source)
    modules = getattr(loaded, "_metadata", None)
    stated = loaded.metadata if isinstance(loaded, Weights) else {}
    return Weights(
        network.tensors,
        source,
        entry=".".join(taken) or None,
        metadata=stated
        | {key: plain(outer[key]) for key in DESCRIPTIONS if taken and key in outer},
        modules=list(modules) if modules else None,
        others=others + network.others,
        outside=network.outside,
        checked=getattr(loaded, "checked", True),
    )


def part_of(
    state: dict[str, Tensor], prefix: str, source: str, others: list[str]
) -> dict[str, Tensor]:
    """What lies under the prefix that the user has chosen. Raises: CheckpointError."""
    if inside := prefixed(state, prefix):
        return inside
    there = dict.fromkeys(key.partition(".")[0] for key in state if "." in key)
    raise no_entry(source, prefix, [*others, *there])


def no_entry(source: str, wanted: str, there: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{source} has no entry '{wanted}'; it has {list_keys(there, limit=8) or 'none'}"
        + did_you_mean(wanted, there)
    )


def plain(value: Any) -> Any:
    """Ordered dicts and stand-ins as plain dicts."""
    if not isinstance(value, Mapping):
        return value
    return {key: plain(inner) for key, inner in value.items()}


def decode(value: Any) -> Any:
    """A metadata value as plain data: safetensors stores strings only, so lists arrive as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
