"""main.py as a user meets it: each mistake gives one clear line and exit status 2 and destroys
nothing; what fails in Swin works.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import main as program
from checkpoint import load_weights, read_weights
from config import load_config
from engine.lock import FolderLock
from models import build_model
from tests.engine.runs import arguments, checkpoint, differences, folder, metrics, run

QUICK = {"TRAIN__MAX_STEPS": 3, "TRAIN__SAVE_STEPS": 0, "DATA__NUM_WORKERS": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished short run; not to be written to."""
    output = tmp_path_factory.mktemp("trained")
    assert program.main(arguments(output, **QUICK)) == 0
    return output


@pytest.fixture
def mine(trained, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def pictures(tmp_path):
    """A folder data set: two classes, eight training and three validation images each."""
    root, draw = tmp_path / "pictures", np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def folder_run(output, pictures, **settings):
    chosen = {
        **QUICK,
        "DATA__DATASET": "folder",
        "DATA__DATA_PATH": pictures,
        "DATA__BATCH_SIZE": 4,
        "MODEL__SWINV2__IN_CHANS": 3,
        "AUG__AFFINE": False,
    }
    return arguments(output, **{**chosen, **settings})


def refused(capsys, argv) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    try:
        status = program.main(list(map(str, argv)))
    except SystemExit as stop:
        status = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1, (status, lines)
    return lines[0]


def contents(output) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder(output).glob("*.pth")}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"TRAIN.EPOCH": 3}, ["TRAIN.EPOCH ", "TRAIN.EPOCHS"]),
        ({"TRAIN.EPOCHS": "many"}, ["TRAIN.EPOCHS", "many"]),
        ({"DATA.DATASET": "digit"}, ["DATA.DATASET", "digits"]),
        ({"MODEL.NUM_CLASSES": 7}, ["7", "10"]),
        (
            {
                "DATA.DATASET": "folder",
                "DATA.DATA_PATH": "/nowhere/at/all",
                "AUG.AFFINE": False,
                "MODEL.SWINV2.IN_CHANS": 3,
            },
            ["/nowhere/at/all"],
        ),
        ({"MODEL.PRETRAINED": "/nowhere.pth"}, ["/nowhere.pth"]),
        ({"MODEL.RESUME": "/nowhere.pth", "TRAIN.AUTO_RESUME": False}, ["/nowhere.pth"]),
        ({"DEVICE": "mps"}, ["mps", "available"]),
        ({"MODEL.SWINV2.NUM_HEADS": "[3, 4]"}, ["NUM_HEADS"]),
        ({"OUTPUT": "/proc/no"}, ["/proc/no", "--output"]),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_one_line_and_touches_nothing(mine, capsys, settings, words):
    before = contents(mine)
    argv = arguments(mine, **QUICK) + [str(word) for pair in settings.items() for word in pair]
    if "OUTPUT" in settings:
        argv[argv.index("--output") + 1] = settings["OUTPUT"]
    line = refused(capsys, argv)
    assert all(word in line for word in words), line
    assert contents(mine) == before


def test_a_wrong_flag_or_file_name_is_one_line(capsys):
    assert "--batch-size" in refused(
        capsys, ["--cfg", "configs/digits/digits_tiny.yaml", "--bach-size", "3"]
    )
    assert "digits_tiny.yaml" in refused(capsys, ["--cfg", "configs/digits/digits_tini.yaml"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"<html>404</html>",
        lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
    ],
    ids=["truncated", "empty", "web page", "flipped bit"],
)
@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
def test_a_damaged_checkpoint_is_one_line_and_touches_nothing(mine, tmp_path, capsys, damage, flag):
    bad = tmp_path / "bad.pth"
    bad.write_bytes(damage((folder(mine) / "last.pth").read_bytes()))
    before = contents(mine)
    argv = arguments(mine, **QUICK, TRAIN__AUTO_RESUME=False)
    assert "bad.pth" in refused(capsys, [*argv, flag, bad])
    assert "bad.pth" in refused(capsys, [*argv, "--eval", flag, bad])
    assert contents(mine) == before


def test_a_checkpoint_of_another_model_or_optimizer_is_one_line(mine, capsys):
    before = contents(mine)
    for key, value, word in (
        ("MODEL.SWINV2.EMBED_DIM", 64, "another model"),
        ("TRAIN.OPTIMIZER.NAME", "sgd", "SGD"),
    ):
        argv = [*arguments(mine, **QUICK), "TRAIN.MAX_STEPS", 5, key, value]
        assert f"{key}: " in refused(capsys, argv)
        assert word in refused(capsys, [*argv, "--resume-changed"])
        assert contents(mine) == before


def test_nothing_but_damaged_checkpoints_is_not_written_over(mine, capsys):
    for path in folder(mine).glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    before = contents(mine)
    assert "none can be used" in refused(capsys, arguments(mine, **QUICK))
    assert contents(mine) == before


