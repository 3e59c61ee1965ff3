"""Options that are one word of a few."""

import difflib
from collections.abc import Sequence


def check_choice(option: str, word: str, allowed: Sequence[str]) -> str:
    """`word`, if it is one of `allowed`. Raises ValueError that names the option, what is allowed
    and the nearest spelling.
    """
    if word not in allowed:
        near = difflib.get_close_matches(str(word), allowed, 1, 0.4)
        raise ValueError(
            f"{option} is {word!r}; allowed are {', '.join(allowed)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return word
