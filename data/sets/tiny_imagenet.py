"""Tiny-ImageNet: 200 classes, 100 000 training and 10 000 validation images of 64x64.

Source: Stanford CS231n, http://cs231n.stanford.edu/tiny-imagenet-200.zip.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.catalogue import Request, data_set
from data.errors import DataError, layout_error, printable
from data.files import FileList, class_folders
from data.layouts import scan
from data.names import words
from data.sources import FileSource, Sources

LAYOUT = (
    "wnids.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt (the"
    " archive as shipped)"
)


@data_set(
    "tiny_imagenet",
    num_classes=200,
    mean=(0.4802, 0.4481, 0.3975),
    std=(0.2770, 0.2691, 0.2821),
    layout=LAYOUT,
    class_names=words,
)
def tiny_imagenet(request: Request) -> Sources:
    """As shipped, at root or root/tiny-imagenet-200; labels follow the sorted wnids."""
    root = request.root
    if not (root / "wnids.txt").is_file() and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    annotations = root / "val" / "val_annotations.txt"
    for needed in (root / "wnids.txt", annotations, root / "val" / "images"):
        if not (needed.is_file() if needed.suffix else needed.is_dir()):
            raise _layout_error(root, needed.parent)
    classes = sorted(_text(root / "wnids.txt").split())
    labels = {wnid: label for label, wnid in enumerate(classes)}
    train = None
    if request.train:
        # beside the images of each class lies a list of boxes
        files = scan(root, "train", classes, request.dataset, known=(".txt",))
        train = FileSource(root / "train", files)
    val = FileSource(root / "val" / "images", FileList(_annotated(annotations, labels)))
    return Sources(train, val, list(map(printable, classes)))


def _text(path: Path) -> str:
    return path.read_text("utf-8", "surrogateescape")


def _layout_error(root: Path, looked: Path) -> DataError:
    hint = ""
    if class_folders(root / "val"):
        hint = "for validation images sorted into class folders use DATA.DATASET folder"
    return layout_error("tiny_imagenet", root, LAYOUT, looked, hint)


def _annotated(annotations: Path, labels: dict[str, int]) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(_text(annotations).splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in labels:
            raise DataError(
                f"'{annotations}' line {number} must be 'image<TAB>wnid<TAB>...' with a wnid of"
                f" wnids.txt, got {line[:60]!r}"
            )
        yield name, labels[wnid]