def test_a_second_run_in_the_same_folder_is_refused_but_an_evaluation_is_not(mine, capsys):
    with FolderLock(folder(mine)):
        before = contents(mine)
        assert "in use by process" in refused(capsys, arguments(mine, **QUICK))
        assert (
            program.main([*arguments(mine), "--eval", "--resume", str(folder(mine) / "best.pth")])
            == 0
        )
        assert contents(mine) == before


def test_a_corrupt_validation_image_is_an_error_that_names_it(pictures, tmp_path, capsys):
    (pictures / "val" / "dog" / "1.png").write_bytes(b"<html>")
    assert "1.png" in refused(capsys, folder_run(tmp_path / "out", pictures))


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_training_images_are_replaced_up_to_the_limit(pictures, tmp_path, capsys, workers):
    for index in range(2):
        (pictures / "train" / "cat" / f"{index}.png").write_bytes(b"\x89PNG\r\n")
    settings = {"TRAIN__EPOCHS": 2, "TRAIN__MAX_STEPS": 0, "DATA__NUM_WORKERS": workers}
    assert program.main(folder_run(tmp_path / "out", pictures, **settings)) == 0
    assert "0.png" in (folder(tmp_path / "out") / "log_rank0.txt").read_text()
    assert "DATA.CORRUPT_LIMIT 1" in refused(
        capsys, folder_run(tmp_path / "few", pictures, **settings, DATA__CORRUPT_LIMIT=1)
    )


def test_a_wrong_class_count_names_both_numbers(pictures, tmp_path, capsys):
    line = refused(capsys, folder_run(tmp_path / "out", pictures, MODEL__NUM_CLASSES=3))
    assert "3" in line and "2 classes" in line
    assert program.main(folder_run(tmp_path / "out", pictures)) == 0  # not given: inferred
    assert len(checkpoint(folder(tmp_path / "out"))["model"]["head.bias"]) == 2


def test_memory_exhausted_is_one_line_with_what_to_lower(capsys, monkeypatch, tmp_path):
    def exhausted(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"
            " of\nmany\nlines"
        )

    monkeypatch.setattr(program.Program, "run", exhausted)
    line = refused(capsys, arguments(tmp_path, **QUICK))
    assert "allocate 2.00 GiB." in line and "lower DATA.BATCH_SIZE" in line and "many" not in line


def test_diverging_training_ends_with_the_numbers_of_the_updates(tmp_path, capsys):
    line = refused(
        capsys,
        arguments(
            tmp_path,
            DATA__NUM_WORKERS=0,
            TRAIN__BASE_LR=1e30,
            TRAIN__WARMUP_EPOCHS=0,
            TRAIN__MAX_NONFINITE=4,
        ),
    )
    assert "last " in line and "epoch 0" in line and "TRAIN.BASE_LR" in line


def test_eval_of_pretrained_weights_returns_after_validating(trained, tmp_path, capsys):
    weights = folder(trained) / "model.safetensors"
    assert program.main([*arguments(tmp_path), "--eval", "--pretrained", str(weights)]) == 0
    assert "Acc@1" in capsys.readouterr().out and not list(folder(tmp_path).glob("*.pth"))


def test_eval_takes_the_file_it_is_given_not_the_folders_newest(mine, trained, capsys):
    best = read_weights(folder(trained) / "best.pth")
    other = build_model(load_config("configs/digits/digits_tiny.yaml"))
    torch.save(
        {
            "model": {
                name: torch.zeros_like(tensor) if "head" in name else tensor
                for name, tensor in other.state_dict().items()
            },
            "metadata": best.metadata["metadata"],
        },
        mine / "zero.pth",
    )
    before = contents(mine)
    assert (
        program.main(
            [
                *arguments(mine, MODEL__EMA__ENABLE=False),
                "--eval",
                "--resume",
                str(mine / "zero.pth"),
            ]
        )
        == 0
    )
    assert "resumed" not in capsys.readouterr().out and contents(mine) == before
    assert "give --resume CHECKPOINT" in refused(capsys, [*arguments(mine), "--eval"])


def test_eval_of_a_checkpoint_gives_the_accuracies_of_training(trained, capsys):
    assert (
        program.main([*arguments(trained), "--eval", "--resume", str(folder(trained) / "last.pth")])
        == 0
    )
    out = capsys.readouterr().out
    for entry in metrics(folder(trained))[-2:]:  # val and val_ema
        assert f"Acc@1 {entry['acc1']:.3f}" in out


def test_the_files_of_a_run_are_complete_and_plain(trained):
    names = {path.name for path in folder(trained).iterdir()}
    assert {
        "last.pth",
        "best.pth",
        "model.safetensors",
        "config.yaml",
        "config.json",
        "metrics.jsonl",
        "log_rank0.txt",
    } <= names
    payload = checkpoint(folder(trained))
    assert set(payload) == {
        "format",
        "model",
        "ema",
        "optimizer",
        "lr_scheduler",
        "scaler",
        "progress",
        "layout",
        "ranks",
        "config",
        "images",
        "metadata",
        "class_names",
        "logs",
    }
    assert type(payload["config"]) is dict and payload["config"]["MODEL"]["TYPE"] == "swinv2"
    assert (
        payload["progress"]["best"] == metrics(folder(trained))[-1]["acc1"]
        and payload["progress"]["best_epoch"] == 0
    )
    written = json.loads((folder(trained) / "config.json").read_text())
    names = written.pop("id2label")
    assert written == payload["config"]
    assert names == {str(digit): str(digit) for digit in range(10)}
    assert payload["class_names"] == list(names.values())


