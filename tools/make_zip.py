"""Packs root/train and root/val (class folders) into train.zip and val.zip with map files, for
DATA.ZIP_MODE, and checks them.

    python -m tools.make_zip pack  IMAGENET_FOLDER TARGET_FOLDER
    python -m tools.make_zip check TARGET_FOLDER    reads every member: its checksum, its image
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from pathlib import Path

from data.archives import ZipSource
from data.errors import DataError, printable
from data.images import UnreadableImage
from data.layouts import folder, zip_folder
from data.sources import FileSource


def pack(source: FileSource, target: Path, split: str) -> int:
    """Writes target/<split>.zip (stored, not compressed: images are already) and <split>_map.txt.
    Returns the number of images.
    """
    target.mkdir(parents=True, exist_ok=True)
    archive, listing = target / f"{split}.zip", target / f"{split}_map.txt"
    with (
        zipfile.ZipFile(f"{archive}.tmp", "w", zipfile.ZIP_STORED) as file,
        open(f"{listing}.tmp", "w", encoding="utf-8") as lines,
    ):
        for index in range(len(source)):
            name = printable(source.files[index].replace(os.sep, "/"))
            file.write(source.path(index), name)
            lines.write(f"{name}\t{source.labels[index]}\n")
    os.replace(f"{archive}.tmp", archive)
    os.replace(f"{listing}.tmp", listing)
    return len(source)


def check(source: ZipSource) -> list[str]:
    """'name: reason' of every image that cannot be read."""
    bad = []
    for index in range(len(source)):
        try:
            source.read(index)
        except UnreadableImage as reason:
            bad.append(f"{source.name(index)}: {reason}")
    return bad


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done and everything readable; 1: unreadable images, listed; 2: wrong layout."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_zip", description=__doc__.splitlines()[0]
    )
    parser.add_argument("command", choices=("pack", "check"))
    parser.add_argument(
        "source",
        type=Path,
        help="pack: the folder with train/ and val/; check: the folder with the archives",
    )
    parser.add_argument("target", type=Path, nargs="?", help="pack: where the archives go")
    args = parser.parse_args(argv)
    if (args.command == "pack") != (args.target is not None):
        parser.error("pack takes SOURCE and TARGET, check takes SOURCE alone")
    try:
        return (
            _pack_all(args.source, args.target)
            if args.command == "pack"
            else _check_all(args.source)
        )
    except DataError as error:
        print(error, file=sys.stderr)
        return 2


def _pack_all(source: Path, target: Path) -> int:
    sources = folder(source)
    for split in ("train", "val"):
        count = pack(getattr(sources, split), target, split)
        print(f"{printable(target / split)}.zip: {count} images")
    return 0


def _check_all(target: Path) -> int:
    sources = zip_folder(target)
    bad = check(sources.train) + check(sources.val)
    print(
        "\n".join([*bad, f"{len(sources.train) + len(sources.val)} images, {len(bad)} unreadable"])
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
