"""Leaves the process as it was after tests that call main.py in it."""

import logging

import pytest


@pytest.fixture(autouse=True)
def own_log():
    """Removes the log handlers that a run has added."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
