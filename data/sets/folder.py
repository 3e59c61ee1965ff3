"""Any images sorted into class folders; the classes are those that are there."""

from data import layouts
from data.catalogue import Request, data_set
from data.sets.imagenet import MEAN, STD
from data.sources import Sources


@data_set("folder", num_classes=None, mean=MEAN, std=STD, layout=layouts.CLASS_FOLDERS)
def folder(request: Request) -> Sources:
    """Labels follow the sorted folder names."""
    return layouts.folder(request.root, request.train, request.dataset)
