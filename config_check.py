"""What a configuration value may be: kinds (a conversion, and the words an error quotes) and rules
between several keys.

Nothing here knows a key's default or where a value came from; config.py joins the two. A kind
converts a value as written (YAML, --opts or flag) into the value the program uses, or raises
ValueError; where a number is meant, strings are read as Python literals, so 1e-8, '1e-8' and '(224,
448)' all do, and a whole number stands for a float.
"""

from __future__ import annotations

import ast
import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line and says what was given, what is
    allowed and how to mend it.
    """


@dataclass(frozen=True)
class Kind:
    """The values a key takes: `allowed` in words, `convert` (raises ValueError), and `choices` to
    look for the nearest spelling in.
    """

    allowed: str
    convert: Callable[[Any], Any]
    choices: tuple[str, ...] = ()


_SHOW = reprlib.Repr()
_SHOW.maxstring, _SHOW.maxother, _SHOW.maxlist, _SHOW.maxtuple, _SHOW.maxdict, _SHOW.maxlevel = (
    200,
    200,
    12,
    12,
    4,
    3,
)


def show(value: Any) -> str:
    """The value as Python writes it, on one line and of bounded length."""
    return _SHOW.repr(value)


def literal(value: Any) -> Any:
    """A string as the Python literal it spells ('1e-8' -> 1e-08, 'None' -> None); everything else
    unchanged.
    """
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError):
        return value


def switch() -> Kind:
    """True or False; 'true' and 'false' too, since that is how YAML spells them."""

    def convert(value: Any) -> bool:
        value = (
            {"true": True, "false": False}.get(value.strip().lower(), value)
            if isinstance(value, str)
            else value
        )
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Kind("True or False", convert)


def _interval(low: float, high: float, ends: str) -> str:
    if high == math.inf:
        return "" if low == -math.inf else f" {'>=' if ends[0] == '[' else '>'} {low:g}"
    return f" in {ends[0]}{low:g}, {high:g}{ends[1]}"


def number(low: float = -math.inf, high: float = math.inf, ends: str = "[]") -> Kind:
    """A finite float between `low` and `high`; `ends` as in mathematics: '[' and ']' include the
    end, '(' and ')' do not.
    """

    def convert(value: Any) -> float:
        value = literal(value)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise ValueError
        above = value >= low if ends[0] == "[" else value > low
        below = value <= high if ends[1] == "]" else value < high
        if not (above and below):
            raise ValueError
        return float(value)

    return Kind("a number" + _interval(low, high, ends), convert)


def integer(low: float = -math.inf, high: float = math.inf) -> Kind:
    """A whole number, `low` and `high` included."""

    def convert(value: Any) -> int:
        value = literal(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return Kind("a whole number" + _interval(low, high, "[]"), convert)


def text(pattern: str = "", allowed: str = "text", empty: str | None = "") -> Kind:
    """A string, matched whole by `pattern` if one is given; None and '' stand for `empty`, unless
    that is None itself.

    Where `empty` is a word, such as 'none', False stands for it too: YAML reads a bare off as
    False.
    """

    def convert(value: Any) -> str:
        if empty is not None and (value in (None, "None", "") or (value is False and empty)):
            return empty
        if not isinstance(value, str) or (pattern and not re.fullmatch(pattern, value)):
            raise ValueError(
                "quote it, so that YAML reads text" if isinstance(value, (int, float)) else ""
            )
        return value

    return Kind(allowed, convert)


def choice(
    *names: str, pattern: str = "", also: str = "", refused: dict[str, str] | None = None
) -> Kind:
    """One of `names`, in any case, or a string matching `pattern` (`also` in words); `refused`
    gives the reason a known name is no choice.

    YAML 1.1 reads a bare off, no or null as False or None; where the choice has such a name, it is
    meant.
    """
    folded = {name.lower(): name for name in names}
    unquoted = {False: ("off", "no"), None: ("none",)}

    def convert(value: Any) -> str:
        if value is False or value is None:
            value = next((name for name in unquoted[value] if name in names), value)
        if not isinstance(value, str):
            raise ValueError
        if value.lower() in folded:
            return folded[value.lower()]
        if pattern and re.fullmatch(pattern, value, re.IGNORECASE):
            return value.lower()
        raise ValueError((refused or {}).get(value.lower(), ""))

    return Kind(
        ", ".join(name or "''" for name in names) + (f", {also}" if also else ""),
        convert,
        tuple(name for name in names if name),
    )


def optional(kind: Kind) -> Kind:
    """`kind`, or None."""
    return Kind(
        f"{kind.allowed}, or None",
        lambda value: None if literal(value) is None else kind.convert(value),
        kind.choices,
    )


def either(first: Kind, second: Kind) -> Kind:
    """What `first` takes, or else what `second` takes."""

    def convert(value: Any) -> Any:
        try:
            return first.convert(value)
        except ValueError:
            return second.convert(value)

    return Kind(f"{first.allowed}, or {second.allowed}", convert, first.choices + second.choices)


def sequence(
    kind: Kind, as_type: type = list, lengths: tuple[int, ...] = (), ascending: bool = False
) -> Kind:
    """A list (or tuple, or the text of one) of `kind`; `lengths` are the permitted lengths,
    `ascending` allows equal neighbours.
    """

    def convert(value: Any) -> list | tuple:
        value = literal(value)
        if not isinstance(value, (list, tuple)) or (lengths and len(value) not in lengths):
            raise ValueError
        items = as_type(kind.convert(item) for item in value)
        if ascending and list(items) != sorted(items):
            raise ValueError("in ascending order, please")
        return items

    count = " or ".join(map(str, lengths)) + " of: " if lengths else ""
    return Kind(
        f"a list, {count}{kind.allowed} each" + (", ascending" if ascending else ""), convert
    )


def pair(kind: Kind, ascending: bool = False) -> Kind:
    """Two of `kind`, as a tuple."""
    return sequence(kind, tuple, (2,), ascending)


def size() -> Kind:
    """A side, or (height, width)."""
    side = integer(1)
    return Kind("a whole number >= 1, or (height, width)", either(side, pair(side)).convert)


def specifications() -> Kind:
    """A list of "name" or "name(arg=value, ...)"; on the command line also one string with commas
    between the items.
    """

    def convert(value: Any) -> list[str]:
        value = literal(value)
        if isinstance(value, str):
            value = [
                item for item in re.split(r",\s*(?![^()]*\))", value.strip().strip("[]")) if item
            ]
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise ValueError
        items = [item.strip().strip("'\"") for item in value]
        for item in items:
            if not re.fullmatch(r"\w+(\(.*\))?", item):
                raise ValueError(
                    f"{item!r} is not complete: quote an item that holds a comma, 'name(a=1, b=2)'"
                )
        return items

    return Kind("a list of 'name' or 'name(arg=value, ...)'", convert)


CLASSES = {
    "imagenet": 1000,
    "imagenet22K": 21841,
    "digits": 10,
    "cifar10": 10,
    "cifar100": 100,
    "svhn": 10,
    "tiny_imagenet": 200,
}


def family(cfg: Any) -> tuple[str, Any]:
    """(dotted name, node) of the section that describes the configured MODEL.TYPE."""
    name = cfg.MODEL.TYPE.upper()
    return f"MODEL.{name}", cfg.MODEL[name]


def check_classes(cfg: Any) -> None:
    """A known data set has a known number of classes; 0 (inferred) is for `folder` alone."""
    known = CLASSES.get(cfg.DATA.DATASET)
    if known and cfg.MODEL.NUM_CLASSES != known:
        raise ConfigError(
            f"MODEL.NUM_CLASSES: {cfg.MODEL.NUM_CLASSES} contradicts DATA.DATASET"
            f" {cfg.DATA.DATASET!r}, which has {known} classes; leave MODEL.NUM_CLASSES out, or use"
            " DATA.DATASET 'folder' for classes of your own"
        )


def check_stages(cfg: Any) -> None:
    """As many heads as stages, heads that divide the stage's width, one pre-training window per
    stage; for Swin and its relatives.
    """
    name, node = family(cfg)
    if cfg.MODEL.TYPE not in ("swin", "swinv2", "swin_mlp"):
        return
    stages = len(node.DEPTHS)
    if stages == 0:
        raise ConfigError(
            f"{name}.DEPTHS: [] has no stage; allowed: one number of blocks per stage, such as [2,"
            " 2, 6, 2]"
        )
    for key in ("NUM_HEADS", "PRETRAINED_WINDOW_SIZES"):
        if key in node and len(node[key]) != stages:
            raise ConfigError(
                f"{name}.{key}: {node[key]} has {len(node[key])} entries, {name}.DEPTHS"
                f" {node.DEPTHS} has {stages} stages; give one entry per stage"
            )
    for stage, heads in enumerate(node.NUM_HEADS):
        width = node.EMBED_DIM * 2**stage
        if width % heads:
            raise ConfigError(
                f"{name}.NUM_HEADS: {heads} heads do not divide the {width} channels of stage"
                f" {stage} (EMBED_DIM {node.EMBED_DIM} * 2^{stage}); choose a divisor of {width}"
            )


def check_family_options(cfg: Any) -> None:
    """Options of SwinV2's cosine attention are refused, not ignored, elsewhere."""
    attention = cfg.MODEL.ATTENTION
    for key, neutral in (("LOGIT_SCALE_INIT", 10.0), ("BIAS_SIGMOID", True)):
        if cfg.MODEL.TYPE != "swinv2" and attention[key] != neutral:
            raise ConfigError(
                f"MODEL.ATTENTION.{key}: {attention[key]} acts on MODEL.TYPE 'swinv2' only; "
                f"with {cfg.MODEL.TYPE!r} leave it at {neutral}"
            )


