"""Named parts: `@REGISTRY.register("name")` where a part stands, "name(option=value)" in a config.

Modifiers, mixers, backbones, data sets, optimizers and checkpoint sources are found by name in a
`Registry` each; every choice of one word among several answers a misspelling with the nearest one.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class UserError(Exception):
    """Something that the user can fix. The message is one line: what was given, what is allowed,
    how to fix it. main.py prints it and ends with status 2.
    """


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The closest of `words` to `word`, whatever the case; None if none is close."""
    folded = {other.lower(): other for other in words}
    found = difflib.get_close_matches(str(word).lower(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of an error about a name: "; did you mean 'x'?", or "" where nothing is close."""
    guess = nearest(word, words, cutoff=0.4)
    return f"; did you mean {guess!r}?" if guess else ""


def check_choice(option: str, word: str, allowed: Iterable[str]) -> str:
    """`word`, if it is one of `allowed`.

    Raises: ValueError that names the option, what is allowed and the nearest spelling.
    """
    allowed = list(allowed)
    if word not in allowed:
        hint = did_you_mean(word, allowed)
        raise ValueError(f"{option} is {word!r}; allowed are {', '.join(allowed)}{hint}")
    return word


class Interval(NamedTuple):
    """The numbers from `low` to `high`; `ends` as in mathematics: '[' and ']' include the end, '('
    and ')' do not.
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in it."""
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return above and below

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


class OptionType(NamedTuple):
    """What an option may be, in words and as types."""

    words: str
    types: tuple[type, ...]


BOOL = OptionType("True or False", (bool,))
INT = OptionType("a whole number", (int,))
FLOAT = OptionType("a number", (int, float))
# By a parameter's annotation, which is text in modules with `from __future__ import annotations`.
TYPES = {bool: BOOL, "bool": BOOL, int: INT, "int": INT, float: FLOAT, "float": FLOAT}


class Registry:
    """Parts by name: classes, functions or descriptions of one kind.

    Args:
        kind: the word that error messages use for an entry, such as "attention modifier".
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Any] = {}

    def register(self, name: str, entry: Any = None) -> Callable[[Any], Any]:
        """Adds `entry`, or, as a decorator, what it decorates; returns it unchanged.

        Raises: ValueError if the name is taken.
        """

        def add(entry: Any) -> Any:
            if name in self._entries:
                first, second = (_title(part) for part in (self._entries[name], entry))
                raise ValueError(f"{self.kind} {name!r} is registered twice: {first} and {second}")
            self._entries[name] = entry
            return entry

        return add if entry is None else add(entry)

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> Any:
        """The entry behind a name.

        Raises: ValueError that lists what exists and the nearest spelling.
        """
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            available = ", ".join(self.names())
            raise ValueError(f"there is no {self.kind} {name!r}; available: {available}{hint}")
        return self._entries[name]

    def create(self, text: str, *args: Any) -> Any:
        """Builds the entry that "name" or "name(option=value, ...)" describes; `args` come before
        the options.

        Raises: ValueError for an unknown name or option, with what is allowed.
        """
        name, options = parse_call(text)
        entry = self[name]
        self._check_options(text, entry, options, taken=len(args))
        try:
            return entry(*args, **options)
        except TypeError as error:
            where = f"{entry.__module__}.{entry.__qualname__}"
            raise ValueError(
                f"{self.kind} {text!r}: {error}; its options are in the docstring of {where}"
            ) from error

    def _check_options(self, text: str, entry: Any, options: dict[str, Any], taken: int) -> None:
        """Refuses an option that `entry` does not have, or that is not of the type it is annotated
        with (bool, int or float); its first `taken` parameters are none.
        """
        parameters = list(inspect.signature(entry).parameters.values())[taken:]
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return
        known = {parameter.name: parameter.annotation for parameter in parameters}
        for option, value in options.items():
            if option not in known:
                hint = did_you_mean(option, known)
                raise ValueError(
                    f"{self.kind} {text!r} has no option {option!r}; its options are"
                    f" {', '.join(known) or 'none'}{hint}"
                )
            wanted = TYPES.get(known[option])
            if wanted and type(value) not in wanted.types:
                raise ValueError(
                    f"{self.kind} {text!r}: {option} is {value!r}; allowed: {wanted.words}"
                )


def _title(entry: Any) -> str:
    return getattr(entry, "__qualname__", None) or repr(entry)


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """ "name(a=1, b=word)" -> ("name", {"a": 1, "b": "word"}); values are Python literals, and a
    bare word is a string.

    Raises: ValueError for anything else.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise ValueError(text)
        options = {option.arg: _value(option.value) for option in node.keywords}
        if None in options or len(options) < len(node.keywords):  # **options, or one given twice
            raise ValueError(text)
        return node.func.id, options
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"cannot read {text!r}; write name or name(option=value, ...), each option once"
        ) from error


def _value(node: ast.expr) -> Any:
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
