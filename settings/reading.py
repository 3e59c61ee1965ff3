"""YAML files and options -> settings by dotted key, and the frozen configuration back to YAML."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from registry import nearest
from settings.kinds import ConfigError, Key, show, show_name

logger = logging.getLogger(__name__)
WEIGHTS = ("MODEL.RESUME", "MODEL.PRETRAINED")  # a run without them is another one
FILES = 500  # that one configuration may read
REPLACED = ("int", "float", "timestamp")  # of what YAML 1.1 reads without being told
ENTRIES = 10_000  # that one mapping of a YAML may have, merged ones included


class Given:
    """The settings given so far, converted: `values` by dotted key; what is added later wins.

    Args:
        keys: every key that exists.
        dropped: beginnings of keys that are read and left out with a note, each with the reason.
    Raises: ConfigError, one line, for anything that cannot be used.
    """

    def __init__(self, keys: dict[str, Key], dropped: dict[str, str]):
        self.keys = keys
        self.sections = sections_of(keys)
        self.dropped = dropped
        self.values: dict[str, Any] = {}
        self.written: set[str] = set()  # in the file itself, --opts and flags, not in BASE files
        self.files = 0

    def add_file(self, path: Path, named_by: str, above: tuple[Path, ...] = ()) -> None:
        """A YAML's settings, those of its BASE files first. `named_by` says where the path stands,
        `above` are the files that include this one.
        """
        self.files += 1
        if self.files > FILES:
            raise ConfigError(f"{path}: BASE: more than {FILES} files are read; name each once")
        content = read_yaml(path, named_by, above)
        here = path.resolve()
        if here in above:
            cycle = (*above[above.index(here) :], here)
            names = " -> ".join(file.name for file in cycle)
            raise ConfigError(f"BASE: the files include each other: {names}")
        for parent in _parents(path, content.pop("BASE", None)):
            self.add_file(path.parent / parent, f"{path}: BASE", (*above, here))
        self.add(str(path), self._leaves(content), written=not above)

    def add_options(self, words: Sequence[Any]) -> None:
        """The flat list KEY VALUE KEY VALUE ... of --opts."""
        if len(words) % 2:
            raise ConfigError(
                f"--opts: {show(words[-1])} has no value; write pairs KEY VALUE,"
                " with lists in quotes: '[2, 2]'"
            )
        pairs = list(zip(map(str, words[::2]), words[1::2], strict=True))
        for key, value in pairs:
            if key in WEIGHTS and value == "":
                raise ConfigError(
                    f"--opts: {key}: '' is empty, perhaps a shell variable that is not set; write"
                    " None where none is meant"
                )
        self.add("--opts", pairs)

    def add(self, where: str, pairs: Iterable[tuple[str, Any]], written: bool = True) -> None:
        """Pairs (key, value); those of dropped sections are left out with a note. written: by the
        user, for this run.
        """
        for key, value in pairs:
            reason = self._why_dropped(key)
            if reason:
                log_note(f"{where}: {key} has no effect: {reason}")
            else:
                self.values[key] = self.convert(where, key, value)
                if written:
                    self.written.add(key)

    def convert(self, where: str, key: str, value: Any) -> Any:
        """The value as the program uses it."""
        if key in self.sections:
            raise ConfigError(
                f"{where}: {key}: {show(value)} stands where a section is meant; allowed: a"
                f" mapping, such as {key}: {{...}}"
            )
        if key not in self.keys:
            raise self._unknown(where, key, value)
        kind = self.keys[key].kind
        try:
            return kind.convert(value)
        except ValueError as error:
            raise _refusal(where, key, value, kind, str(error)) from None

    def complete(self) -> dict[str, Any]:
        """All keys: the given values, and the defaults of the rest."""
        return {key: copy.copy(entry.default) for key, entry in self.keys.items()} | self.values

    def _why_dropped(self, key: str) -> str | None:
        for prefix, reason in self.dropped.items():
            if f"{key}.".startswith(prefix):
                return reason
        return None

    def _leaves(self, node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Dotted key and value of every leaf of nested mappings; an empty section has none. Only
        known sections are entered.
        """
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key not in self.sections:
                yield key, value
            elif isinstance(value, dict):
                yield from self._leaves(value, f"{key}.")
            elif value is not None:
                yield key, value

    def _unknown(self, where: str, key: str, value: Any) -> ConfigError:
        """The error for a key that does not exist: the same name in another section is the first
        guess, then the closest spelling.
        """
        *parents, leaf = key.split(".")
        same = [known for known in self.keys if known.split(".")[-1].lower() == leaf.lower()]
        guess = nearest(key, same) or nearest(key, [*self.keys, *self.sections])
        if guess is None and same:
            guess = same[0]
        hint = f"did you mean {guess}? " if guess else ""
        home = self._innermost_section(parents)
        start = f"{home}." if home else ""
        inside = {name[len(start) :].split(".")[0] for name in self.keys if name.startswith(start)}
        place = f" in {home}" if home else ""
        return ConfigError(
            f"{where}: unknown key {show_name(key)} (value {show(value)}); {hint}"
            f"allowed{place}: {', '.join(sorted(inside))}"
        )

    def _innermost_section(self, names: list[str]) -> str:
        """The longest beginning of a dotted name that is a section; "" where there is none."""
        for depth in range(len(names), 0, -1):
            section = ".".join(names[:depth])
            if section in self.sections:
                return section
        return ""