def test_the_exported_weights_are_the_averaged_ones_and_load_strictly(trained):
    model = build_model(load_config("configs/digits/digits_tiny.yaml"))
    load_weights(model, read_weights(folder(trained) / "model.safetensors"), rule="exact")
    average = checkpoint(folder(trained), "best.pth")["ema"]
    assert differences(dict(model.state_dict()), dict(average)) == []


def test_the_printed_config_of_a_run_makes_the_same_run(trained, tmp_path):
    assert (
        program.main(["--cfg", str(folder(trained) / "config.yaml"), "--output", str(tmp_path)])
        == 0
    )
    ours, theirs = checkpoint(folder(tmp_path)), checkpoint(folder(trained))
    assert differences(ours["model"], theirs["model"]) == []


def test_a_finished_run_started_again_trains_no_more(mine, capsys):
    before = contents(mine)
    assert program.main([*arguments(mine, **QUICK)]) == 0
    assert (
        differences(
            checkpoint(folder(mine))["model"], checkpoint(folder(mine), "best.pth")["model"]
        )
        == []
    )
    assert before.keys() == contents(mine).keys()
    assert "resumed from" in capsys.readouterr().out


def test_settings_changed_between_two_starts_are_told(mine, capsys):
    argv = arguments(mine, **{**QUICK, "TRAIN__MAX_STEPS": 5}, TRAIN__BASE_LR=1e-3)
    assert "TRAIN.BASE_LR: 0.032 -> 0.001" in refused(capsys, argv)
    assert program.main([*argv, "--resume-changed"]) == 0
    out = capsys.readouterr().out
    assert "TRAIN.MAX_STEPS: 3 -> 5" in out and "TRAIN.BASE_LR: 0.032 -> 0.001" in out
    group = checkpoint(folder(mine))["optimizer"]["param_groups"][0]
    assert group["lr"] < 1e-3  # the new rate, not the saved one


def test_another_global_batch_inside_an_epoch_is_refused_and_the_same_one_is_not(mine, capsys):
    before = contents(mine)
    half = arguments(mine, **{**QUICK, "TRAIN__MAX_STEPS": 5}, DATA__BATCH_SIZE=32)
    assert "an update: 64 images" in refused(capsys, half)
    assert "updates of 64 images" in refused(capsys, [*half, "--resume-changed"])
    assert contents(mine) == before
    assert (
        program.main(
            arguments(
                mine,
                **{**QUICK, "TRAIN__MAX_STEPS": 5},
                DATA__BATCH_SIZE=32,
                TRAIN__ACCUMULATION_STEPS=2,
            )
        )
        == 0
    )
    assert checkpoint(folder(mine))["progress"]["batch"] == 10


def test_throughput_needs_no_data_and_uses_the_configured_dtype(tmp_path, capsys):
    argv = arguments(
        tmp_path,
        DATA__DATASET="imagenet",
        AUG__AFFINE=False,
        DATA__BATCH_SIZE=2,
        AMP_DTYPE="bfloat16",
    )
    assert program.main([*argv, "--throughput"]) == 0
    out = capsys.readouterr().out
    assert "images/s" in out and "bfloat16" in out


def test_cutmix_alone_trains(tmp_path):
    assert program.main(arguments(tmp_path, **QUICK, AUG__MIXUP=0, AUG__CUTMIX=1.0)) == 0


@pytest.mark.slow
def test_one_and_two_processes_evaluate_to_the_same_numbers(trained, tmp_path):
    outputs = []
    for nproc in (1, 2):
        done = run(
            "main.py",
            *arguments(tmp_path, DATA__BATCH_SIZE=50),
            "--eval",
            "--resume",
            folder(trained) / "best.pth",
            nproc=nproc,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(
            [
                line.split("INFO")[1]
                for line in done.stdout.splitlines()
                if " * Acc@1" in line or "test images" in line
            ]
        )
    assert outputs[0] == outputs[1] and len(outputs[0]) == 4


@pytest.mark.slow
def test_other_numbers_of_processes_go_on_from_the_end_of_an_epoch_only(tmp_path):
    def start(nproc, **settings):
        return run("main.py", *arguments(tmp_path, **settings), nproc=nproc)

    assert start(2, TRAIN__MAX_STEPS=5).returncode == 0
    refusal = start(1)
    assert refusal.returncode == 2 and "2 processes x 64" in refusal.stderr
    assert start(1, DATA__BATCH_SIZE=128, TRAIN__MAX_STEPS=6).returncode == 0
    assert start(2, TRAIN__EPOCHS=1).returncode == 0
    assert "an update: 128 images" in start(1).stderr
    onward = start(1, TRAIN__RESUME_CHANGED=True)
    assert onward.returncode == 0 and "drop path and mixup draw other numbers" in onward.stdout
