"""Images: where they lie, how they are read, changed, ordered and batched. data.build turns a
config into loaders.
"""

from data.build import Data, build_data
from data.errors import DataError, worker_failure

__all__ = ["Data", "DataError", "build_data", "worker_failure"]
