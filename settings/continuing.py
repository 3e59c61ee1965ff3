"""Whether a run may go on from a checkpoint with the settings and images that it now has."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.state import Layout
from models import BACKBONES
from registry import parse_call
from settings.kinds import ConfigError, show

# Each setting is in one class. A name that ends in "." stands for the section.
# They leave the result as it is: places, speed, logs, what is kept. Of the batch, the images per
# update count.
FREE = (
    "BASE",
    "OUTPUT",
    "TAG",
    "MODEL.NAME",
    "LOCAL_RANK",
    "MODEL.MATCH_CLASSES",
    "EVAL_MODE",
    "THROUGHPUT_MODE",
    "SAVE_FREQ",
    "PRINT_FREQ",
    "LOG.",
    "DATA.BATCH_SIZE",
    "DATA.DATA_PATH",
    "DATA.DOWNLOAD",
    "DATA.ZIP_MODE",
    "DATA.CACHE_MODE",
    "DATA.PIN_MEMORY",
    "DATA.NUM_WORKERS",
    "DATA.TIMEOUT",
    "DATA.CORRUPT_LIMIT",
    "TEST.SEQUENTIAL",
    "TEST.SHUFFLE",
    "TEST.PER_CLASS",
    "TRAIN.ACCUMULATION_STEPS",
    "TRAIN.AUTO_RESUME",
    "TRAIN.RESUME_CHANGED",
    "TRAIN.SAVE_STEPS",
    "TRAIN.KEEP",
    "TRAIN.MAX_NONFINITE",
    "TRAIN.THREADS",
    "TRAIN.GROUP_TIMEOUT",
    "TRAIN.CHECK_RANKS",
    # without effect
    "DATA.MASK_PATCH_SIZE",
    "DATA.MASK_RATIO",
    "MODEL.SIMMIM.",
    "ENABLE_AMP",
    "AMP_OPT_LEVEL",
    "FUSED_WINDOW_PROCESS",
    "FUSED_LAYERNORM",
)
# How long a run is.
LENGTH = ("TRAIN.EPOCHS", "TRAIN.MAX_STEPS")
# How the same numbers are computed, up to rounding.
NUMERICS = (
    "DEVICE",
    "MODEL.COMPILE",
    "MODEL.CHANNELS_LAST",
    "MODEL.ATTENTION.BACKEND",
    "TRAIN.USE_CHECKPOINT",
    "TRAIN.DETERMINISTIC",
)
# What a run starts from.
START = (
    "MODEL.PRETRAINED",
    "MODEL.RESUME",
    "MODEL.ENTRY",
    "MODEL.HEAD_RESET",
    "MODEL.PARTIAL_LOAD",
    "MODEL.SOURCE",
    "MODEL.INIT_OVER_PRETRAINED",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.ATTENTION.LOGIT_SCALE_INIT",
    "TRAIN.START_EPOCH",
)
# How it learns: the function of trained weights is the same.
RECIPE = (
    "SEED",
    "AMP_ENABLE",
    "AMP_DTYPE",
    "AUG.",
    "TRAIN.",
    "DATA.INTERPOLATION",
    "DATA.CROP_RATIO",
    "DATA.REPEATED_AUG",
    "TEST.CROP",
    "MODEL.DROP_RATE",
    "MODEL.DROP_PATH_RATE",
    "MODEL.DROP_PATH_PROFILE",
    "MODEL.ATTENTION.DROP",
    "MODEL.PRE_MLP.DROP_PATH",
    "MODEL.LABEL_SMOOTHING",
    "MODEL.BN_MOMENTUM",
    "MODEL.EMA.",
)
# The function that weights stand for, and the images.
FUNCTION = ("DATA.DATASET", "DATA.IMG_SIZE", "DATA.MEAN", "DATA.STD", "MODEL.")
CLASSES = {  # the first that knows a key counts
    "free": FREE,
    "length": LENGTH,
    "numerics": NUMERICS,
    "start": START,
    "recipe": RECIPE,
    "function": FUNCTION,
}
# Differences that loading compares or converts by itself, or that change nothing of what was
# trained.
BY_LOADING = (
    "MODEL.NUM_CLASSES",
    "MODEL.DYNAMIC_IMG_SIZE",
    "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES",
)
MODIFIERS = "MODEL.ATTENTION.MODIFIERS"
NETWORK = "network"  # in the header of weights files
PATHS = ("MODEL.PRETRAINED", "TRAIN.DISTILL.TEACHER", "TRAIN.DISTILL.TEACHER_WEIGHTS")
SHOWN = 8  # differences that an error names


class Change(NamedTuple):
    """A difference between a checkpoint's run and this one: its class, and how to say it."""

    kind: str
    text: str


