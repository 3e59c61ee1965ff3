"""ImageNet-1K: 1 281 167 training and 50 000 validation images of 1000 classes.

Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015.
"""

from data.catalogue import Request, data_set
from data.layouts import ARCHIVES, CLASS_FOLDERS, folder_or_zip
from data.names import imagenet_classes
from data.sources import Sources

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@data_set(
    "imagenet",
    num_classes=1000,
    mean=MEAN,
    std=STD,
    layout=f"{CLASS_FOLDERS}, or {ARCHIVES}",
    class_names=imagenet_classes,
    zip=True,
)
def imagenet(request: Request) -> Sources:
    """Class folders named by wnid, or archives of them."""
    return folder_or_zip(request)
