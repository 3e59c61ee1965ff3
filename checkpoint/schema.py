"""What a training state consists of: names, types, ranges and lengths.

    check_training(content, "last.pth")   -> CheckpointError "last.pth: progress.epoch is -1, ..."

A schema is a `Rule` for a value, or a dict of schemas for a dict with at least these names.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError

FORMAT = 1  # of the training states that this program writes


class Rule(NamedTuple):
    """What a value must be: in words, and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def whole(minimum: int, maximum: float = math.inf) -> Rule:
    """A whole number in a range."""
    limit = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
    return Rule(
        f"a whole number, {limit}",
        lambda value: type(value) is int and minimum <= value <= maximum,
    )


def number(minimum: float, maximum: float) -> Rule:
    """A finite number in a range."""
    return Rule(
        f"a number from {minimum} to {maximum}",
        lambda value: is_number(value) and minimum <= value <= maximum,
    )


def exactly(known: int | str) -> Rule:
    """One value alone, of its type."""
    return Rule(f"{known!r}", lambda value: type(value) is type(known) and value == known)


def vector(length: int | None, *dtypes: torch.dtype) -> Rule:
    """A one-dimensional tensor, of a length if one is given."""
    size = f"of {length} elements" if length else "of one dimension"
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Rule(
        f"a tensor {size} of {kinds}",
        lambda value: (
            isinstance(value, Tensor)
            and value.dtype in dtypes
            and value.dim() == 1
            and len(value) == (length or len(value))
        ),
    )


def words(length: int) -> Rule:
    """The state of a Mersenne twister: unsigned numbers of 32 bits."""
    tensor = vector(length, torch.int64)
    return Rule(
        f"{tensor.expected} from 0 to 2^32 - 1",
        lambda value: tensor.holds(value) and bool(((value >= 0) & (value < 2**32)).all()),
    )


def is_number(value: Any) -> bool:
    """A finite int, float or real tensor of one element; bool is none."""
    if isinstance(value, Tensor):
        real = value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
        return real and bool(value.isfinite())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_state_dict(value: Any) -> bool:
    """{name: tensor}, not empty."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(tensor, Tensor) for tensor in value.values())
    )


def are_names(value: Any) -> bool:
    """A list of text."""
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


TENSORS = Rule("a dict of tensors by name", is_state_dict)
TENSORS_OR_NONE = Rule(
    "a dict of tensors by name, or None", lambda v: v is None or TENSORS.holds(v)
)
MAPPING = Rule("a dict", lambda value: isinstance(value, Mapping))
LIST = Rule("a list that is not empty", lambda value: isinstance(value, list) and len(value) > 0)
TEXT = Rule("a string", lambda value: isinstance(value, str))
NAMES = Rule("a list of strings", are_names)
NUMBER = Rule("a number", is_number)
NUMBER_OR_NONE = Rule("a number or None", lambda value: value is None or is_number(value))
FROM_0 = Rule("a number, at least 0", lambda value: is_number(value) and value >= 0)
PAIR = Rule(
    "two numbers",
    lambda value: (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))
    ),
)
WHOLE_OR_NONE = Rule(
    f"{whole(0).expected}, or None", lambda value: value is None or whole(0).holds(value)
)

# The fields of engine.state.TrainState and Layout.
PROGRESS = {
    "epoch": whole(0),
    "batch": whole(0),
    "update": whole(0),
    "best": number(0, 100),
    "best_epoch": whole(-1),
}
LAYOUT = {
    "batch_size": whole(1),
    "world_size": whole(1),
    "accumulation": whole(1),
}
# utils.capture_rng on one process: Python's and NumPy's Mersenne twisters and torch's generator.
PYTHON_RNG = {
    "version": exactly(3),
    "words": words(625),
    "gauss": NUMBER_OR_NONE,
}
NUMPY_RNG = {
    "name": exactly("MT19937"),
    "keys": words(624),
    "position": whole(0, 624),
    "has_gauss": whole(0, 1),
    "cached": NUMBER,
}
RNG = {
    "python": PYTHON_RNG,
    "numpy": NUMPY_RNG,
    "torch": vector(None, torch.uint8),
}
DEVICE_RNG = {name: vector(None, torch.uint8) for name in ("cuda", "mps", "xpu")}
# The sums of engine.statistics, eight of them.
SUMS = vector(8, torch.float64, torch.float32)
OPTIMIZER = {
    "state": MAPPING,
    "param_groups": LIST,
}
# Of a parameter group, where it is there; `optimizer` is the class name.
GROUP = {
    "optimizer": TEXT,
    "lr": NUMBER,
    "weight_decay": NUMBER,
    "eps": NUMBER,
    "momentum": NUMBER,
    "betas": PAIR,
}
TRAINING = {
    "format": Rule(f"{FORMAT}", lambda value: type(value) is int and value == FORMAT),
    "model": TENSORS,
    "ema": TENSORS_OR_NONE,
    "optimizer": OPTIMIZER,
    "lr_scheduler": MAPPING,
    "scaler": MAPPING,
    "progress": PROGRESS,
    "layout": LAYOUT,
    "ranks": LIST,
}
SCHEDULER = {
    "last_update": WHOLE_OR_NONE,
    "schedule": MAPPING,
}
DESCRIPTIONS = {
    "config": MAPPING,
    "images": MAPPING,
    "metadata": MAPPING,
    "class_names": NAMES,
}
SWIN = {
    "optimizer": OPTIMIZER,
    "epoch": whole(0),
}
SWIN_OPTIONAL = {
    "max_accuracy": number(0, 100),
    "scaler": MAPPING,
}
SKIPPED = 5  # the place of the skipped updates among the sums

# What an optimizer keeps of each parameter, by the class name in `param_groups[i]["optimizer"]`.
MOMENTS = {
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Lamb": ("exp_avg", "exp_avg_sq"),
}


def check_training(content: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError, one line that names the entry, unless `content` is a whole training
    state of this program.
    """
    check(content, TRAINING, source, optional=DESCRIPTIONS)
    for name, known in (("progress", PROGRESS), ("layout", LAYOUT)):
        for field in content[name].keys() - known.keys():
            refuse(source, f"{name}.{field} is no field of this version")
    check(content["lr_scheduler"], {}, source, "lr_scheduler", optional=SCHEDULER)
    check_average(content["model"], content["ema"], source)
    check_ranks(content["ranks"], content["layout"]["world_size"], source)
    check_optimizer(content["optimizer"], source)
    check_trained(content, source)


