"""Each value arrives where it belongs, unchanged: not swapped with a neighbour, not negated, not
replaced by a default. tests/test_arrival.py asks of every key whether it arrives at all.
"""

import inspect
import itertools
import json
import os
import re
import signal
import sys
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision import transforms as T

from config import KEYS, ConfigError
from data import build_data
from engine.progress import Progress
from lr_scheduler import Rates, build_schedule
from models import build_model
from models.base.backbone import BACKBONES
from models.build import ModelError
from tests.arrival import (
    COMPANY,
    DIGITS,
    FAMILIES,
    FOLDER,
    SECTIONS,
    SMALL,
    config_of,
    model_keys,
    model_settings,
    others,
    value_of,
)
from tests.data import fakes
from tests.small_runs import differences, run

PLACE = "output/small/default"
AVERAGED = {"MODEL.EMA.ENABLE": True, "MODEL.EMA.DECAY": 0.5}


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


# ---- main.py: how far, how often, what is kept


@pytest.mark.parametrize(
    "settings, saves, updates",
    [({"TRAIN.MAX_STEPS": 1}, 1, [1]), ({"TRAIN.SAVE_STEPS": 1}, 2, [1, 2])],
)
def test_a_run_saves_and_stops_after_the_updates_it_is_told(settings, saves, updates, tmp_path):
    left = run(tmp_path, settings)
    assert replaced(left, "last.pth") == saves
    assert [entry["step"] for entry in metrics(tmp_path, "train")] == updates


@pytest.mark.parametrize(
    "settings, epochs",
    [
        ({"SAVE_FREQ": 2, "TRAIN.KEEP": 0}, {0, 2, 3}),
        ({"SAVE_FREQ": 1, "TRAIN.KEEP": 2}, {2, 3}),
        ({"SAVE_FREQ": 2, "TRAIN.KEEP": 1}, {3}),
    ],
)
def test_a_run_keeps_the_epochs_it_is_told(settings, epochs, tmp_path):
    run(tmp_path, settings | {"TRAIN.EPOCHS": 4, "TRAIN.START_EPOCH": 0})
    names = [path.name for path in (tmp_path / PLACE).glob("ckpt_epoch_*.pth")]
    assert {int(re.search(r"\d+", name)[0]) for name in names} == epochs


def test_a_run_begins_at_the_epoch_it_is_told(tmp_path):
    run(tmp_path, {"TRAIN.START_EPOCH": 1, "TRAIN.EPOCHS": 3})
    assert {entry["epoch"] for entry in metrics(tmp_path, "train")} == {1, 2}


def test_what_is_asked_of_torch_is_what_is_configured(tmp_path):
    on = run(
        tmp_path / "on",
        {
            "TRAIN.THREADS": 3,
            "TRAIN.DETERMINISTIC": True,
            "MODEL.COMPILE": True,
            "LOG.TENSORBOARD": True,
            "LOG.PLOT": True,
        },
    )
    off = run(tmp_path / "off")
    calls = {call[0]: call[1] for call in on["asked"] if call[0] in ("threads", "deterministic")}
    assert calls == {"threads": [3], "deterministic": [True]}
    assert ["deterministic", [False], {}] in off["asked"]
    names = ("threads", "compile", "SummaryWriter")
    for left, expected in ((on, 1), (off, 0)):
        counts = [sum(call[0] == name for call in left["asked"]) for name in names]
        assert counts == [expected] * 3
    assert f"{PLACE}/curves.png" in on["files"] and f"{PLACE}/curves.png" not in off["files"]


def test_the_log_says_the_epochs_and_batches_of_this_run(tmp_path):
    said = run(tmp_path, {"TRAIN.EPOCHS": 2, "PRINT_FREQ": 2}, numbers=True)["log"]
    train = [line.split("\t")[0] for line in said if line.startswith("Train:")]
    assert train == ["Train: [0/2][0/2]", "Train: [1/2][0/2]"]
    assert sum(line.startswith("Test: ") for line in said) == 2  # the first batch of two, twice
    assert any("Test: [0/2]" in line for line in said)


