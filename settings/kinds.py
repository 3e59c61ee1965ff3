"""What a setting may be: kinds of values, each a conversion and the words that an error quotes.

A kind converts a value as it is written (in a YAML, with --opts or by a flag) into the value that
the program uses, or raises ValueError. Where a number is meant, text is read as a Python literal:
1e-8, '1e-8' and '(224, 448)' all do, and a whole number stands for a float.
"""

from __future__ import annotations

import ast
import math
import os
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from registry import Interval, UserError


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message is one line and says what was given, what is
    allowed and how to fix it.
    """


@dataclass
class Kind:
    """The values a key takes: `allowed` in words, `convert` (raises ValueError), and `choices`, the
    words among which the nearest spelling is looked for.
    """

    allowed: str
    convert: Callable[[Any], Any]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Key:
    """A setting: its default, the values it takes (quoted by errors), and what it means, with its
    unit.
    """

    default: Any
    kind: Kind
    meaning: str


_SHOW = reprlib.Repr()
_SHOW.maxstring = 200
_SHOW.maxother = 200
_SHOW.maxlist = 12
_SHOW.maxtuple = 12
_SHOW.maxdict = 4
_SHOW.maxlevel = 3


def show(value: Any) -> str:
    """The value as Python writes it, on one line and of bounded length."""
    try:
        return _SHOW.repr(value)
    except ValueError:  # Python writes no whole numbers of thousands of digits
        return f"a {type(value).__name__} of too many digits"


def show_name(name: Any) -> str:
    """A key or file name bare, where it is short and printable."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 200 else show(text)


def literal(value: Any) -> Any:
    """A string as the Python literal it spells ('1e-8' -> 1e-08, 'None' -> None); everything else
    unchanged.
    """
    if not isinstance(value, str):
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in a string that is no literal
            return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return value


def switch() -> Kind:
    """True or False; 'true' and 'false' too, since that is how YAML spells them."""

    def convert(value: Any) -> bool:
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.strip().lower(), value)
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Kind("True or False", convert)


def _interval(interval: Interval) -> str:
    """The interval in words, to be put behind "a number"."""
    low, high, ends = interval
    if low == -math.inf and high == math.inf:
        return ""
    if high == math.inf:
        sign = ">=" if ends[0] == "[" else ">"
        return f" {sign} {low:g}"
    return f" in {interval}"


def number(
    low: float = -math.inf, high: float = math.inf, ends: str = "[]", limit: float = math.inf
) -> Kind:
    """A finite float of this `registry.Interval`; above `limit` no run can use it."""
    interval = Interval(low, high, ends)

    def convert(value: Any) -> float:
        value = literal(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        try:
            value = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            raise ValueError from None
        if not (math.isfinite(value) and interval.holds(value)):
            raise ValueError
        refuse_above(limit, value)
        return value

    return Kind("a number" + _interval(interval), convert)


def refuse_above(limit: float, value: float) -> None:
    """Raises ValueError for a number that is allowed in itself and that no machine can serve."""
    if value > limit:
        raise ValueError(f"more than {limit} cannot be used")


def integer(low: float = -math.inf, high: float = math.inf, limit: int = 10**6) -> Kind:
    """A whole number, `low` and `high` included; above `limit` no run can use it, where there is no
    `high`.
    """

    def convert(value: Any) -> int:
        value = literal(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        if high == math.inf:
            refuse_above(limit, value)
        return value

    words = f" from {low} to {high}" if high < math.inf else _interval(Interval(low))
    return Kind("a whole number" + words, convert)


def text(pattern: str = "", allowed: str = "text", empty: str | None = "") -> Kind:
    """A string, matched whole by `pattern` if one is given; None and '' stand for `empty`, unless
    that is None itself.

    Where `empty` is a word, such as 'none', False stands for it too: YAML reads a bare off as
    False.
    """

    def convert(value: Any) -> str:
        absent = value in (None, "None", "") or (value is False and empty)
        if empty is not None and absent:
            return empty
        if isinstance(value, (int, float)):
            raise ValueError("quote it, so that YAML reads text")
        if not isinstance(value, str):
            raise ValueError
        refuse_unusable(value)
        if pattern and not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Kind(allowed, convert)


def refuse_unusable(value: str) -> None:
    """Raises ValueError for text that no file can be named and no log line hold: line breaks and
    other control characters, and what is no Unicode text nor bytes of a file name.
    """
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise ValueError("it holds a control character, such as a line break")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError("it is no Unicode text") from None


class Choice(Kind):
    """One of `names`, in any case, or a string matching `pattern`.

    YAML 1.1 reads a bare off, no or null as False or None; where there is such a name, it is meant.

    Args:
        names: words, or a registry, whose names count as they are when a value is read.
        pattern, also: what else is taken, and the same in words.
        refused: names that people know from elsewhere, each with the reason why it is none here.
    """

    def __init__(
        self,
        names: Iterable[str],
        pattern: str = "",
        also: str = "",
        refused: dict[str, str] | None = None,
    ):
        self._names = names
        self._pattern = pattern
        self._also = also
        self._refused = refused or {}

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(name for name in self._names if name)

    @property
    def allowed(self) -> str:
        words = [name or "''" for name in self._names]
        if self._also:
            words.append(self._also)
        return ", ".join(words)

    def convert(self, value: Any) -> str:
        names = {name.lower(): name for name in self._names}
        if value is False or value is None:
            spellings = ("none",) if value is None else ("off", "no")
            value = next((word for word in spellings if word in names), value)
        if not isinstance(value, str):
            raise ValueError
        word = value.lower()
        if word in names:
            return names[word]
        if self._pattern and re.fullmatch(self._pattern, value, re.IGNORECASE):
            return word
        raise ValueError(self._refused.get(word, ""))


def choice(*names: str) -> Choice:
    """One of `names`, in any case."""
    return Choice(names)


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
        except ValueError as error:
            reason = str(error)
        try:
            return second.convert(value)
        except ValueError as error:
            raise ValueError(reason or str(error)) from None

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
            raise ValueError("sort it in ascending order")
        return items

    count = " or ".join(map(str, lengths)) + " of: " if lengths else ""
    return Kind(
        f"a list, {count}{kind.allowed} each" + (", ascending" if ascending else ""), convert
    )


def pair(kind: Kind, ascending: bool = False) -> Kind:
    """Two of `kind`, as a tuple."""
    return sequence(kind, tuple, lengths=(2,), ascending=ascending)


def size(limit: int) -> Kind:
    """A side, or (height, width)."""
    side = integer(1, limit=limit)
    return Kind("a whole number >= 1, or (height, width)", either(side, pair(side)).convert)


def specifications() -> Kind:
    """A list of "name" or "name(arg=value, ...)"; on the command line also one string with commas
    between the items.
    """

    def convert(value: Any) -> list[str]:
        value = literal(value)
        if isinstance(value, str):
            parts = re.split(r",\s*(?![^()]*\))", value.strip().strip("[]"))
            value = [part for part in parts if part]
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
