"""Named parts: `@REGISTRY.register("name")` where a part stands, "name(option=value)" in a config.

Modifiers, mixers, backbones, data sets, optimizers and checkpoint sources are found by name in a
`Registry` each; every choice of one word among several answers a misspelling with the nearest one.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin


class UserError(Exception):
    """Something that the user can fix. The message is one line: what was given, what is allowed,
    how to fix it. main.py prints it and ends with status 2.
    """


CLOSE = 0.6  # the share of two words that agrees where one may be a misspelling of the other


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The closest of `words` to `word`, whatever the case; None if none is close. Dashes before
    a flag, and the sections before a key, make no two words alike.
    """
    folded = {other.lower().lstrip("-"): other for other in words}
    wanted = str(word).lower().lstrip("-")
    for found in difflib.get_close_matches(wanted, folded, n=5, cutoff=CLOSE):
        ends = (wanted.rpartition(".")[2], found.rpartition(".")[2])
        if difflib.SequenceMatcher(None, *ends).ratio() >= CLOSE:
            return folded[found]
    return None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of an error about a name: "; did you mean 'x'?", or "" where nothing is close."""
    guess = nearest(word, words)
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


SHOWN = 100  # characters of a value or a spec that an error quotes


def quote(value: Any) -> str:
    """The value as Python writes it, cut to a length that a line can hold."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]}...{text[-1]}"


