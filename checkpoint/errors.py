"""What every part of this package raises, and how it lists keys in one line."""


class CheckpointError(ValueError):
    """A weights file cannot be read, or does not fit the model. The message is one line that says
    how to mend it.
    """


def list_keys(keys, limit: int = 5) -> str:
    """First `limit` names, then how many more there are."""
    keys = list(keys)
    more = f", ... and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