@pytest.mark.parametrize("leads, kinds", [(True, (2, 2)), (False, (2, 0))])
def test_the_average_is_evaluated_and_exported_where_it_leads(leads, kinds, tmp_path):
    run(tmp_path, AVERAGED | {"MODEL.EMA.EVAL": leads, "TRAIN.EPOCHS": 2})
    assert (len(metrics(tmp_path, "val")), len(metrics(tmp_path, "val_ema"))) == kinds
    with safe_open(tmp_path / PLACE / "model.safetensors", "pt") as file:
        exported = {name: file.get_tensor(name) for name in file.keys()}
        assert file.metadata()["averaged"] == str(leads)
    best = payload(tmp_path, "best.pth")
    chosen = best["ema"] if leads else best["model"]
    assert all(torch.equal(exported[name], chosen[name]) for name in exported)


def test_the_average_follows_its_decay(tmp_path):
    run(tmp_path, AVERAGED | {"MODEL.EMA.DECAY": 0.0})
    saved = payload(tmp_path)
    assert all(torch.equal(saved["ema"][name], value) for name, value in saved["model"].items())


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_begin_with_the_same_weights_and_draw_numbers_of_their_own(rank, tmp_path):
    alone = run(tmp_path / "alone", {"SEED": 7, "MODEL.DROP_RATE": 0.5})
    with patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": "1"}):
        left = run(tmp_path / "ranked", {"SEED": 7, "MODEL.DROP_RATE": 0.5})
    assert {call[1] for call in left["asked"] if call[0] == "seed"} == {7 + rank}
    first = [next(c[-1] for c in one["asked"] if c[0] == "training") for one in (alone, left)]
    assert first[0] == first[1]
    files = {Path(name).name for name in left["files"]}
    assert f"log_rank{rank}.txt" in files and ("last.pth" in files) == (rank == 0)