def printable(text: str) -> str:
    """The text with line breaks and the like as Python writes them."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class OptionType(NamedTuple):
    """One kind of value that an option takes: in words, how it is read (raises ValueError or
    OverflowError for what is none), and its words, if they are few.
    """

    words: str
    read: Callable[[Any], Any]
    choices: tuple[str, ...] = ()


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError
    return value


def _truth(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    return _exactly(bool, words.get(value.lower(), value) if isinstance(value, str) else value)


def _real(value: Any) -> float:
    number = float(value) if type(value) is int else _exactly(float, value)
    if number != value or not math.isfinite(number):
        raise ValueError
    return number


def _nothing(value: Any) -> None:
    if value is not None and value != "none":
        raise ValueError


def _word(value: Any) -> str:
    return "none" if value is None else _exactly(str, value)


def _anything(value: Any) -> Any:
    return _real(value) if type(value) is float else value


def _one_of(allowed: tuple[Any, ...]) -> OptionType:
    """A Literal. A bare none, off or no, which is read as None or False, stands for the word too,
    where it is one of them.
    """

    def read(value: Any) -> Any:
        spellings = [value]
        spellings += ["none"] * (value is None) + ["off", "no"] * (value is False)
        for word in spellings:
            if word in allowed and type(word) is type(allowed[allowed.index(word)]):
                return word
        raise ValueError

    words = tuple(word for word in allowed if isinstance(word, str))
    return OptionType(" or ".join(str(value) or "''" for value in allowed), read, words)


def _items(kind: type, inner: tuple[Any, ...]) -> OptionType:
    """A tuple or a list of options, of one length where that is given."""
    endless = kind is not tuple or ... in inner
    options = [Option(annotation) for annotation in inner if annotation is not ...]

    def read(value: Any) -> Any:
        if not isinstance(value, (tuple, list)):
            raise ValueError
        each = options * len(value) if endless or not options else options
        if len(each) != len(value) and options:
            raise ValueError
        return (tuple if kind is tuple else list)(
            option.read(item) for option, item in zip(each or [Option(Any)] * len(value), value)
        )

    words = " and ".join(dict.fromkeys(option.words for option in options))
    return OptionType(f"a list of: {words}" if words else "a list", read)


class Option:
    """What an option of a part may be, by its annotation: bool, int, float (finite), str, None,
    Literal, tuples and lists of these, and unions of all.

    A bool may be written yes, no, on and off. What an annotation does not say is not checked.
    """

    # in the order in which they are tried: words last, for they take what is meant as a bool
    TYPES = {
        bool: OptionType("True or False", _truth),
        type(None): OptionType("None", _nothing),
        int: OptionType("a whole number", partial(_exactly, int)),
        float: OptionType("a number", _real),
        Literal: None,
        tuple: None,
        list: None,
        Sequence: None,
        str: OptionType("a word", _word),
    }
    ANY = OptionType("what its description says", _anything)

    def __init__(self, annotation: Any):
        order = list(self.TYPES)
        members = {get_origin(member) or member: member for member in _members(annotation)}
        known = sorted((kind for kind in members if kind in order), key=order.index)
        self.types = [self.TYPES[kind] or self._made(kind, members[kind]) for kind in known]
        self.types += [self.ANY] * (len(known) < len(members))
        self.words = ", or ".join(option.words for option in self.types)

    @staticmethod
    def _made(kind: Any, annotation: Any) -> OptionType:
        inner = get_args(annotation)
        return _one_of(inner) if kind is Literal else _items(kind, inner)

    def read(self, value: Any) -> Any:
        """The value as the part takes it. Raises: ValueError with the value and what is allowed."""
        for option in self.types:
            try:
                return option.read(value)
            except (ValueError, OverflowError):
                continue
        choices = [word for option in self.types for word in option.choices]
        hint = did_you_mean(value, choices) if choices and isinstance(value, str) else ""
        raise ValueError(f"{quote(value)}; allowed: {self.words}{hint}")


def _members(annotation: Any) -> list[Any]:
    """The members of a union; None as its type."""
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _members(member)]
    return [type(None) if annotation is None else annotation]


def option_annotations(entry: Any, taken: int = 0) -> dict[str, Any] | None:
    """The annotations of what a part is built with, after its first `taken` parameters, by name;
    None for one that takes any option.
    """
    try:
        signature = inspect.signature(entry, eval_str=True)
    except NameError:  # names that only a type checker knows
        signature = inspect.signature(entry)
    parameters = list(signature.parameters.values())[taken:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name: parameter.annotation for parameter in parameters}


def read_options(what: str, options: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Options as a part takes them; `what` names it, `known` are its annotations.

    Raises: ValueError for an option that is not known, or of another kind than its annotation.
    """
    read = {}
    for option, value in options.items():
        if option not in known:
            hint = did_you_mean(option, known)
            raise ValueError(
                f"{what} has no option {option!r}; its options are"
                f" {', '.join(known) or 'none'}{hint}"
            )
        try:
            read[option] = Option(known[option]).read(value)
        except ValueError as error:
            raise ValueError(f"{what}: {option} is {error}") from None
    return read


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

        Raises: ValueError for an unknown name or option, and for a value of another kind than the
            option's annotation, with what is allowed.
        """
        name, options = parse_call(text)
        entry = self[name]
        what = f"{self.kind} {quote(text)}"
        known = option_annotations(entry, len(args))
        if known is not None:
            options = read_options(what, options, known)
        try:
            return entry(*args, **options)
        except ValueError as error:
            if name in str(error) and str(error).isprintable():
                raise
            raise ValueError(f"{what}: {printable(str(error))}") from error
        except TypeError as error:
            where = f"{entry.__module__}.{entry.__qualname__}"
            raise ValueError(
                f"{what}: {error}; its options are in the docstring of {where}"
            ) from error
        except (RuntimeError, ArithmeticError, MemoryError) as error:  # sizes that cannot be
            raise ValueError(
                f"{what}: {(str(error) or 'out of memory').splitlines()[0]}"
            ) from error


def _title(entry: Any) -> str:
    return getattr(entry, "__qualname__", None) or repr(entry)


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """ "name(a=1, b=word)" -> ("name", {"a": 1, "b": "word"}); values are Python literals, and a
    bare word is a string, in a list too.

    Raises: ValueError for anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how a literal is written
            node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise ValueError(text)
        options = {option.arg: _value(option.value) for option in node.keywords}
        if None in options or len(options) < len(node.keywords):  # **options, or one given twice
            raise ValueError(text)
        return node.func.id, options
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"cannot read {quote(text)}; write name or name(option=value, ...), each option once"
        ) from error


def _value(node: ast.expr) -> Any:
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
