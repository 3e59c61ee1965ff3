"""Any images sorted into class folders; the classes are those that are there."""

from data.catalogue import Request, data_set
from data.layouts import ARCHIVES, CLASS_FOLDERS, folder_or_zip
from data.sets.imagenet import MEAN, STD
from data.sources import Sources


@data_set(
    "folder",
    num_classes=None,
    mean=MEAN,
    std=STD,
    layout=f"{CLASS_FOLDERS}, or {ARCHIVES}",
    zip=True,
)
def folder(request: Request) -> Sources:
    """Labels follow the sorted folder names, or the map files of archives."""
    return folder_or_zip(request)
