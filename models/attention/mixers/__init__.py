"""One mixer a file; every file of this folder is imported, and so registers itself."""

import importlib
import pkgutil

from .base import MIXERS

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MIXERS"]
