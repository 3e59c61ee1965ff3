"""Where the weights of one network lie in a file: the entry, and the prefix of its names.

Training code saves a network under a name of its own ("state_dict", "module", "params"), wrapped
("_orig_mod.", "backbone."), beside averages, teachers and losses. One network is taken; which one
is said, and where that is not clear the user chooses.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError, list_keys

# Names of the part with the trained weights, most usual first.
TRAINED = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "params",
    "module",
    "network",
    "net",
    "weights",
    "model_weights",
    "backbone",
    "online_model",
    "student",
)
# Names of a second network that follows or teaches the trained one.
COPIES = (
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "params_ema",
    "ema",
    "ema_model",
    "ema_network",
    "ema_net",
    "momentum_encoder",
    "teacher",
)
ENTRIES = TRAINED + COPIES
# Components that wrappers put anywhere into a name: DistributedDataParallel and DeepSpeed,
# torch.compile, FSDP, activation checkpointing.
WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
# What training code keeps beside the network in one state dict.
APPARATUS = re.compile(r"^(criterion|loss|loss_\w+|\w+_loss|\w+_criterion|\w*metrics?|\w+_acc)\.")
DEPTH = 8  # of wrapped entries and prefixes


class Network(NamedTuple):
    """The weights of one network.

    tensors: under their names in the network.
    outside: names among them that stood beside the network's prefix.
    others: other networks beside it, by the name to choose them.
    """

    tensors: dict[str, Tensor]
    outside: list[str]
    others: list[str]


def is_state_dict(loaded: object) -> bool:
    """Whether this is a dict most values of which are tensors."""
    if not isinstance(loaded, Mapping) or not loaded:
        return False
    return sum(torch.is_tensor(value) for value in loaded.values()) > len(loaded) / 2


def offered(loaded: Mapping) -> list[str]:
    """The parts of a wrapped dict that may be weights: those of the usual names, else any dict of
    tensors.
    """
    usual = [key for key in ENTRIES if isinstance(loaded.get(key), Mapping) and loaded[key]]
    if any(key in TRAINED for key in usual):
        return usual
    states = [key for key in loaded if isinstance(key, str) and is_state_dict(loaded[key])]
    if not usual:
        return states
    # of copies alone: what they are copies of may go by any name
    large = [key for key in states if 2 * len(loaded[key]) > len(loaded[usual[0]])]
    return usual + [key for key in large if key not in usual]


def pick_entry(loaded: Mapping, source: str) -> str:
    """The part to take. Raises: CheckpointError that says what there is, and where it is not clear
    which of several is meant.
    """
    candidates = offered(loaded)
    if not candidates:
        holds = list_keys(map(repr, loaded), limit=8).replace("'", "") or "nothing"
        raise CheckpointError(
            f"{source} has no weights under {', '.join(ENTRIES[:6])} or another usual name; it"
            f" holds {holds}"
        )
    return choose(candidates, source)


def is_clear(names: list[str]) -> bool:
    """Whether the trained network among several is known by its name: of student and teacher either
    may be meant.
    """
    known = set(names) <= set(ENTRIES) and names[:1] != ["student"]
    return len(names) == 1 or (known and bool(names))


def choose(names: list[str], source: str, within: bool = False) -> str:
    """The trained network among several entries of a file or, `within` one, prefixes of names.
    Raises: CheckpointError where that is not clear.
    """
    trained = [name for name in names if name in TRAINED]
    if is_clear(names) and (len(trained) < 2 or not within):
        return (trained or names)[0]
    raise CheckpointError(
        f"{source} holds several networks: {list_keys(names, limit=12)}; choose one with"
        " MODEL.ENTRY"
    )


def without_wrappers(state: Mapping, source: str) -> dict[str, Tensor]:
    """The tensors of a state dict, without the components that wrappers put into names."""
    kept: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not torch.is_tensor(value) or key == "n_averaged":
            continue
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        add(kept, name or key, value, source)
    if not kept:
        raise CheckpointError(f"{source} holds no tensors")
    return kept


def find_network(state: dict[str, Tensor], source: str) -> Network:
    """Removes the prefixes under which training code keeps its network, as deep as they go."""
    outside, others, path = {}, [], ""
    for _ in range(DEPTH):
        groups = prefixes(state)
        if not groups:
            break
        root = choose(groups, source, within=True)
        others += [path + group for group in groups if group != root]
        state = {
            key: value
            for key, value in state.items()
            if key.partition(".")[0] not in groups or key.startswith(f"{root}.")
        }
        beside = {key: value for key, value in state.items() if not key.startswith(f"{root}.")}
        state, outside = prefixed(state, root), outside | beside
        for key, value in beside.items():
            add(state, key, value, source, f"; choose one with MODEL.ENTRY, such as {path}{root}")
        path += f"{root}."
    outside |= {key: value for key, value in state.items() if APPARATUS.match(key)}
    return Network(state, list(outside), others)


def prefixes(state: Iterable[str]) -> list[str]:
    """The first components under which whole networks lie, in the order of ENTRIES; beside copies
    (COPIES) alone, also one of another name that holds the same.
    """
    inside: dict[str, set[str]] = {}
    count = 0
    for key in state:
        root, dot, rest = key.partition(".")
        count += 1
        if dot:
            inside.setdefault(root, set()).add(rest)
    found = [
        root
        for root in ENTRIES
        if root in inside and is_network(inside[root], len(inside[root]) == count)
    ]
    if not found or any(root in TRAINED for root in found):
        return found
    # of copies alone: what they are copies of may go by any name
    return found + [root for root in inside if root not in found and alike(inside, root, found[0])]


def alike(inside: Mapping[str, set[str]], one: str, other: str) -> bool:
    """Whether most names under a prefix are names under the other too."""
    return 2 * len(inside[one] & inside[other]) > max(len(inside[one]), len(inside[other]))


def is_network(names: set[str], alone: bool) -> bool:
    """Whether names without their first component are those of a network, not of one of its parts:
    several children, or one that is such a prefix itself; never numbers, as in a list of layers.
    """
    children = {name.partition(".")[0] for name in names}
    if any(child.isdigit() for child in children):
        return False
    return alone or len(children) > 1 or bool(children & set(ENTRIES))


def prefixed(state: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
    """What lies under a prefix, without it."""
    start = f"{root}."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def add(state: dict, key: str, value: Tensor, source: str, hint: str = "") -> None:
    """Adds an entry. Raises: CheckpointError where its name is taken."""
    if key in state:
        raise CheckpointError(
            f"{source}: two tensors are called {key!r} once wrappers' prefixes are removed{hint}"
        )
    state[key] = value
