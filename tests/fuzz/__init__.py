"""Random and damaged input with fixed seeds: it is used as it was meant, or refused in one line.

make test-long      as many cases as a test states
make test-slow      a tenth of them
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

import main
from registry import UserError

LIMIT = 2500  # characters of an error


def cases(total: int) -> Any:
    """Decorator: the test's `count` is `total` in the long tests, and a tenth in the slow ones."""
    tenth = pytest.param(max(1, total // 10), marks=pytest.mark.slow, id="tenth")
    whole = pytest.param(total, marks=[pytest.mark.slow, pytest.mark.long], id="whole")
    return pytest.mark.parametrize("count", [tenth, whole])


def refusal(call: Callable[[], Any], *errors: type[Exception]) -> str | None:
    """The one line with which `call` refuses its input; None where it takes it.

    errors: other classes than UserError that a caller turns into one line. Any other exception, and
    a message of several lines, fails the test.
    """
    try:
        call()
    except (UserError, *errors) as error:
        return one_line(str(error))
    return None


def one_line(text: str) -> str:
    """`text`, which has to be one line of bounded length without unprintable characters."""
    assert text and "\n" not in text and len(text) <= LIMIT, text[:LIMIT]
    assert text.isprintable(), repr(text)
    return text


def call_main(*argv: Any) -> tuple[int, str, str]:
    """main.py in this process: status, stdout, and the one line on stderr where it is 2."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = main.main([str(word) for word in argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    if status == 2:
        one_line(err.getvalue().removesuffix("\n"))
    return status, out.getvalue(), err.getvalue()
