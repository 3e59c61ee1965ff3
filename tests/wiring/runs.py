"""Whole runs of main.py in this process, and what they leave behind as plain data.

A run is judged from outside: its metrics, checkpoints, files and log lines, and what it asks of
torch. Nothing here has to change when code moves from one module to another.
"""

import hashlib
import io
import json
import logging
import os
import re
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import yaml
from safetensors import safe_open
from torch.optim.optimizer import register_optimizer_step_post_hook

import main

# Two updates an epoch of a ViT with four tokens: about 50 ms.
SETTINGS = {
    "DATA.DATASET": "digits",
    "DATA.IMG_SIZE": 16,
    "DATA.BATCH_SIZE": 8,
    "DATA.NUM_WORKERS": 0,
    "MODEL.TYPE": "vit",
    "MODEL.NAME": "small",
    "MODEL.VIT.PATCH_SIZE": 8,
    "MODEL.VIT.EMBED_DIM": 8,
    "MODEL.VIT.DEPTH": 1,
    "MODEL.VIT.NUM_HEADS": 2,
    "TRAIN.EPOCHS": 1,
    "TRAIN.WARMUP_EPOCHS": 0,
    "TRAIN.BASE_LR": 0.1,
    "AUG.AFFINE": True,
    "AUG.AUTO_AUGMENT": "none",
    "AUG.REPROB": 0.0,
    "AUG.MIXUP": 0.0,
    "AUG.CUTMIX": 0.0,
    "LOG.TENSORBOARD": False,
    "LOG.PLOT": False,
    "PRINT_FREQ": 1,
    "DEVICE": "cpu",
}
PLACE = "output/small/default"
DESCRIPTIONS = ("config", "lr_scheduler")  # they repeat settings, arrived or not
NUMBER = re.compile(r"\d+([.:]\d+)*(e[+-]?\d+)?")


def few_digits():
    """Three images of each digit, the first of which is for testing."""
    labels = np.repeat(np.arange(10), 3)
    images = np.random.RandomState(0).randint(0, 17, (30, 8, 8)).astype(float)
    return SimpleNamespace(images=images, target=labels)


@contextmanager
def recording(wandb=None):
    """What a run asks of torch, as a list; the slow or lasting part of it is not done. wandb: takes
    the place of Weights & Biases.
    """
    asked = []

    def noted(name, result=None):
        def call(*args, **options):
            plain = [value for value in args if isinstance(value, (bool, int, float, str))]
            asked.append([name, plain, {key: repr(value) for key, value in options.items()}])
            return result or (args[0] if args else None)

        return call

    def renamed(source, target, real=os.replace):
        asked.append(["replace", Path(target).name])
        real(source, target)

    def stepped(optimizer, *_):
        asked.append(["seed", torch.initial_seed()])

    def convolved(module, inputs, result):
        if isinstance(module, torch.nn.Conv2d):
            weight = module.weight
            kind = "training" if module.training else "evaluation"
            strides = [inputs[0].stride(), weight.stride()]
            asked.append([kind, len(inputs[0]), *strides, str(result.dtype), digest(weight)])

    board = SimpleNamespace(
        SummaryWriter=noted(
            "SummaryWriter", SimpleNamespace(add_scalar=noted("scalar"), close=noted("close"))
        )
    )
    hooks = (
        register_optimizer_step_post_hook(stepped),
        torch.nn.modules.module.register_module_forward_hook(convolved),
    )
    patches = (
        patch("sklearn.datasets.load_digits", few_digits),
        patch("os.fsync", lambda handle: None),
        patch("yaml.SafeDumper", getattr(yaml, "CSafeDumper", yaml.SafeDumper)),
        patch("os.replace", renamed),
        patch("torch.compile", noted("compile")),
        patch("torch.set_num_threads", noted("threads")),
        patch("torch.use_deterministic_algorithms", noted("deterministic")),
        patch.dict(sys.modules, {"torch.utils.tensorboard": board, "wandb": wandb}),
    )
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        try:
            yield asked
        finally:
            for hook in hooks:
                hook.remove()


class Lines(logging.Handler):
    """The messages of a log, and those that a progress bar replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.behind_bar: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if getattr(record, "progress", False):
            self.behind_bar.append(NUMBER.sub("#", record.getMessage()))


def digest(tensor: torch.Tensor) -> str:
    """Type, shape and bytes of a tensor, in short."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.md5(raw).hexdigest()[:12]}"


def plain(value):
    """Nested data with digests for tensors."""
    if isinstance(value, torch.Tensor):
        return digest(value) if value.numel() else "empty"
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def content(path: Path):
    """What a file of a run says, without the settings, which change with every key."""
    if path.name == "last.pth":
        payload = torch.load(path, weights_only=False)  # C reads it, three times as fast
        return plain({key: payload[key] for key in payload if key not in DESCRIPTIONS})
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        return path.read_text()
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return [file.metadata(), {name: digest(file.get_tensor(name)) for name in file.keys()}]
    return "a file"


def run(
    folder: Path,
    settings: dict | None = None,
    words: tuple = (),
    times: int = 1,
    numbers: bool = False,
    wandb=None,
) -> dict:
    """main.py with SETTINGS and `settings` as --opts, output in `folder`: what it left behind.

    words: more flags. times: how often it is called. numbers: log lines keep theirs.
    """
    argv = command(folder, settings, words)
    log, errors = Lines(), io.StringIO()
    root = logging.getLogger()
    root.addHandler(log)
    try:
        with recording(wandb) as asked, redirect_stderr(errors), redirect_stdout(io.StringIO()):
            status = [main.main(argv) for _ in range(times)]
    finally:
        root.removeHandler(log)
    files = sorted(path for path in (folder / "output").rglob("*") if path.is_file())
    return {
        "status": status,
        "errors": errors.getvalue().replace(str(folder), ""),
        "asked": asked,
        "log": log.lines if numbers else [without(line, folder) for line in log.lines],
        "behind_bar": log.behind_bar,
        "files": {str(path.relative_to(folder)): content(path) for path in files},
    }


def command(folder: Path, settings: dict | None = None, words: tuple = ()) -> list[str]:
    """The arguments of main.py for `run`."""
    chosen = SETTINGS | {"OUTPUT": str(folder / "output")} | (settings or {})
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump(nested(SETTINGS)))
    argv = ["--cfg", str(base), *words, "--opts"]
    return argv + [str(word) for pair in chosen.items() for word in pair]


def without(line: str, folder: Path) -> str:
    """A log line without numbers and place."""
    return NUMBER.sub("#", line.replace(str(folder), ""))


def nested(settings: dict) -> dict:
    """Dotted keys as the tree that a YAML has."""
    tree: dict = {}
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def differences(one, other, place: str = "") -> list[str]:
    """Where two nested structures differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [
            line
            for key in keys
            for line in differences(one.get(key), other.get(key), f"{place}/{key}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for n, (x, y) in pairs for line in differences(x, y, f"{place}/{n}")]
    return [] if one == other else [f"{place}: {one!r} -> {other!r}"[:300]]


def payload(folder: Path, name: str = "last.pth") -> dict:
    """A checkpoint of a run."""
    return torch.load(folder / PLACE / name, weights_only=True)


def metrics(folder: Path, kind: str) -> list[dict]:
    """The entries of one kind in a run's metrics.jsonl."""
    lines = (folder / PLACE / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def replaced(left: dict, name: str) -> int:
    """How often a run has written a file anew."""
    return left["asked"].count(["replace", name])


def attributes(thing, names) -> dict:
    """Some attributes of an object."""
    return {name: getattr(thing, name) for name in names}
