"""Data sets that torchvision reads and can download."""

from __future__ import annotations

from typing import Any

from data.catalogue import Request
from data.errors import DataError, layout_error


def read_split(reader: str, request: Request, layout: str, **split: Any) -> Any:
    """One split, as an object of the class torchvision.datasets.<reader>.

    Args:
        layout: the files it reads, for errors.
        split: torchvision's choice, train=True or the like.
    Raises: DataError where files are missing or damaged, or a download fails.
    """
    from torchvision import datasets  # here: the names of all data sets are needed without it

    read = getattr(datasets, reader)
    root = request.root
    try:
        if not request.download:
            return read(root, **split)
        return _download(read, root, split)
    except (RuntimeError, OSError) as error:
        if request.download:
            raise DataError(
                f"DATA.DATASET {request.dataset}: the download into '{root}' failed ({error});"
                f" fetch it elsewhere and put there {layout}"
            ) from None
        hint = "DATA.DOWNLOAD True fetches them"
        if root.exists():
            hint = f"missing files or wrong checksums; {hint}"
        raise layout_error(request.dataset, root, layout, hint=hint) from None


def _download(read, root, split: dict) -> Any:
    """One process of the machine downloads; the others find the files."""
    from filelock import FileLock  # comes with torch; here, as it needs a folder it may write to

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".download.lock"):
        return read(root, download=True, **split)
