"""What every part of this package raises, and how it says things in one line."""

from collections.abc import Iterable

from registry import UserError, did_you_mean


class CheckpointError(UserError, ValueError):
    """A checkpoint or weights file that cannot be read, has another structure than it should, or
    does not fit the model or run. The message is one line that says how to fix it.
    """


def list_keys(keys: Iterable[str], limit: int = 5) -> str:
    """First `limit` names, then how many more there are."""
    keys = list(keys)
    more = f", ... and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(map(brief, keys[:limit])) + more


def brief(key: str) -> str:
    """A name of a file in one line of at most 120 characters."""
    shown = key if key.isprintable() else repr(key)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."


def first_line(error: BaseException) -> str:
    """Type and message of another library's error, at most 160 characters of its first line."""
    # torch puts two lines of advice before the message of its restricted unpickler
    text = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


def check_option(option: str, value: object, allowed: Iterable[str]) -> None:
    """Raises CheckpointError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        hint = did_you_mean(str(value), allowed)
        raise CheckpointError(
            f"{option}={value!r} is unknown; choose from {', '.join(allowed)}{hint}"
        )