class Run(NamedTuple):
    """What makes a run this one and no other.

    config: plain nested settings.
    images: `data.build.Data.fingerprints`.
    layout: how the images of an update are spread.
    """

    config: Mapping[str, Any]
    images: Mapping[str, str]
    layout: Layout


def check_continuing(
    saved: Run,
    now: Run,
    *,
    folder: str | os.PathLike,
    source: str | os.PathLike,
    finished: bool,
    consent: bool,
    defaults: Mapping[str, Any],
) -> list[str]:
    """Refuses what would give another run's result as this one's, or an unmeant mixture of both.

    A finished run must have had every setting that could have changed its result, longer limits
    apart. An unfinished one in the run's own folder goes on with others, and one that is named by
    --resume with another function or other images, where `consent` is given.

    Args:
        folder: the run's. source: the checkpoint's file.
        finished: no update follows.
        defaults: of all keys; what a key that a checkpoint does not know had been.
    Returns: what differs, in words, and is used from here on.
    Raises: ConfigError.
    """
    found = list(changes(saved, now, Path(folder), defaults))
    own = Path(source).resolve().parent == Path(folder).resolve()
    explicit = now.config["MODEL"]["RESUME"]
    named = bool(explicit) and (not own or _absolute(explicit) == _absolute(os.fspath(source)))
    if named and not own:  # what another folder's run started from
        found = [change for change in found if change.kind != "start"]
    if finished:
        wrong = [change for change in found if change.kind not in ("free", "longer")]
        _refuse_finished(wrong, folder if own else source)
        return []
    binding = ("function", "images") if named else ("function", "images", "recipe", "start")
    wrong = [change for change in found if change.kind in binding]
    if wrong and not consent:
        _refuse(wrong, folder, source, named)
    return [change.text for change in found if change.kind != "free"]


def check_evaluated(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    source: str | os.PathLike,
    consent: bool,
    defaults: Mapping[str, Any],
) -> list[str]:
    """Refuses to evaluate a training state as another network than it was trained as: parameters
    may fit that compute something else. How large the images are is left to the parameters.

    saved, now: plain nested settings; nothing is compared where none were saved.
    Returns: what differs, in words, where `consent` is given. Raises: ConfigError.
    """
    layout = Layout(1, 1, 1)
    found = [
        change.text
        for change in changes(Run(saved, {}, layout), Run(now, {}, layout), Path(), defaults)
        if change.kind == "function"
        and change.text.startswith("MODEL.")
        and change.text.partition(":")[0] not in BY_LOADING
    ]
    lists = [_look_up(config, MODIFIERS, []) for config in (saved, now)]
    if _that_count(lists[0]) == _that_count(lists[1]):
        found = [text for text in found if not text.startswith(f"{MODIFIERS}:")]
    if found and not consent:
        raise ConfigError(
            f"{source} was trained as another network ({_some(found)}); evaluate it with the"
            " settings of its training, or add --resume-changed to evaluate it as this command says"
        )
    return found


def describe_network(config: Mapping[str, Any]) -> dict[str, str]:
    """For the header of weights files: the settings that `check_evaluated` compares, as JSON."""
    function: dict[str, Any] = {}
    for key, value in _leaves(config):
        if key.startswith("MODEL.") and class_of(key) == "function" and key not in BY_LOADING:
            *sections, name = key.split(".")
            node = function
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
    return {NETWORK: json.dumps(function)}


