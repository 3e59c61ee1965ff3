"""Bare and wrapped state dicts -> `Weights`, a dict of tensors that remembers where it came
from.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .sealed import read_sealed

# Names that files use for the part with the weights, most usual first.
ENTRIES = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_ema",
    "state_dict_ema",
    "ema",
    "net",
    "weights",
)
DESCRIPTIONS = (
    "metadata",
    "config",
    "epoch",
    "args",
    "class_names",
)  # plain data beside the weights
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, Lightning


class Weights(dict):
    """{key: tensor} plus what the file said about itself.

    Args:
        source: path or URL, for messages.
        entry: the part of the file that was taken, None for a bare dict.
        metadata: plain data beside the weights (safetensors' header; `config`, `metadata`, `args`,
            `epoch` and `class_names` of a training checkpoint).
        modules: names of the modules that wrote the dict if torch recorded them
            (`state_dict()._metadata`), else None.
        others: parts of the file that hold weights too.
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
        checked: bool = True,
    ):
        super().__init__(tensors)
        self.source = source
        self.entry = entry
        self.metadata = dict(metadata or {})
        self.modules = modules
        self.others = others
        self.checked = checked


def read_safetensors(path: Path, source: str) -> Weights:
    """All tensors and the header of a .safetensors file. Raises: CheckpointError."""
    tensors, metadata, checked = read_sealed(path)
    return Weights(strip_wrappers(tensors, source), source, metadata=metadata, checked=checked)


def unwrap(loaded: Any, source: str = "a state dict", entry: str | None = None) -> Weights:
    """Bare or wrapped dict -> Weights: finds the state dict, keeps the plain data beside it, strips
    wrappers' prefixes.

    entry: the part to take; by default the first found of ENTRIES.
    Raises: CheckpointError where there are no weights.
    """
    if isinstance(loaded, Weights):
        return loaded
    outer, taken = loaded, []
    while isinstance(loaded, Mapping) and not is_state_dict(loaded):
        wanted = None if taken else entry
        taken.append(pick_entry(loaded, source, wanted))
        loaded = loaded[taken[-1]]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(loaded).__name__}, expected a dict of tensors or {{'model':"
            " dict of tensors}"
        )
    modules = getattr(loaded, "_metadata", None)
    return Weights(
        strip_wrappers(loaded, source),
        source,
        entry=".".join(taken) or None,
        metadata={key: plain(outer[key]) for key in DESCRIPTIONS if taken and key in outer},
        modules=list(modules) if modules else None,
        others=[key for key in offered(outer) if taken and key != taken[0]],
    )


def is_state_dict(loaded: Mapping) -> bool:
    """Whether most of the values are tensors."""
    return sum(torch.is_tensor(value) for value in loaded.values()) > len(loaded) / 2


def plain(value: Any) -> Any:
    """Ordered dicts and stand-ins as plain dicts."""
    if not isinstance(value, Mapping):
        return value
    return {key: plain(inner) for key, inner in value.items()}


def offered(loaded: Mapping) -> list[str]:
    """The parts of a wrapped dict that may be weights."""
    return [key for key in ENTRIES if isinstance(loaded.get(key), Mapping) and loaded[key]]


def pick_entry(loaded: Mapping, source: str, entry: str | None) -> str:
    """The part to take. Raises: CheckpointError that says what there is."""
    if entry is None and (candidates := offered(loaded)):
        return candidates[0]
    if entry in loaded and isinstance(loaded[entry], Mapping):
        return entry
    holds = ", ".join(map(str, list(loaded)[:8])) or "nothing"
    wanted = f"no entry '{entry}'" if entry else f"no weights under {', '.join(ENTRIES)}"
    raise CheckpointError(f"{source} has {wanted}; it holds {holds}")


def strip_wrappers(state: Mapping, source: str) -> dict[str, Tensor]:
    """Removes the prefixes that every key carries, `_orig_mod.` wherever it stands, and values that
    are not tensors.
    """
    state = {
        key.replace("_orig_mod.", ""): value
        for key, value in state.items()
        if isinstance(key, str) and torch.is_tensor(value) and key != "n_averaged"
    }
    for prefix in WRAPPERS * 2:  # twice: compiled inside a wrapper, or the other way round
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if not state:
        raise CheckpointError(f"{source} holds no tensors")
    return state


def decode(value: Any) -> Any:
    """A metadata value as plain data: safetensors stores strings only, so lists arrive as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
