"""YAML files and options -> settings by dotted key, and the frozen configuration back to YAML."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from registry import nearest
from settings.kinds import ConfigError, Key, show

logger = logging.getLogger(__name__)


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

    def add_file(self, path: Path, named_by: str, above: tuple[Path, ...] = ()) -> None:
        """A YAML's settings, those of its BASE files first. `named_by` says where the path stands,
        `above` are the files that include this one.
        """
        content = read_yaml(path, named_by)
        here = path.resolve()
        if here in above:
            cycle = (*above[above.index(here) :], here)
            names = " -> ".join(file.name for file in cycle)
            raise ConfigError(f"BASE: the files include each other: {names}")
        for parent in _parents(path, content.pop("BASE", None)):
            self.add_file(path.parent / parent, f"{path}: BASE", (*above, here))
        self.add(str(path), self._leaves(content))

    def add_options(self, words: Sequence[Any]) -> None:
        """The flat list KEY VALUE KEY VALUE ... of --opts."""
        if len(words) % 2:
            raise ConfigError(
                f"--opts: {show(words[-1])} has no value; write pairs KEY VALUE,"
                " with lists in quotes: '[2, 2]'"
            )
        self.add("--opts", zip(map(str, words[::2]), words[1::2], strict=True))

    def add(self, where: str, pairs: Iterable[tuple[str, Any]]) -> None:
        """Pairs (key, value); those of dropped sections are left out with a note."""
        for key, value in pairs:
            reason = self._why_dropped(key)
            if reason:
                log_note(f"{where}: {key} has no effect: {reason}")
            else:
                self.values[key] = self.convert(where, key, value)

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
            f"{where}: unknown key {key} (value {show(value)}); {hint}"
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
    """YAML that builds no objects and refuses a key given twice, instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names: list = []
        for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            name = self.construct_object(key, deep=True)
            if name in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name} is given twice", key.start_mark
                )
            names.append(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, named_by: str) -> dict:
    """The mapping in a YAML file; {} if it is empty. Raises: ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{named_by}: {str(path)!r} is not a file{_similar_file(path)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        reason = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise ConfigError(f"{path}: not valid YAML{line}: {reason}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds a {type(content).__name__}; allowed: a mapping, such as TRAIN:"
            " {EPOCHS: 100}"
        )
    return content or {}


def _similar_file(path: Path) -> str:
    """The end of an error about a missing file: a file of the same folder with a similar name."""
    if not path.parent.is_dir():
        return ""
    guess = nearest(path.name, [entry.name for entry in path.parent.iterdir() if entry.is_file()])
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
