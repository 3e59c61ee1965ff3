"""The data sets, one file each (two where they share a format): importing this package registers
all of them in DATASETS.
"""

import importlib
import pkgutil

from data.catalogue import DATASETS

__all__ = ["DATASETS"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
