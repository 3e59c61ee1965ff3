"""What a training state consists of: names, types, ranges and lengths.

    check_training(content, "last.pth")   -> CheckpointError "last.pth: progress.epoch is -1, ..."

A schema is a `Rule` for a value, or a dict of schemas for a dict with at least these names.
"""

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError, first_line
from .soundness import check_finite, check_form, odd_form

MOST = 10**15  # of anything that is counted
EPOCHS = 10**6
FORMAT = 1  # of the training states that this program writes


class Rule(NamedTuple):
    """What a value must be: in words, and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def whole(minimum: int, maximum: int = MOST) -> Rule:
    """A whole number in a range."""
    limit = f"at least {minimum}" if maximum == MOST else f"from {minimum} to {maximum}"
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
            and not odd_form(value)
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
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 10**300


def is_state_dict(value: Any) -> bool:
    """{name: tensor}, not empty."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(tensor, Tensor) for tensor in value.values())
    )


def is_settings(value: Any) -> bool:
    """Text, numbers and None, in dicts and lists."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_settings(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_settings, value))
    return value is None or isinstance(value, (str, int, float))


def are_names(value: Any) -> bool:
    """A list of text."""
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


TENSORS = Rule("a dict of tensors by name", is_state_dict)
TENSORS_OR_NONE = Rule(
    "a dict of tensors by name, or None", lambda v: v is None or TENSORS.holds(v)
)
MAPPING = Rule("a dict", lambda value: isinstance(value, Mapping))
SETTINGS = Rule("a dict of plain data", lambda v: isinstance(v, Mapping) and is_settings(v))
LIST = Rule("a list that is not empty", lambda value: isinstance(value, list) and len(value) > 0)
TEXT = Rule("a string", lambda value: isinstance(value, str))
NAMES = Rule("a list of strings", are_names)
NUMBER = Rule("a number", is_number)
NUMBER_OR_NONE = Rule("a number or None", lambda value: value is None or is_number(value))
ABOVE_0 = Rule("a number above 0", lambda value: is_number(value) and value > 0)
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
    "epoch": whole(0, EPOCHS),
    "batch": whole(0),
    "update": whole(0),
    "best": number(0, 100),
    "best_epoch": whole(-1, EPOCHS),
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
SCALER = {
    "scale": ABOVE_0,
    "growth_factor": ABOVE_0,
    "backoff_factor": ABOVE_0,
    "growth_interval": whole(1),
    "_growth_tracker": whole(0),
}
SCHEDULER = {
    "last_update": WHOLE_OR_NONE,
    "schedule": SETTINGS,
}
DESCRIPTIONS = {
    "config": SETTINGS,
    "images": MAPPING,
    "metadata": SETTINGS,
    "class_names": NAMES,
    "logs": MAPPING,
}
SWIN = {
    "optimizer": OPTIMIZER,
    "epoch": whole(0, EPOCHS),
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
    with refusing_oddities(source):
        check_entries(content, source)


@contextmanager
def refusing_oddities(source: str) -> Iterator[None]:
    """Turns what values of unforeseen types raise when they are looked at into a refusal."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        refuse(source, f"its structure is not that of a training state ({first_line(e)})")


def check_entries(content: Mapping[str, Any], source: str) -> None:
    """All of it but the numbers in large tensors."""
    check(content, TRAINING, source, optional=DESCRIPTIONS)
    for name, known in (("progress", PROGRESS), ("layout", LAYOUT)):
        for field in content[name].keys() - known.keys():
            refuse(source, f"{name}.{str(field)[:40]} is no field of this version")
    if content["progress"]["best_epoch"] > content["progress"]["epoch"]:
        best, epoch = content["progress"]["best_epoch"], content["progress"]["epoch"]
        refuse(source, f"progress.best_epoch is {best}, but progress.epoch {epoch}")
    for entry in ("model", "ema"):
        check_form(content[entry] or {}, f"checkpoint {source}: {entry}")
    check(content["scaler"], {}, source, "scaler", optional=SCALER)
    check(content["lr_scheduler"], {}, source, "lr_scheduler", optional=SCHEDULER)
    check_average(content["model"], content["ema"], source)
    check_ranks(content["ranks"], content["layout"]["world_size"], source)
    check_optimizer(content["optimizer"], source)
    check_steps(content["optimizer"], source)
    check_trained(content, source)


def check_swin(content: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError unless the Swin repository's entries are as it writes them."""
    with refusing_oddities(source):
        check(content, SWIN, source, optional=SWIN_OPTIONAL)
        check_optimizer(content["optimizer"], source)
        check_steps(content["optimizer"], source)
        check_kept(content["optimizer"], f"{content['epoch'] + 1} epochs", source)
        check_moment_numbers(content["optimizer"], source)


def check_numbers(content: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError where the weights or the moments of a training state are not numbers;
    reads all of its tensors.
    """
    for entry in ("model", "ema"):
        check_finite(content[entry] or {}, f"checkpoint {source}: {entry}")
    check_moment_numbers(content["optimizer"], source)


def check_moment_numbers(optimizer: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError where a moment is not a number."""
    for index, kept in optimizer["state"].items():
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        check_finite(tensors, f"checkpoint {source}: optimizer.state[{index}]")


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


def check_steps(optimizer: Mapping[str, Any], source: str) -> None:
    """Every update steps most parameters: none alone has had more steps than all others."""
    state = optimizer["state"]
    steps = {index: float(kept["step"]) for index, kept in state.items() if "step" in kept}
    for index, step in steps.items():
        if step != int(step):
            refuse(source, f"optimizer.state[{index}].step is {step}, expected a whole number")
    most = max(steps.values(), default=0)
    ahead = [index for index, step in steps.items() if step == most]
    if len(ahead) == 1 < len(steps) - 1:
        refuse(source, f"optimizer.state[{ahead[0]}].step is {most:g}, that of all others is less")


def check_moments(kept: Any, group: Mapping[str, Any], source: str, name: str) -> None:
    """What the optimizer keeps of one parameter."""
    if not isinstance(kept, Mapping):
        refuse(source, f"{name} is {shown(kept)}, expected a dict")
    names = moments(kept, group)
    if not kept and remembers(group):
        refuse(source, f"{name} is empty")
    check_form({key: value for key, value in kept.items() if isinstance(value, Tensor)}, name)
    for moment in names:
        if moment not in kept:
            refuse(source, f"{name}.{moment} is missing")
        if moment == "step":
            check(kept[moment], FROM_0, source, f"{name}.step")
        elif not isinstance(kept[moment], Tensor) or not kept[moment].is_floating_point():
            refuse(
                source,
                f"{name}.{moment} is {shown(kept[moment])}, expected a tensor of real numbers",
            )
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
    if updates > 0:
        check_kept(optimizer, f"{updates} updates", source)


def check_kept(optimizer: Mapping[str, Any], after: str, source: str) -> None:
    """An optimizer with momentum has kept something of a training."""
    if any(map(remembers, optimizer["param_groups"])) and not optimizer["state"]:
        refuse(source, f"optimizer.state is empty after {after}")


def remembers(group: Mapping[str, Any]) -> bool:
    """Whether the optimizer keeps something of each parameter of a group."""
    return bool(group.get("betas") or group.get("momentum"))


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
    text = reprlib.repr(value) if isinstance(value, (str, bytes, int, float)) else repr(value)
    return " ".join(text.split())[:60]