def sections_of(keys: Iterable[str]) -> list[str]:
    """Every section that a dotted key stands in, sorted."""
    found = set()
    for key in keys:
        names = key.split(".")
        found |= {".".join(names[:depth]) for depth in range(1, len(names))}
    return sorted(found)


def _refusal(where: str, key: str, value: Any, kind: Any, reason: str) -> ConfigError:
    """The error for a value that its kind does not take."""
    written = show(value)
    guess = None
    if not isinstance(value, str):
        written += f" ({type(value).__name__})"
    elif not reason:
        guess = nearest(value, kind.choices)
    because = f": {reason}" if reason else ""
    hint = f"; did you mean {guess!r}?" if guess else ""
    return ConfigError(
        f"{where}: {key}: {written} is not allowed{because}; allowed: {kind.allowed}{hint}"
    )


def log_note(message: str) -> None:
    """Logs a warning, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


class _Loader(yaml.SafeLoader):
    """YAML that builds no objects, refuses a key given twice instead of taking the last, and takes
    as text what only YAML 1.1 reads as a number or a date: 010 (8), 1:30 (90), 2020-12-24.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; one that is not of its tag's type (!!int foo) is refused with its line."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise yaml.constructor.ConstructorError(
                None, None, f"{show(node.value)} is no {node.tag.split(':')[-1]}", node.start_mark
            ) from None

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping as it stands in the file, before others are merged into it."""
        node = super().compose_mapping_node(anchor)
        names = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name = (key.tag, key.value)
            if name in names:
                raise yaml.composer.ComposerError(
                    None, None, f"{show_name(key.value)} is given twice", key.start_mark
                )
            names.add(name)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts merged mappings (<<) in place; nests of them may grow without bound."""
        super().flatten_mapping(node)
        if len(node.value) > ENTRIES:
            raise yaml.constructor.ConstructorError(
                None, None, f"merged mappings have more than {ENTRIES} entries", node.start_mark
            )


# A part of what YAML 1.1 reads as numbers, so that what is written by `dump_config` reads back.
_NUMBERS = {
    "int": r"[-+]?(0|[1-9](_?[0-9])*)|0x[0-9a-fA-F]+|0b[01]+",
    "float": r"[-+]?[0-9]+\.[0-9]*([eE][-+][0-9]+)?|\.[0-9]+([eE][-+][0-9]+)?|[-+]?\.inf|\.nan",
}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in known if tag.split(":")[-1] not in REPLACED]
    for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _type, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_type}", re.compile(f"^({_pattern})$"), list("-+.0123456789")
    )


def read_yaml(path: Path, named_by: str, above: tuple[Path, ...] = ()) -> dict:
    """The mapping in a YAML file; {} if it is empty. `above`: files that name it, none of which can
    be meant. Raises: ConfigError.
    """
    if not _is_file(path):
        similar = _similar_file(path, above)
        raise ConfigError(f"{named_by}: {show(str(path))} is not a file{similar}")
    where = show_name(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not valid YAML: no UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise ConfigError(
            f"{where}: not valid YAML: lists or mappings are nested too deep"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        reason = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise ConfigError(f"{where}: not valid YAML{line}: {show_name(reason)}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(
            f"{where}: holds a {type(content).__name__}; allowed: a mapping, such as TRAIN:"
            " {EPOCHS: 100}"
        )
    return content or {}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name
        return False


def _similar_file(path: Path, above: tuple[Path, ...]) -> str:
    """The end of an error about a missing file: a file of the same folder with a similar name."""
    try:
        files = [entry for entry in path.parent.iterdir() if entry.is_file()]
        names = [entry.name for entry in files if entry.resolve() not in above]
    except (OSError, ValueError):
        return ""
    guess = nearest(path.name, [name for name in names if name != path.name])
    return f"; did you mean {str(path.parent / guess)!r}?" if guess else ""


def _parents(path: Path, base: Any) -> list[str]:
    """The files that BASE names; a bare name is a list of one, and '' none."""
    names = [base] if isinstance(base, str) else base or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{path}: BASE: {show(names)} is not allowed; allowed: a file name or a list of them,"
            " relative to this file"
        )
    return [name for name in names if name]


def tree(values: dict[str, Any]) -> CfgNode:
    """The nested node of dotted keys."""
    root: dict[str, Any] = {"BASE": [""]}
    for key, value in values.items():
        node = root
        *parents, leaf = key.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return CfgNode(root)


def look_up(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def to_dict(cfg: CfgNode) -> dict[str, Any]:
    """The configuration as plain dicts, lists, numbers and text, as a YAML would give it: OUTPUT
    without MODEL.NAME/TAG, LOCAL_RANK 0.
    """
    tail = os.path.join(cfg.MODEL.NAME, cfg.TAG)
    root = cfg.OUTPUT.removesuffix(tail)
    return _plain(cfg) | {"OUTPUT": root.rstrip("/") or root, "LOCAL_RANK": 0}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def dump_config(cfg: CfgNode) -> str:
    """The configuration as YAML; given back as --cfg it makes the same configuration."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, default_flow_style=None, width=120)