def check_data(cfg: Any) -> None:
    """The zip reader knows one layout; mean and standard deviation come together, one number per
    channel.
    """
    if cfg.DATA.ZIP_MODE and cfg.DATA.DATASET != "imagenet":
        raise ConfigError(
            f"DATA.ZIP_MODE: True needs DATA.DATASET 'imagenet', not {cfg.DATA.DATASET!r}; unpack"
            " the archive"
        )
    name, node = family(cfg)
    for key in ("MEAN", "STD"):
        given = cfg.DATA[key]
        if len(given) not in (0, node.IN_CHANS) or len(cfg.DATA.MEAN) != len(cfg.DATA.STD):
            raise ConfigError(
                f"DATA.{key}: {given} has {len(given)} numbers; give DATA.MEAN and DATA.STD"
                f" together, {node.IN_CHANS} numbers each ({name}.IN_CHANS), or () for the data"
                " set's own"
            )


def check_schedule(cfg: Any) -> None:
    """The warm-up fits into the training and into a multistep schedule's first step."""
    train, steps = cfg.TRAIN, cfg.TRAIN.LR_SCHEDULER.MULTISTEPS
    if train.WARMUP_EPOCHS > train.EPOCHS:
        raise ConfigError(
            f"TRAIN.WARMUP_EPOCHS: {train.WARMUP_EPOCHS} is longer than the training, TRAIN.EPOCHS"
            f" {train.EPOCHS}; allowed: 0 to {train.EPOCHS} (--opts TRAIN.WARMUP_EPOCHS 0)"
        )
    if train.COOLDOWN_EPOCHS and train.LR_SCHEDULER.NAME not in ("cosine", "linear"):
        raise ConfigError(
            f"TRAIN.COOLDOWN_EPOCHS: {train.COOLDOWN_EPOCHS} acts on TRAIN.LR_SCHEDULER.NAME cosine"
            f" and linear, which end; with {train.LR_SCHEDULER.NAME!r} leave it at 0"
        )
    if train.WARMUP_EPOCHS + train.COOLDOWN_EPOCHS > train.EPOCHS:
        raise ConfigError(
            f"TRAIN.COOLDOWN_EPOCHS: {train.COOLDOWN_EPOCHS} and TRAIN.WARMUP_EPOCHS"
            f" {train.WARMUP_EPOCHS} are longer than the training, TRAIN.EPOCHS {train.EPOCHS};"
            f" allowed: 0 to {train.EPOCHS - train.WARMUP_EPOCHS}"
        )
    if train.LR_SCHEDULER.NAME != "multistep":
        return
    if not steps:
        raise ConfigError(
            "TRAIN.LR_SCHEDULER.MULTISTEPS: [] is empty, TRAIN.LR_SCHEDULER.NAME 'multistep' needs"
            " the epochs at which the rate falls, such as [100, 200]"
        )
    if steps[0] < train.WARMUP_EPOCHS:
        raise ConfigError(
            f"TRAIN.LR_SCHEDULER.MULTISTEPS: {steps} begins within the warm-up (TRAIN.WARMUP_EPOCHS"
            f" {train.WARMUP_EPOCHS}); the first step must not come before its end"
        )


