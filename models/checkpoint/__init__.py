"""The package `checkpoint` under its earlier name."""

from checkpoint import *  # noqa: F403
from checkpoint import __all__ as __all__
