"""One modification of attention a file; every file of this folder is imported, and so registers
itself.
"""

import importlib
import pkgutil

from .base import (
    MODIFIERS,
    BranchModifier,
    LogitMixer,
    MapModifier,
    Modifier,
    OutputModifier,
    ProjectionModifier,
    TermModifier,
    TokenModifier,
    WeightModifier,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "MODIFIERS",
    "BranchModifier",
    "LogitMixer",
    "MapModifier",
    "Modifier",
    "OutputModifier",
    "ProjectionModifier",
    "TermModifier",
    "TokenModifier",
    "WeightModifier",
]