def network_in(metadata: Mapping[str, Any]) -> Any:
    """What `describe_network` wrote; None where a file says nothing."""
    try:
        return json.loads(metadata.get(NETWORK) or "null")
    except (TypeError, ValueError, RecursionError):
        return None


def _calls(modifiers: Any) -> Any:
    """Each modifier's name and options; as it is what is no list of these."""
    try:
        return [parse_call(text) for text in modifiers]
    except (TypeError, ValueError, AttributeError):
        return modifiers


def _that_count(modifiers: Any) -> Any:
    """Modifiers without those that loading converts, or that only set initial values."""
    calls = _calls(modifiers)
    if calls is modifiers:
        return modifiers
    return [
        (name, options)
        for name, options in calls
        if name != "init_identity" and (name != "qk_residual" or options.get("drop_bias"))
    ]


def changes(saved: Run, now: Run, folder: Path, defaults: Mapping[str, Any]) -> Iterator[Change]:
    """Every difference, classified; settings of other families than the run's count for nothing."""
    family = now.config["MODEL"]["TYPE"].upper()
    others = tuple(f"MODEL.{name.upper()}." for name in BACKBONES if name.upper() != family)
    for key, new in _leaves(now.config):
        if key.startswith(others) or not saved.config:
            continue
        old = _look_up(saved.config, key, _plain(defaults.get(key)))
        if not _same(key, old, new, folder):
            kind = "longer" if key in LENGTH and _longer(old, new) else class_of(key)
            yield Change(kind, f"{key}: {show(old)} -> {show(new)}")
    for split in now.images.keys() & saved.images.keys():
        if saved.images[split] != now.images[split]:
            text = f"{split} images: {show(saved.images[split])} -> {show(now.images[split])}"
            yield Change("images", text)
    if saved.layout.images != now.layout.images:
        yield Change("recipe", f"an update: {saved.layout} -> {now.layout}")


def class_of(key: str) -> str:
    """The class of a key."""
    for kind, names in CLASSES.items():
        if any(key == name or (name.endswith(".") and key.startswith(name)) for name in names):
            return kind
    raise KeyError(key)


def _refuse_finished(found: Iterable[Change], place: Any) -> None:
    lines = [change.text for change in found]
    if lines:
        raise ConfigError(
            f"{place} holds a finished run with other settings ({_some(lines)}): nothing is left to"
            " train, and its result is not that of this command; give this run another --tag"
        )


def _refuse(found: Iterable[Change], folder: Any, source: Any, named: bool) -> None:
    what = _some([change.text for change in found])
    if named:
        raise ConfigError(
            f"--resume {source} comes from another network or other images ({what}); start from"
            " its weights with --pretrained, or add --resume-changed to go on with what this"
            " command says"
        )
    raise ConfigError(
        f"{folder} holds a run with other settings ({what}); give this run another"
        " --tag, or add --resume-changed to go on with what this command says"
    )


def _some(lines: list[str]) -> str:
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


def _same(key: str, old: Any, new: Any, folder: Path) -> bool:
    if key == "MODEL.RESUME":
        old, new = (_outside(path, folder) for path in (old, new))
    if key in PATHS or key == "MODEL.RESUME":
        return old == new or _absolute(old) == _absolute(new)
    if key == MODIFIERS:
        old, new = _calls(old), _calls(new)
    return isinstance(old, bool) == isinstance(new, bool) and old == new


def _longer(old: Any, new: int) -> bool:
    """Whether a limit is further off; 0 is none (TRAIN.MAX_STEPS)."""
    return isinstance(old, int) and bool(old) and (not new or new > old)


def _outside(path: Any, folder: Path) -> Any:
    """A checkpoint of the run's own folder is no other start."""
    inside = isinstance(path, str) and path and Path(_absolute(path)).parent == folder.absolute()
    return "" if inside else path


def _absolute(path: Any) -> Any:
    if not isinstance(path, str) or not path or "://" in path:
        return path
    return os.path.abspath(os.path.expanduser(path))


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _look_up(config: Mapping[str, Any], key: str, default: Any) -> Any:
    node: Any = config
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return default
        node = node[name]
    return node


def _plain(value: Any) -> Any:
    """As `to_dict` writes it."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
