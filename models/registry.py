"""Named building blocks: `@REGISTRY.register("name")` on a class, "name(arg=value)" in a config."""

import ast
import difflib
from collections.abc import Callable


class Registry:
    """Classes by name. `kind` is the word that error messages use for an entry."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator. Raises ValueError if the name is taken."""

        def add(cls: type) -> type:
            if name in self._entries:
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: {self._entries[name].__qualname__}"
                    f" and {cls.__qualname__}"
                )
            self._entries[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def __getitem__(self, name: str) -> type:
        """The class behind a name. Raises ValueError that lists what exists and the nearest
        spelling.
        """
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"there is no {self.kind} {name!r}; there are {', '.join(self.names())}{hint}"
            )
        return self._entries[name]

    def create(self, text: str, *args):
        """Builds the entry that "name" or "name(arg=value, ...)" describes; `args` go before the
        options.

        Raises: ValueError for an unknown name or option, with what is allowed.
        """
        name, options = parse_call(text)
        cls = self[name]
        try:
            return cls(*args, **options)
        except TypeError as error:
            where = f"{cls.__module__}.{cls.__qualname__}"
            raise ValueError(
                f"{self.kind} {text!r}: {error}; its options are in the docstring of {where}"
            ) from error


def parse_call(text: str) -> tuple[str, dict]:
    """ "name(a=1, b=word)" -> ("name", {"a": 1, "b": "word"}). Values are Python literals; a bare
    word is a string.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise ValueError(text)
        return node.func.id, {option.arg: _value(option.value) for option in node.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read {text!r}; write name or name(option=value, ...)") from error


def _value(node: ast.expr):
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
