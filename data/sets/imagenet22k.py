"""ImageNet-22K: the 21 841 classes of the autumn 2011 release, by Swin's two lists of files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from data import names
from data.catalogue import Request, data_set
from data.errors import DataError, layout_error, printable
from data.files import FileList
from data.sets.imagenet import MEAN, STD
from data.sources import FileSource, Sources

NUM_CLASSES = 21841
LAYOUT = (
    "ILSVRC2011fall_whole_map_train.txt and ILSVRC2011fall_whole_map_val.txt, JSON lists of"
    " [relative path, label]"
)
# One entry and what precedes it.
_PAIR = re.compile(r'[\[,]\s*\[\s*("(?:[^"\\]|\\.)*")\s*,\s*([0-9]{1,9})\s*\]\s*')


def class_names(classes: list[str]) -> list[str]:
    """The words of each class; the lists name labels only."""
    return names.words(names.imagenet22k_wnids())


@data_set(
    "imagenet22K",
    num_classes=NUM_CLASSES,
    mean=MEAN,
    std=STD,
    layout=LAYOUT,
    class_names=class_names,
)
def imagenet22k(request: Request) -> Sources:
    """Images lie at root/<relative path>."""
    return Sources(
        _listed(request.root, "train") if request.train else None,
        _listed(request.root, "val"),
        [str(label) for label in range(NUM_CLASSES)],
    )


def _listed(root: Path, split: str) -> FileSource:
    listing = root / f"ILSVRC2011fall_whole_map_{split}.txt"
    if not listing.is_file():
        raise layout_error("imagenet22K", root, LAYOUT)
    files = FileList(_json_pairs(listing))
    if not len(files) or files.labels.max() >= NUM_CLASSES or files.labels.min() < 0:
        raise DataError(
            f"'{listing}' must list images with labels 0..{NUM_CLASSES - 1}; found {len(files)}"
            f" images, labels {files.labels.min(initial=0)}..{files.labels.max(initial=0)}"
        )
    source = FileSource(root, files)
    if not os.path.exists(source.path(0)):
        raise DataError(
            f"'{listing}' lists '{printable(files[0])}', but there is no file '{source.name(0)}'; "
            "its paths are relative to DATA.DATA_PATH"
        )
    return source


def _json_pairs(listing: Path) -> Iterator[tuple[str, int]]:
    """Entries one at a time: json.load would hold 14 million lists at once, several GB in every
    process.
    """
    text, at = listing.read_text("utf-8", "surrogateescape").strip(), 0
    while entry := _PAIR.match(text, at):
        try:
            yield json.loads(entry[1], strict=False), int(entry[2])
        except ValueError:  # an unknown escape
            break
        at = entry.end()
    if text[at:] != "]":
        raise DataError(
            f"'{listing}' must be a JSON list of [relative path, label]; at character {at} found"
            f" {text[at : at + 40]!r}"
        )
