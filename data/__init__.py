"""Images: where they lie, how they are read, changed, ordered and batched.

data.build turns a config into loaders; data.sets holds the data sets. `Data` and `build_data` are
imported when first used, so that the names of the data sets are known without torchvision.
"""

from data.errors import DataError, worker_failure

__all__ = ["Data", "DataError", "build_data", "worker_failure"]


def __getattr__(name: str):
    if name not in ("Data", "build_data"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from data import build

    return getattr(build, name)