def check_mixing(cfg: Any) -> None:
    """Mixup and cutmix pair each image with another of the batch."""
    aug, batch = cfg.AUG, cfg.DATA.BATCH_SIZE
    if (aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX) and batch % 2:
        raise ConfigError(
            f"DATA.BATCH_SIZE: {batch} is odd; AUG.MIXUP and AUG.CUTMIX need an even number, or"
            " both at 0 (and AUG.CUTMIX_MINMAX None)"
        )


def check_distillation(cfg: Any) -> None:
    """A teacher and a kind of distillation come together."""
    distill = cfg.TRAIN.DISTILL
    if distill.KIND != "none" and not distill.TEACHER:
        raise ConfigError(
            f"TRAIN.DISTILL.TEACHER: '' is empty, TRAIN.DISTILL.KIND {distill.KIND!r} needs a timm"
            " model's name or a YAML of this repository"
        )
    if distill.TEACHER.endswith((".yaml", ".yml")) and not Path(distill.TEACHER).is_file():
        raise ConfigError(
            f"TRAIN.DISTILL.TEACHER: {show(distill.TEACHER)} is not a file; allowed: a timm model's"
            " name or a YAML of this repository"
        )
    if distill.KIND == "none" and (distill.TEACHER or distill.TEACHER_WEIGHTS):
        raise ConfigError(
            "TRAIN.DISTILL.KIND: 'none' leaves the teacher"
            f" {show(distill.TEACHER or distill.TEACHER_WEIGHTS)} unused; allowed with a teacher:"
            " hard, soft"
        )


ALWAYS = (check_classes, check_stages, check_family_options, check_data)
TRAINING = (check_schedule, check_mixing, check_distillation)


def check_combinations(cfg: Any) -> None:
    """Refuse settings that cannot go together; rules of training do not bind --eval and
    --throughput (a batch of 1, say, is fine there).

    Raises: ConfigError.
    """
    for rule in ALWAYS + (() if cfg.EVAL_MODE or cfg.THROUGHPUT_MODE else TRAINING):
        rule(cfg)