def check_swin(content: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError unless the Swin repository's entries are as it writes them."""
    check(content, SWIN, source, optional=SWIN_OPTIONAL)
    check_optimizer(content["optimizer"], source)


def check(
    value: Any,
    schema: Rule | dict[str, Any],
    source: str,
    name: str = "",
    optional: Mapping[str, Any] | None = None,
) -> None:
    """Raises CheckpointError where `value`, the entry called `name`, differs from the schema.

    optional: schemas of entries that may be missing. Entries in neither are left alone.
    """
    if isinstance(schema, Rule):
        if not schema.holds(value):
            refuse(source, f"{name} is {shown(value)}, expected {schema.expected}")
        return
    if not isinstance(value, Mapping):
        refuse(source, f"{name} is {shown(value)}, expected a dict of {', '.join(schema)}")
    prefix = f"{name}." if name else ""
    for key in schema:
        if key not in value:
            refuse(source, f"{prefix}{key} is missing")
    for key, inner in {**schema, **(optional or {})}.items():
        if key in value:
            check(value[key], inner, source, prefix + key)


def check_average(model: Mapping[str, Tensor], ema: Mapping | None, source: str) -> None:
    """The averaged weights have the names and shapes of the weights."""
    if ema is None:
        return
    for name in sorted(model.keys() | ema.keys()):
        if name not in ema or name not in model:
            refuse(source, f"{name} is in only one of model and ema, expected in both")
        if ema[name].shape != model[name].shape:
            shape = tuple(model[name].shape)
            refuse(source, f"ema.{name} is {shown(ema[name])}, that of model is {shape}")


def check_ranks(ranks: list[Any], world_size: int, source: str) -> None:
    """Random states and sums of every process."""
    if len(ranks) != world_size:
        refuse(source, f"ranks has {len(ranks)} entries, layout.world_size is {world_size}")
    for index, rank in enumerate(ranks):
        name = f"ranks[{index}]"
        check(rank, {"rng": MAPPING, "tally": SUMS}, source, name)
        check(rank["rng"], RNG, source, f"{name}.rng", optional=DEVICE_RNG)


def check_optimizer(optimizer: Mapping[str, Any], source: str) -> None:
    """Groups number their parameters 0, 1, ...; what is kept of a parameter is whole."""
    numbers = []
    for index, group in enumerate(optimizer["param_groups"]):
        name = f"optimizer.param_groups[{index}]"
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            refuse(source, f"{name} is {shown(group)}, expected a dict with a list of params")
        check(group, {}, source, name, optional=GROUP)
        numbers += group["params"]
    if numbers != list(range(len(numbers))):
        refuse(source, "optimizer.param_groups do not number their params 0, 1, 2, ...")
    for index in optimizer["state"].keys() - set(numbers):
        refuse(source, f"optimizer.state[{index}] is of no parameter of param_groups")
    for group in optimizer["param_groups"]:
        for index in group["params"]:
            if index in optimizer["state"]:  # not there: it never had a gradient
                check_moments(optimizer["state"][index], group, source, f"optimizer.state[{index}]")


def check_moments(kept: Any, group: Mapping[str, Any], source: str, name: str) -> None:
    """What the optimizer keeps of one parameter."""
    if not isinstance(kept, Mapping):
        refuse(source, f"{name} is {shown(kept)}, expected a dict")
    names = moments(kept, group)
    for moment in names:
        if moment not in kept:
            refuse(source, f"{name}.{moment} is missing")
        if moment == "step":
            check(kept[moment], FROM_0, source, f"{name}.step")
        elif not isinstance(kept[moment], Tensor):
            refuse(source, f"{name}.{moment} is {shown(kept[moment])}, expected a tensor")
    if len({kept[moment].shape for moment in names if moment != "step"}) > 1:
        refuse(source, f"{name} holds {', '.join(names)} of different shapes")


def moments(kept: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that must be there; () for an optimizer that is not known here."""
    kind = group.get("optimizer")
    if kind == "SGD":
        return ("momentum_buffer",) if group.get("momentum") else ()
    if kind == "Muon":
        return ("momentum_buffer",) if kept.get("use_muon") else MOMENTS["AdamW"]
    return MOMENTS.get(kind, ())


def check_trained(content: Mapping[str, Any], source: str) -> None:
    """After updates that were not skipped, an optimizer with momentum keeps something."""
    optimizer = content["optimizer"]
    updates = content["progress"]["update"] - int(content["ranks"][0]["tally"][SKIPPED])
    remembers = any(
        group.get("betas") or group.get("momentum") for group in optimizer["param_groups"]
    )
    if updates > 0 and remembers and not optimizer["state"]:
        refuse(source, f"optimizer.state is empty after {updates} updates")


def refuse(source: str, problem: str) -> None:
    """Raises CheckpointError."""
    raise CheckpointError(
        f"checkpoint {source}: {problem}; resume from another checkpoint, or start from the weights"
        " of this one with --pretrained"
    )


def shown(value: Any) -> str:
    """A value in a few words, for an error."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (Mapping, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:60]
