"""What is told before a run begins: mistakes of every kind, in the order of the work."""

from unittest.mock import patch

import pytest
import torch

import main as program
from checkpoint import save_weights
from config import get_config, load_config, parse_args
from registry import UserError
from settings.checks import check_files, check_settings, draft_model
from tests.helpers import ROOT

DIGITS = "configs/digits/digits_tiny.yaml"
VIT = "configs/digits/digits_vit.yaml"
FOLDER = (
    "DATA.DATASET",
    "folder",
    "DATA.DATA_PATH",
    "/no/such/folder",
    "AUG.AFFINE",
    "False",
)
TEACHER = ("TRAIN.DISTILL.KIND", "hard", "TRAIN.DISTILL.TEACHER")


def configured(cfg: str, *options):
    return load_config(ROOT / cfg, options)


def refusal(cfg: str, *options) -> str:
    """The one line with which a run of these settings is refused."""
    with pytest.raises(UserError) as caught:
        check_settings(configured(cfg, *options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def printed(capsys, *argv) -> str:
    """The error of main.py --print-config with these arguments."""
    assert program.main(["--cfg", str(ROOT / DIGITS), "--print-config", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("cfg", "options", "words"),
    [
        (DIGITS, ("TRAIN.OPTIMIZER.NAME", "lamb", "TRAIN.QK_WEIGHT_DECAY", 0.5), "QK_WEIGHT_DECAY"),
        (DIGITS, ("TRAIN.OPTIMIZER.NAME", "timm:adamv"), "did you mean 'adam"),
        (DIGITS, ("MODEL.ATTENTION.MODIFIERS", ["crwp"]), "did you mean 'crpw'"),
        (DIGITS, ("MODEL.SWINV2.MLP_RATIO", 0.001), "an MLP over 32 channels has 0 hidden ones"),
        (DIGITS, ("MODEL.PRE_MLP.RATIO", 0.001), "an MLP over 32 channels has 0 hidden ones"),
        (DIGITS, (*TEACHER, "resnet18.a1_in2k"), "has no weights 'a1_in2k' of resnet18; it has"),
        (DIGITS, ("MODEL.ATTENTION.MODIFIERS", ["crpw(sourse=table)"]), "did you mean 'source'"),
        (DIGITS, ("MODEL.ATTENTION.MODIFIERS", ["crpw(source=tabel)"]), "mlp, table"),
        (VIT, ("MODEL.ATTENTION.MIXER", "seperable"), "did you mean 'separable'"),
        (VIT, ("MODEL.ATTENTION.MIXER", "local(kernel=4)"), "local"),
        (VIT, ("MODEL.VIT.NUM_HEADS", 5), "5"),
        (VIT, ("MODEL.VIT.PATCH_SIZE", 64), "64"),
        (VIT, ("MODEL.BN_MOMENTUM", 0.1), "MODEL.BN_MOMENTUM"),
        (VIT, ("MODEL.SW_MLP", "shift"), "MODEL.SW_MLP"),
        (VIT, ("MODEL.ATTENTION.BIAS_SIGMOID", False), "is for swinv2"),
        (VIT, ("MODEL.ATTENTION.LOGIT_SCALE_INIT", 5), "is for swinv2"),
        (DIGITS, ("MODEL.ATTENTION.BACKEND", "sdpa"), "MODEL.ATTENTION.BACKEND sdpa"),
        (VIT, ("MODEL.ATTENTION.BACKEND", "eager", "MODEL.ATTENTION.DROP", 0.1), "no dropout"),
        (VIT, ("MODEL.ATTENTION.BACKEND", "fused"), "fused backend does not apply"),
        (VIT, ("MODEL.VIT.IN_CHANS", 4), "grey (1) or RGB (3)"),
        (VIT, ("AUG.AFFINE", True, "AUG.AUTO_AUGMENT", "v0"), "AUG.AUTO_AUGMENT none"),
        (VIT, ("AUG.AFFINE", True, "DATA.DATASET", "cifar10"), "AUG.AFFINE True"),
        (VIT, ("AUG.AFFINE", False, "AUG.AUTO_AUGMENT", "rand-x9"), "AUG.AUTO_AUGMENT"),
        (DIGITS, (*TEACHER, "regnety_16O"), "nor a model of timm"),
        (DIGITS, (*TEACHER, "teacher.yaml"), "needs the checkpoint of its training"),
        (DIGITS, ("EVAL_MODE", True), "give --resume CHECKPOINT"),
    ],
)
def test_a_run_is_refused_before_it_begins(cfg, options, words):
    assert words in refusal(cfg, *options)


def test_the_configurations_of_the_project_pass():
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    one_a_folder = {path.parent: path for path in reversed(paths)}
    for path in one_a_folder.values():
        check_settings(load_config(path))


def test_the_draft_of_a_model_holds_no_numbers_and_fetches_no_weights():
    cfg = configured("configs/digits/digits_timm_vit.yaml", "MODEL.TIMM.PRETRAINED", True)
    model = draft_model(cfg)
    assert model.training
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert cfg.MODEL.TIMM.PRETRAINED


def test_printing_refuses_what_a_run_would_refuse(capsys):
    decay = ["TRAIN.OPTIMIZER.NAME", "lamb", "TRAIN.QK_WEIGHT_DECAY", "0.5"]
    assert "QK_WEIGHT_DECAY" in printed(capsys, "--opts", *decay)
    assert "did you mean 'crpw'" in printed(capsys, "--opts", "MODEL.ATTENTION.MODIFIERS", "crwp")
    assert "is odd" in printed(capsys, "--batch-size", "7", "--opts", "AUG.MIXUP", "0.8")
    assert "do not divide" in printed(capsys, "--opts", "MODEL.SWINV2.NUM_HEADS", "[5, 5]")


def test_printing_looks_at_no_files(capsys):
    absent = [
        ("--pretrained", "/no/such/weights.pth"),
        ("--resume", "/no/such/last.pth"),
        ("--data-path", "/no/such/folder", "--opts", *FOLDER),
        (
            "--opts",
            "TRAIN.DISTILL.KIND",
            "hard",
            "TRAIN.DISTILL.TEACHER",
            "/no/such/teacher.yaml",
            "TRAIN.DISTILL.TEACHER_WEIGHTS",
            "/no/such/teacher.pth",
        ),
    ]
    for argv in absent:
        assert program.main(["--cfg", str(ROOT / DIGITS), "--print-config", *argv]) == 0
        captured = capsys.readouterr()
        assert "/no/such/" in captured.out and captured.err == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("MODEL.ATTENTION.MODIFIERS", "crwp"), "did you mean 'crpw'"),
        (("MODEL.PRETRAINED", "/no/such/weights.pth"), "/no/such/weights.pth does not exist"),
        (("MODEL.RESUME", "/no/such/last.pth"), "/no/such/last.pth does not exist"),
        (
            (*TEACHER, "/no/such/teacher.yaml", "TRAIN.DISTILL.TEACHER_WEIGHTS", "any.pth"),
            "TRAIN.DISTILL.TEACHER: '/no/such/teacher.yaml' is not a file",
        ),
    ],
)
def test_names_and_files_are_checked_before_the_data_are_looked_for(
    options, words, tmp_path, capsys
):
    argv = ["--cfg", str(ROOT / DIGITS), "--output", str(tmp_path / "out")]
    assert program.main([*argv, "--opts", *FOLDER, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "/no/such/folder" not in error
    assert not (tmp_path / "out").exists()


def test_the_teacher_of_a_yaml_must_be_a_model_that_can_be_built(tmp_path):
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text("MODEL: {ATTENTION: {MODIFIERS: [crwp]}}")
    weights = ("TRAIN.DISTILL.TEACHER_WEIGHTS", "any.pth")
    cfg = configured(DIGITS, *TEACHER, str(teacher), *weights)
    with pytest.raises(UserError, match="did you mean 'crpw'"):
        check_files(cfg, load_config)


@pytest.mark.parametrize("flag", ["--pretrained", "--resume"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damage_to_a_weights_file_is_told_before_the_data_are_looked_for(
    tmp_path, flag, name, capsys
):
    whole = save_weights(tmp_path / name, {"head.weight": torch.ones(300, 300)}).read_bytes()
    argv = ["--cfg", str(ROOT / DIGITS), flag, str(tmp_path / name)]
    with patch("main.build_data", side_effect=AssertionError("the data were looked for")):
        for part in (whole[:-200], whole[: len(whole) // 2], whole[:300], b"no weights"):
            (tmp_path / name).write_bytes(part)
            assert program.main(argv) == 2
            assert capsys.readouterr().err.count("\n") == 1
        torch.save({"student": {"w": torch.ones(1)}, "teacher": {"w": torch.ones(1)}}, argv[-1])
        assert program.main(argv) == 2 and "MODEL.ENTRY" in capsys.readouterr().err


def test_files_that_a_mode_does_not_read_are_not_asked_for():
    argv = ["--cfg", str(ROOT / DIGITS), "--pretrained", "/no/such/weights.pth"]
    check_files(get_config(parse_args([*argv, "--throughput"])), load_config)
    with pytest.raises(UserError, match="does not exist"):
        check_files(get_config(parse_args([*argv, "--eval"])), load_config)
