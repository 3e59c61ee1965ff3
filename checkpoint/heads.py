"""Class heads of other data sets: 22k -> 1k, other class counts, and the class order of released
22k heads.
"""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, check_option

CLASSES_1K, CLASSES_22K, SYNSETS_21K = 1000, 21841, 21843
MODES = ("auto", "reset", "keep", "evaluate")
# Teddy bear, n04399382: not in the 21k list. Swin's map has 5564 here, n03013580 "chemise,
# ..., teddy": it matched the lemma. Kept so that released recipes give the same numbers; the row
# can only matter before fine-tuning.
TEDDY_1K, TEDDY_22K = 850, 5564
MAP_DIGEST = (  # SHA-256 of the map, comma-separated
    "f13a699f4700a41e9b5c942096975bcffd36c071f390c71bdf8ec62c2a8ee0ca"
)
# The 21k list has two synsets without images; the released heads put its last two entries into
# their places.
MOVED = {9205: 21841, 15027: 21842}


@cache
def map_22k_to_1k() -> tuple[int, ...]:
    """Row of a released 21841-class head for each of the 1000 ImageNet-1k classes, from the synset
    lists that timm carries.

    Raises: CheckpointError if the installed timm has other lists.
    """
    rows = {
        synset: row
        for row, synset in enumerate(synsets("imagenet21k_goog_synsets.txt", SYNSETS_21K))
    }
    mapped = tuple(
        rows.get(synset, TEDDY_22K) for synset in synsets("imagenet_synsets.txt", CLASSES_1K)
    )
    if hashlib.sha256(",".join(map(str, mapped)).encode()).hexdigest() != MAP_DIGEST:
        raise CheckpointError(
            "timm's synset lists differ from those the 22k to 1k map was derived from; install"
            " timm 1.0"
        )
    return mapped


@cache
def synsets_22k() -> tuple[str, ...]:
    """WordNet id of each class of a released Swin 22k head, 21841 in order. timm's own names for
    21841 classes are another order.
    """
    names = synsets("imagenet21k_goog_synsets.txt", SYNSETS_21K)
    for place, source in MOVED.items():
        names[place] = names[source]
    return tuple(names[:CLASSES_22K])


def synsets(name: str, count: int) -> list[str]:
    """Lines of one of timm's lists, read without importing timm (seconds)."""
    spec = find_spec("timm")
    if spec is None:
        raise CheckpointError("mapping a 22k head to 1k needs timm's class lists: pip install timm")
    path = Path(spec.submodule_search_locations[0]) / "data" / "_info" / name
    names = path.read_text().split() if path.exists() else []
    if len(names) != count:
        raise CheckpointError(
            f"{path} has {len(names)} entries, expected {count}; install timm 1.0"
        )
    return names


def fit_head(
    state: dict[str, Tensor], classes: int, mode: str = "auto", layer: str = "head"
) -> tuple[dict[str, Tensor], str]:
    """Fits the weight (K, C) and bias (K) of a `layer` to `classes` classes, by Swin's rules.

    Args:
        mode: 'auto' keeps a head of the same size, picks the 1k rows of a 22k head, and sets any
            other to zero; 'reset' always sets it to zero; 'keep' demands the same size. Without a
            head in the file the model keeps its own. 'evaluate' refuses every case in which the
            head would not come from the file.
    Returns: (state, note or '').
    Raises: CheckpointError.
    """
    check_option("head", mode, MODES)
    names = [key for key in (f"{layer}.weight", f"{layer}.bias") if key in state]
    if mode == "evaluate" and classes and not names:
        return state, ""  # missing, which `load_weights` refuses
    if not names or not classes:
        return without(state, names), head_absent(names, classes)
    given = len(state[names[0]])
    if given == classes and mode != "reset":
        return state, ""
    sizes = f"the file's head has {given} classes, the model {classes}"
    mappable = (given, classes) == (CLASSES_22K, CLASSES_1K)
    if mode == "keep":
        raise CheckpointError(f"{sizes}; set MODEL.NUM_CLASSES {given} or head='auto'")
    if mode == "evaluate" and not mappable:
        raise CheckpointError(f"{sizes}; evaluate it on the data set it was trained for")
    if mappable and mode != "reset":
        rows = torch.tensor(map_22k_to_1k())
        mapped = {key: state[key][rows] for key in names}
        return state | mapped, "the head of 21841 classes was mapped to the 1000 of ImageNet-1k"
    note = f"{sizes}: the head starts at zero"
    if mode == "reset":
        note = f"the head starts anew at zero ({classes} classes), as asked"
    return zeroed(state, names, classes), note


def head_absent(names: list[str], classes: int) -> str:
    if classes:
        return "the file has no head: the model keeps its own"
    return "the model has no head: the file's is left out" if names else ""


def zeroed(state: dict[str, Tensor], names: list[str], classes: int) -> dict[str, Tensor]:
    return state | {key: state[key].new_zeros(classes, *state[key].shape[1:]) for key in names}


def without(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in names}
