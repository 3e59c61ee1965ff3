"""Small data sets in the real layouts, and configs for them."""

import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from config import load_config
from data.catalogue import Request
from data.sets import DATASETS
from data.sources import Sources

PLAIN = {"AUG.AUTO_AUGMENT": "none", "AUG.MIXUP": 0.0, "AUG.CUTMIX": 0.0}


def settings(tmp_path: Path, **keys):
    """A frozen config; keys are given as DATA__BATCH_SIZE=4. Defaults: small, one process, one
    thread.
    """
    values = {"DATA.BATCH_SIZE": 4, "DATA.IMG_SIZE": 40, "DATA.NUM_WORKERS": 0, "DEVICE": "cpu"}
    values |= {
        key.replace("__", "."): str(value) if isinstance(value, Path) else value
        for key, value in keys.items()
    }
    tree: dict = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = list(value) if isinstance(value, tuple) else value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(str(path))


def read(dataset: str, root: Path = Path(), **options) -> Sources:
    """What the reader of a data set finds below `root`; options: fields of Request."""
    return DATASETS[dataset].read(Request(dataset=dataset, root=root, **options))


def picture(number: int, size: tuple[int, int] = (50, 60)) -> Image.Image:
    """A smooth RGB image that differs from number to number; size (h, w)."""
    coarse = np.random.RandomState(number).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def save(path: Path, number: int, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path, **options)
    return path


def class_folder(root: Path, classes=("ant", "bee", "cat"), train: int = 5, val: int = 3) -> Path:
    """root/{train,val}/<class>/<i>.jpg"""
    number = 0
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            for _ in range(count):
                save(root / split / name / f"{number:03d}.jpg", number)
                number += 1
    return root


def zipped(
    folders: Path, root: Path, prefix: bool = False, compression: int = zipfile.ZIP_STORED
) -> Path:
    """train.zip and val.zip of a class folder, without map files; prefix: members begin with train/
    or val/.
    """
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        base = folders if prefix else folders / split
        with zipfile.ZipFile(root / f"{split}.zip", "w", compression) as archive:
            for file in sorted((folders / split).rglob("*.jpg")):
                archive.write(file, file.relative_to(base).as_posix())
    return root


def map_files(folders: Path, root: Path) -> None:
    """train_map.txt and val_map.txt beside the archives, as Swin's zip mode expects them."""
    for split in ("train", "val"):
        classes = sorted(folder.name for folder in (folders / split).iterdir())
        lines = [
            f"{file.relative_to(folders / split).as_posix()}\t{classes.index(file.parent.name)}"
            for file in sorted((folders / split).rglob("*.jpg"))
        ]
        (root / f"{split}_map.txt").write_text("\n".join(lines) + "\n")


def imagenet22k(root: Path, count: int = 6) -> Path:
    for split in ("train", "val"):
        entries = []
        for number in range(count):
            save(
                root / "fall11_whole" / f"n{number}" / f"{split}_{number}.JPEG",
                number,
                format="JPEG",
            )
            entries.append([f"fall11_whole/n{number}/{split}_{number}.JPEG", 21840 - number])
        (root / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(json.dumps(entries))
    return root


def tiny_imagenet(root: Path, wnids=("n02124075", "n01443537", "n04067472")) -> Path:
    """The archive's layout: wnids.txt is not sorted, validation images lie flat."""
    lines = []
    for number, wnid in enumerate(wnids):
        save(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", number, format="JPEG")
        save(root / "val" / "images" / f"val_{number}.JPEG", 10 + number, format="JPEG")
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62")
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def _pickled(path: Path, content: dict) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def cifar(root: Path, reader, monkeypatch, per_file: int = 4) -> Path:
    """Files in CIFAR's own format; the reader's list of checksums is replaced by these files'
    own.
    """
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    labels = "fine_labels" if "100" in reader.base_folder else "labels"
    sums = {}
    for name, _ in reader.train_list + reader.test_list:
        data = random.randint(0, 256, (per_file, 3072), dtype=np.uint8)
        sums[name] = _pickled(
            folder / name, {"data": data, labels: random.randint(0, 10, per_file).tolist()}
        )
    classes = 100 if labels == "fine_labels" else 10
    meta = _pickled(
        folder / reader.meta["filename"],
        {reader.meta["key"]: [f"thing {i}" for i in range(classes)]},
    )
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(
            reader, split, [[name, sums[name]] for name, _ in getattr(reader, split)]
        )
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": meta})
    return root


def svhn(root: Path, reader, monkeypatch, count: int = 6) -> Path:
    """MATLAB files in SVHN's own format: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, (url, name, _) in reader.split_list.items():
        if split == "extra":
            continue
        images = np.random.RandomState(len(split)).randint(
            0, 256, (32, 32, 3, count), dtype=np.uint8
        )
        savemat(
            root / name,
            {
                "X": images,
                "y": (np.arange(count) % 10 + 1 + (10 - count) * (np.arange(count) == count - 1))[
                    :, None
                ],
            },
        )
        splits[split] = [
            url,
            name,
            hashlib.md5((root / name).read_bytes(), usedforsecurity=False).hexdigest(),
        ]
    monkeypatch.setattr(reader, "split_list", {**reader.split_list, **splits})
    return root