@pytest.mark.parametrize("sequential", [False, True])
def test_only_shared_evaluations_are_added_up_over_processes(sequential, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with patch("torch.distributed.all_reduce", wraps=dist.all_reduce) as added:
            left = run(tmp_path, {"TEST.SEQUENTIAL": sequential})
    finally:
        dist.destroy_process_group()
    assert left["status"] == [0] and added.call_count == (0 if sequential else 1)


def test_channels_last_reaches_weights_and_images(tmp_path):
    for wanted in (True, False):
        left = run(tmp_path / str(wanted), {"MODEL.CHANNELS_LAST": wanted})
        _, _, images, weight, *_ = next(call for call in left["asked"] if call[0] == "training")
        assert (images[1] == 1, weight[1] == 1) == (wanted, wanted)


def test_autocast_reaches_training_evaluation_and_timing(tmp_path):
    low = {"AMP_DTYPE": "bfloat16"}
    trained = run(tmp_path / "train", low)["asked"]
    last = str(tmp_path / "train" / PLACE / "last.pth")
    tested = run(tmp_path / "test", low | {"MODEL.RESUME": last}, ("--eval",))["asked"]
    timed = run(tmp_path / "time", low, ("--throughput",))["asked"]
    for asked, kinds in ((trained, {"training", "evaluation"}), (tested, {"evaluation"})):
        calls = [call for call in asked if call[0] in ("training", "evaluation")]
        assert {call[0] for call in calls} == kinds
        assert {call[-2] for call in calls} == {"torch.bfloat16"}
    assert "torch.bfloat16" in {call[-2] for call in timed if call[0] == "evaluation"}


def test_timing_takes_batch_size_and_channels_of_the_settings(tmp_path):
    settings = {"DATA.BATCH_SIZE": 6, "DATA.IMG_SIZE": "(16, 24)", "MODEL.VIT.IN_CHANS": 1}
    left = run(tmp_path, settings, ("--throughput",), numbers=True)
    assert any("batch_size 6 " in line and "image 16x24" in line for line in left["log"])
    timed = [call for call in left["asked"] if call[0] == "evaluation"]
    assert timed[0][1:3] == [6, (384, 384, 24, 1)]


def test_the_classes_and_their_accuracy_are_written_where_asked_for(tmp_path):
    run(tmp_path, {"TEST.PER_CLASS": True})
    rows = (tmp_path / PLACE / "per_class.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [[str(digit), "1"] for digit in range(10)]


def test_a_checkpoint_holds_the_settings_and_says_what_its_weights_are(tmp_path):
    run(tmp_path, {"MODEL.ATTENTION.MODIFIERS": "['qk_residual']", "TRAIN.KEEP": 5})
    saved = payload(tmp_path)
    assert saved["config"]["TRAIN"]["KEEP"] == 5
    assert saved["metadata"]["qk_residual"] != "none"
    with safe_open(tmp_path / PLACE / "model.safetensors", "pt") as file:
        assert file.metadata()["qk_residual"] == saved["metadata"]["qk_residual"]
    assert json.loads((tmp_path / PLACE / "config.json").read_text())["TRAIN"]["KEEP"] == 5


# ---- going on


@contextmanager
def stopped_after(updates: int):
    """A SIGTERM comes with this update."""
    count = itertools.count(1)

    def stop(*_):
        if next(count) == updates:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def test_a_run_stopped_by_a_signal_goes_on_and_ends_as_one_that_never_stopped(tmp_path):
    settings = AVERAGED | {"TRAIN.EPOCHS": 3, "MODEL.DROP_RATE": 0.3, "AUG.MIXUP": 0.8}
    whole = run(tmp_path / "whole", settings)["files"]
    with stopped_after(3):
        left = run(tmp_path / "parts", settings)
    assert left["status"] == [128 + signal.SIGTERM]
    assert payload(tmp_path / "parts")["progress"]["update"] == 3
    parts = run(tmp_path / "parts", settings)["files"]
    for name in ("last.pth", "metrics.jsonl", "model.safetensors"):
        assert differences(whole[f"{PLACE}/{name}"], parts[f"{PLACE}/{name}"]) == []


# ---- evaluating


def losses_said(left: dict) -> list[float]:
    """The mean losses of whole evaluations, from the last line of each; two batches."""
    lines = [line for line in left["log"] if line.startswith("Test: [1/2]")]
    return [float(re.search(r"Loss \S+ \((\S+)\)", line)[1]) for line in lines]


def test_an_evaluation_repeats_what_training_found(tmp_path):
    settings = AVERAGED | {"TRAIN.BASE_LR": 1.0}
    run(tmp_path / "train", settings)
    place = tmp_path / "train" / PLACE
    plainly, averaged = (
        metrics(tmp_path / "train", kind)[0]["loss"] for kind in ("val", "val_ema")
    )
    expected = {
        f"--resume {place / 'last.pth'}": [plainly, averaged],
        f"--resume {place / 'last.pth'} off": [plainly],
        f"--pretrained {place / 'model.safetensors'}": [averaged],
        f"--pretrained {place / 'last.pth'}": [plainly],
    }
    for number, (words, found) in enumerate(expected.items()):
        flag, file, *off = words.split()
        more = {"MODEL.EMA.EVAL": False, "PRINT_FREQ": 1} if off else {}
        left = run(tmp_path / str(number), AVERAGED | more, ("--eval", flag, file), numbers=True)
        assert left["status"] == [0], left["errors"]
        assert losses_said(left) == pytest.approx(found, abs=2e-4), words


# ---- the picture and the promised end


def test_the_end_of_the_run_is_reckoned_from_its_settings(tmp_path):
    made = []
    build = Progress.__init__

    def record(progress, layout, **options):
        made.append((layout, options))
        build(progress, layout, **options)

    settings = {"TRAIN.EPOCHS": 3, "TRAIN.MAX_STEPS": 2, "TRAIN.ACCUMULATION_STEPS": 2}
    with patch.object(Progress, "__init__", record):
        run(tmp_path, settings)
    [(layout, options)] = made
    assert (layout.batch_size, layout.world_size, layout.accumulation) == (8, 1, 2)
    assert attributes(SimpleNamespace(**options), ("epochs", "batches", "max_steps")) == {
        "epochs": 3,
        "batches": 2,
        "max_steps": 2,
    }


@pytest.mark.parametrize("smoothing, words", [(0.0, ""), (0.2, "smoothing")])
def test_the_picture_says_what_the_training_loss_is(smoothing, words, tmp_path):
    legends = []

    def look(figure, *_, **__):
        legends.extend(axes.get_legend_handles_labels()[1] for axes in figure.axes)

    settings = {"LOG.PLOT": True, "MODEL.LABEL_SMOOTHING": smoothing}
    with patch("matplotlib.figure.Figure.savefig", look):
        run(tmp_path, settings)
    texts = str(legends)
    assert "train" in texts and ("smoothing" in texts) == bool(words)


# ---- weights to start from, and a teacher


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, {"SEED": 3})["status"] == [0]
    return folder


def test_weights_to_start_from_are_evaluated_first(trained, tmp_path):
    weights = trained / PLACE / "model.safetensors"
    run(tmp_path, {"MODEL.PRETRAINED": weights})
    first, last = metrics(tmp_path, "val")
    assert first["step"] == 0 and first["loss"] == metrics(trained, "val")[0]["loss"]
    assert last["step"] == 2 and last["loss"] != first["loss"]


@pytest.mark.parametrize("reset", [False, True])
def test_the_head_begins_anew_where_asked(reset, trained, tmp_path):
    weights = trained / PLACE / "model.safetensors"
    settings = {"MODEL.PRETRAINED": weights, "MODEL.HEAD_RESET": reset, "TRAIN.BASE_LR": 0}
    run(tmp_path, settings | {"TRAIN.MIN_LR": 0, "TRAIN.WARMUP_LR": 0})
    before, after = payload(trained)["model"], payload(tmp_path)["model"]
    assert torch.equal(before["blocks.0.mlp.fc1.weight"], after["blocks.0.mlp.fc1.weight"])
    assert torch.equal(before["head.weight"], after["head.weight"]) != reset


def test_a_teacher_without_a_share_changes_nothing_and_one_with_all_of_it_decides(
    trained, tmp_path
):
    distill = {
        "TRAIN.DISTILL.KIND": "soft",
        "TRAIN.DISTILL.TEACHER": trained / "base.yaml",
        "TRAIN.DISTILL.TEACHER_WEIGHTS": trained / PLACE / "model.safetensors",
        "TRAIN.DISTILL.TAU": 2.0,
    }
    runs = {"plain": {}, "none": distill | {"TRAIN.DISTILL.ALPHA": 0.0}}
    for smoothing in (0.0, 0.3):  # of the labels, which a teacher with all of the share outweighs
        options = {"TRAIN.DISTILL.ALPHA": 1.0, "MODEL.LABEL_SMOOTHING": smoothing}
        runs[f"all {smoothing}"] = distill | options
    left = {name: run(tmp_path / name, settings) for name, settings in runs.items()}
    weights = {name: one["files"][f"{PLACE}/last.pth"]["model"] for name, one in left.items()}
    assert weights["plain"] == weights["none"]
    assert weights["all 0.0"] == weights["all 0.3"] != weights["plain"]


# ---- what the optimizer holds


def test_the_optimizer_has_the_settings_and_the_scaled_rate(tmp_path):
    run(
        tmp_path,
        {
            "TRAIN.BASE_LR": 0.64,
            "TRAIN.WARMUP_LR": 0.32,
            "TRAIN.MIN_LR": 0.064,
            "TRAIN.WARMUP_EPOCHS": 1,
            "TRAIN.EPOCHS": 3,
            "TRAIN.WEIGHT_DECAY": 0.3,
            "TRAIN.OPTIMIZER.BETAS": (0.7, 0.8),
            "TRAIN.OPTIMIZER.EPS": 1e-3,
        },
    )
    decayed, spared = payload(tmp_path)["optimizer"]["param_groups"]
    for group, decay in ((decayed, 0.3), (spared, 0.0)):
        found = [group[name] for name in ("betas", "eps", "weight_decay")]
        assert found == [(0.7, 0.8), 1e-3, decay]
    rates = [entry["lr"] for entry in metrics(tmp_path, "train")]
    # per 512 images; batches of 8; two updates an epoch
    assert rates[0] == pytest.approx(0.32 / 64)
    assert max(rates) == pytest.approx(0.64 / 64)
    assert rates[-1] > 0.064 / 64


def test_sgd_has_its_momentum(tmp_path):
    run(tmp_path, {"TRAIN.OPTIMIZER.NAME": "sgd", "TRAIN.OPTIMIZER.MOMENTUM": 0.7})
    group = payload(tmp_path)["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["nesterov"]) == (0.7, True)


# ---- errors


ERRORS = {
    "an unknown key": ({"TRAIN.NO_SUCH": 1}, "TRAIN.NO_SUCH"),
    "heads that do not divide": ({"MODEL.VIT.NUM_HEADS": 3}, "3"),
    "no data": ({"DATA.DATASET": "folder", "AUG.AFFINE": False}, "DATA.DATA_PATH"),
    "no weights": ({"MODEL.PRETRAINED": "/no/such/file.pth"}, "/no/such/file.pth"),
    "no exact decay": (
        {"TRAIN.OPTIMIZER.NAME": "lamb", "TRAIN.QK_WEIGHT_DECAY": 0.5},
        "TRAIN.QK_WEIGHT_DECAY",
    ),
    "no update": ({"TRAIN.ACCUMULATION_STEPS": 3}, "TRAIN.ACCUMULATION_STEPS"),
    "no log": ({"LOG.WANDB": True}, "LOG.WANDB"),
    "no weights to evaluate": ({"EVAL_MODE": True}, "--resume"),
}


@pytest.mark.parametrize("settings, words", ERRORS.values(), ids=ERRORS)
def test_what_a_user_can_mend_is_told_in_one_line(settings, words, tmp_path):
    left = run(tmp_path, settings)
    assert left["status"] == [2]
    assert left["errors"].startswith("main.py: error") and words in left["errors"]
    assert left["errors"].count("\n") == 1


# ---- data


RECIPE = {
    "AUG.AUTO_AUGMENT": "none",
    "AUG.SCALE": (0.21, 0.92),
    "AUG.RATIO": (0.83, 1.24),
    "AUG.HFLIP": 0.31,
    "AUG.COLOR_JITTER": 0.27,
    "AUG.REPROB": 0.41,
    "AUG.REMODE": "rand",
    "AUG.RECOUNT": 3,
    "AUG.REAREA": (0.05, 0.25),
    "AUG.MIXUP": 0.71,
    "AUG.CUTMIX": 0.62,
    "AUG.CUTMIX_MINMAX": (0.15, 0.85),
    "AUG.MIXUP_PROB": 0.53,
    "AUG.MIXUP_SWITCH_PROB": 0.44,
    "AUG.MIXUP_MODE": "elem",
    "MODEL.LABEL_SMOOTHING": 0.07,
    "DATA.INTERPOLATION": "lanczos",
    "DATA.CROP_RATIO": 0.8,
    "DATA.MEAN": (0.1, 0.2, 0.3),
    "DATA.STD": (0.4, 0.5, 0.6),
    "DATA.IMG_SIZE": (40, 48),
}
ERASING = {
    "probability": 0.41,
    "min_area": 0.05,
    "max_area": 0.25,
    "min_count": 1,
    "max_count": 3,
    "rand_color": True,
    "per_pixel": False,
}


def attributes(thing, names) -> dict:
    """Some attributes of an object."""
    return {name: getattr(thing, name) for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few images in three classes."""
    return str(fakes.class_folder(tmp_path_factory.mktemp("images")))


def test_augmentation_has_the_values_of_the_settings(folder):
    data = build_data(config_of(FOLDER | RECIPE | {"DATA.DATA_PATH": folder}))
    steps = {type(step).__name__: step for step in data.train_loader.dataset.transform.transforms}
    crop = steps["RandomResizedCropAndInterpolation"]
    assert attributes(crop, ("size", "scale", "ratio")) == {
        "size": (40, 48),
        "scale": (0.21, 0.92),
        "ratio": (0.83, 1.24),
    }
    assert crop.interpolation == T.InterpolationMode.LANCZOS
    assert steps["RandomHorizontalFlip"].p == 0.31
    assert steps["ColorJitter"].brightness == pytest.approx((0.73, 1.27))
    assert attributes(steps["RandomErasing"], ERASING) == ERASING
    for loader in (data.train_loader, data.val_loader):
        norm = [s for s in loader.dataset.transform.transforms if isinstance(s, T.Normalize)][0]
        assert torch.as_tensor(norm.mean).tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert torch.as_tensor(norm.std).tolist() == pytest.approx([0.4, 0.5, 0.6])
    resize, centre, *_ = data.val_loader.dataset.transform.transforms
    assert (resize.size, tuple(centre.size)) == ((50, 60), (40, 48))
    mixing = {
        "mixup_alpha": 0.71,
        "cutmix_alpha": 1.0,  # replaced by the bounds
        "cutmix_minmax": (0.15, 0.85),
        "mix_prob": 0.53,
        "switch_prob": 0.44,
        "label_smoothing": 0.07,
        "num_classes": 3,
        "mode": "elem",
    }
    assert attributes(data.mixup, mixing) == mixing


def test_cutmix_has_its_own_alpha(folder):
    settings = RECIPE | {"AUG.CUTMIX_MINMAX": None, "DATA.DATA_PATH": folder}
    mixup = build_data(config_of(FOLDER | settings)).mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha) == (0.71, 0.62)


def test_digits_are_augmented_by_the_settings():
    data = build_data(
        config_of(
            DIGITS
            | {
                "AUG.HFLIP": 0.31,
                "AUG.REPROB": 0.41,
                "AUG.REMODE": "rand",
                "AUG.RECOUNT": 3,
                "AUG.REAREA": (0.05, 0.25),
                "DATA.MEAN": (0.1, 0.2, 0.3),
                "DATA.STD": (0.4, 0.5, 0.6),
                "DATA.REPEATED_AUG": 2,
                "SEED": 9,
            }
        )
    )
    dataset = data.train_loader.dataset
    erasing = [value for value in vars(dataset).values() if isinstance(value, RandomErasing)][0]
    assert attributes(erasing, ERASING) == ERASING
    assert attributes(dataset, ("hflip", "seed", "copies")) == {
        "hflip": 0.31,
        "seed": 9,
        "copies": 2,
    }
    for loader in (data.train_loader, data.val_loader):
        assert loader.dataset.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert loader.dataset.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert data.val_loader.dataset.affine is None


@pytest.mark.parametrize("sequential", [False, True])
def test_a_rank_sees_its_share_of_the_data(sequential, folder):
    config = config_of(FOLDER | {"DATA.DATA_PATH": folder, "TEST.SEQUENTIAL": sequential})
    alone, first, second = (
        build_data(config, rank=rank, world_size=size) for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    keys = [
        [[key.index for key in batch] for batch in data.train_loader.batches]
        for data in (alone, first, second)
    ]
    assert len(keys[1]) == len(keys[2]) == 1
    assert sorted(keys[1][0] + keys[2][0]) == sorted(keys[0][0] + keys[0][1])
    seen = [sum(len(targets) for _, targets in data.val_loader) for data in (first, second)]
    assert seen == ([9, 9] if sequential else [5, 4])


# ---- models

# Arguments that are not their key's last word in small letters.
ARGUMENTS = {
    "MODEL.DROP_RATE": "drop_rate",
    "MODEL.DROP_PATH_RATE": "drop_path_rate",
    "MODEL.DROP_PATH_PROFILE": "drop_path_profile",
    "MODEL.DYNAMIC_IMG_SIZE": "dynamic_img_size",
    "MODEL.SW_MLP": "sw_mlp",
    "MODEL.PRE_MLP.WHERE": "pre_mlp",
    "MODEL.PRE_MLP.RATIO": "pre_mlp_ratio",
    "MODEL.PRE_MLP.DROP_PATH": "pre_mlp_drop_path",
    "TRAIN.USE_CHECKPOINT": "use_checkpoint",
    "DATA.IMG_SIZE": "img_size",
    "MODEL.SASA_RESNET.STEM_MIXTURES": "mixtures",
    "MODEL.SWIFTFORMER.DISTILL_HEAD": "distillation",
    "MODEL.TIMM.MODEL": "text",
}


class Recorded(Exception):
    """Stops a model's constructor once its arguments are known."""


def arguments_of(family: str, settings: dict) -> dict | None:
    """What the family's constructor is called with; None where the settings are refused."""
    where, name = ("models.timm_models", "timm_model") if family == "timm" else (None, "__init__")
    owner = sys.modules[where] if where else BACKBONES[family]
    signature, given = inspect.signature(getattr(owner, name)), {}

    def record(*args, **options):
        given.update(options | signature.bind(*args, **options).arguments)
        raise Recorded

    with patch.object(owner, name, record):
        try:
            build_model(config_of(settings), 7)
        except Recorded:
            return given
        except (ConfigError, ModelError):
            return None
    raise AssertionError(f"{family} is not built by {owner.__name__}.{name}")


def found(arguments: dict, key: str):
    """The argument that a key sets."""
    leaf = key.split(".")[-1].lower()
    name = ARGUMENTS.get(key, leaf)
    if not key.startswith("MODEL.ATTENTION."):
        return arguments.get(name, "not an argument")
    spec = arguments["attention"]
    return spec if isinstance(spec, str) else getattr(spec, leaf)


def fixed(value):
    """Lists as tuples."""
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_a_model_is_the_argument_of_its_name(family):
    base = model_settings(family)
    current = config_of(base)
    wrong = []
    for key in model_keys(family):
        if key in ("MODEL.NUM_CLASSES", "MODEL.BN_MOMENTUM"):
            continue
        beside = base | COMPANY.get(key, {})
        for value in islice(others(key, value_of(current, key)), 2):
            arguments = arguments_of(family, beside | {key: value})
            if arguments is not None and fixed(found(arguments, key)) != fixed(value):
                wrong.append(f"{key} {value!r}: {found(arguments, key)!r}")
    assert not wrong
    assert arguments_of(family, base)["num_classes"] == 7


@pytest.mark.parametrize("profile", ["linear", "constant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rates_reach_every_block(family, profile):
    section, small = SECTIONS[family], SMALL[family]
    rates = {"MODEL.DROP_RATE": 0.25, "MODEL.DROP_PATH_RATE": 0.5}
    rates |= {"MODEL.DROP_PATH_PROFILE": profile} if family != "timm" else {}
    rates |= {f"{section}NORM_EPS": 0.125} if f"{section}NORM_EPS" in KEYS else {}
    modules = dict(build_model(config_of(model_settings(family) | rates)).named_modules())
    spared = ("attn_drop", "head_drop") if family == "timm" else "attn_drop"
    drops = {
        name: module.p
        for name, module in modules.items()
        if isinstance(module, nn.Dropout) and not name.endswith(spared)
    }
    assert drops and set(drops.values()) == {0.25}, drops
    paths = [module.drop_prob for module in modules.values() if isinstance(module, DropPath)]
    blocks = small["DEPTH"] if "DEPTH" in small else sum(small.get("DEPTHS", (2,)))
    rising = torch.linspace(0, 0.5, blocks).tolist()[1:]
    expected = [0.5] * blocks if profile == "constant" and family != "timm" else rising
    assert sorted(set(paths)) == pytest.approx(sorted(set(expected)))
    assert len(paths) == len(expected) * (2 if family == "timm" else 1)
    epsilons = {module.eps for module in modules.values() if isinstance(module, nn.LayerNorm)}
    if f"{section}NORM_EPS" in rates:
        assert min(epsilons) == 0.125


# ---- the schedule, the means of an epoch, the end


def test_the_schedule_has_the_epochs_of_the_settings():
    settings = {
        "TRAIN.EPOCHS": 40,
        "TRAIN.COOLDOWN_EPOCHS": 5,
        "TRAIN.WARMUP_EPOCHS": 3,
        "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": False,
    }
    expected = {"name": "cosine", "total": 350, "warmup": 30, "warmup_prefix": False}
    expected |= {"warmup_lr": 0.2, "minimum": 0.1}
    schedule = build_schedule(config_of(settings), 10, Rates(base=0.3, warmup=0.2, minimum=0.1))
    assert attributes(schedule, expected) == expected
    falls = {
        "step": {"decay_every": 70, "decay_rate": 0.4},
        "multistep": {"milestones": (90, 210), "decay_rate": 0.6},
    }
    for name, fall in falls.items():
        steps = {
            "TRAIN.LR_SCHEDULER.NAME": name,
            "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 7,
            "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.4,
            "TRAIN.LR_SCHEDULER.GAMMA": 0.6,
            "TRAIN.LR_SCHEDULER.MULTISTEPS": [9, 21],
            "TRAIN.WARMUP_EPOCHS": 1,
        }
        schedule = build_schedule(config_of(steps), 10, Rates(0.3, 0.2, 0.1))
        assert attributes(schedule, fall) == fall


def test_an_epochs_means_are_those_of_its_own_updates(tmp_path):
    run(tmp_path, {"TRAIN.EPOCHS": 3})
    for epoch, means in enumerate(metrics(tmp_path, "epoch")):
        updates = [entry for entry in metrics(tmp_path, "train") if entry["epoch"] == epoch]
        for mean, name in (("train_loss", "loss"), ("grad_norm", "grad_norm")):
            each = [entry[name] for entry in updates]
            assert means[mean] == pytest.approx(sum(each) / len(each), rel=1e-6)


def test_loading_processes_end_with_the_run_however_it_ends(tmp_path):
    for rate, status in ((0.1, 0), (1e38, 2)):
        settings = {"TRAIN.BASE_LR": rate, "TRAIN.CLIP_GRAD": 0, "TRAIN.MAX_NONFINITE": 1}
        with patch("data.loader.Loader.close", autospec=True) as closed:
            left = run(tmp_path / str(rate), settings)
        assert left["status"] == [status] and closed.call_count == 2
