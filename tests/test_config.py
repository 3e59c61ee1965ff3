"""The configuration: what is accepted, what is refused and with which words, and what every YAML of
configs/ means.
"""

import argparse
import logging
import pickle
import random
from pathlib import Path

import pytest
import yaml

import config
from config import ConfigError, dump_config, get_config, load_config, notes, parse_args, to_dict
from settings.flags import build_parser
from tests.helpers import golden

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "configs/identity/family"  # of one form; see tests/models/family/test_configs.py
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent != FAMILY)
DIGITS = ROOT / "configs/digits/digits_tiny.yaml"
NAMED = ROOT / "configs/swin/swin_tiny_patch4_window7_224.yaml"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """No test depends on the variables of a launcher around pytest."""
    for name in ("LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def settings(*opts) -> config.CfgNode:
    return load_config(None, opts)


def command(*argv) -> config.CfgNode:
    return get_config(parse_args(["--cfg", str(NAMED), *argv]))


def refusal(*opts) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(*opts)
    message = str(caught.value)
    assert "\n" not in message
    return message


def usage_error(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_args(argv)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("DATA.BATCHSIZE", "DATA.BATCH_SIZE"),
        ("TRAIN.BATCH_SIZE", "DATA.BATCH_SIZE"),
        ("DATA.batch_size", "DATA.BATCH_SIZE"),
        ("MODEL.SWINV2.WINDOWS_SIZE", "MODEL.SWINV2.WINDOW_SIZE"),
        ("MODEL.ATTENTION.MODIFIER", "MODEL.ATTENTION.MODIFIERS"),
        ("TRAIN.LR_SCHEDULER.NAMES", "TRAIN.LR_SCHEDULER.NAME"),
    ],
)
def test_an_unknown_key_is_refused_with_its_value_and_the_nearest_key(key, nearest, tmp_path):
    for message in (refusal(key, 77), _file_refusal(tmp_path, _nested(key, 77))):
        assert (
            key in message
            and "77" in message
            and f"did you mean {nearest}?" in message
            and "allowed" in message
        )


def test_a_section_in_the_wrong_case_is_refused_with_the_right_one(tmp_path):
    assert (
        "unknown key data " in (message := _file_refusal(tmp_path, "data: {batch_size: 4}"))
        and "did you mean DATA?" in message
    )


def _nested(key: str, value) -> str:
    for name in reversed(key.split(".")):
        value = {name: value}
    return yaml.safe_dump(value)


def _file_refusal(folder: Path, text: str) -> str:
    path = write(folder, "wrong.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("TRAIN.EPOCHS", 1.5, "a whole number >= 1"),
        ("TRAIN.EPOCHS", True, "a whole number >= 1"),
        ("TRAIN.EPOCHS", None, "a whole number >= 1"),
        ("TRAIN.EPOCHS", "many", "a whole number >= 1"),
        ("TRAIN.WEIGHT_DECAY", "a lot", "a number >= 0"),
        ("TRAIN.WEIGHT_DECAY", -0.1, "a number >= 0"),
        ("TRAIN.BASE_LR", float("nan"), "a number >= 0"),
        ("TRAIN.BASE_LR", float("inf"), "a number >= 0"),
        ("TRAIN.BASE_LR", True, "a number >= 0"),
        ("MODEL.DROP_PATH_RATE", 1, "a number in [0, 1)"),
        ("MODEL.ATTENTION.LOGIT_SCALE_INIT", 0, "a number in (0, 100]"),
        ("TRAIN.AUTO_RESUME", 1, "True or False"),
        ("DATA.PIN_MEMORY", "maybe", "True or False"),
        ("MODEL.SWIN.DEPTHS", 2, "a list"),
        ("MODEL.SWIN.DEPTHS", [2, 2.5], "a whole number >= 0 each"),
        ("MODEL.SWIN.NUM_HEADS", [0, 6, 12, 24], "a whole number >= 1 each"),
        ("DATA.IMG_SIZE", [224, 224, 3], "a whole number >= 1, or (height, width)"),
        ("DATA.IMG_SIZE", 0, "a whole number >= 1, or (height, width)"),
        ("TRAIN.OPTIMIZER.BETAS", [0.9], "2 of"),
        ("AUG.SCALE", [1.0, 0.08], "ascending"),
        ("MODEL.NAME", 5, "text"),
        ("MODEL.NAME", "/tmp", "without a leading /"),
        ("TAG", "../other", "without .."),
        ("MODEL.ATTENTION.MODIFIERS", 3, "a list of 'name'"),
        ("AUG.AUTO_AUGMENT", "randaugment9", "a policy of timm"),
    ],
)
def test_a_wrong_type_or_range_is_refused_with_key_value_and_what_is_allowed(key, value, allowed):
    message = refusal(key, value)
    assert key in message and allowed in message and repr(value) in message


@pytest.mark.parametrize(
    "key, value, nearest",
    [
        ("DATA.DATASET", "imagnet", "imagenet"),
        ("MODEL.TYPE", "swin-v2", "swinv2"),
        ("TRAIN.LR_SCHEDULER.NAME", "cosin", "cosine"),
        ("TRAIN.OPTIMIZER.NAME", "adam", "adamw"),
        ("MODEL.SW_MLP", "tokenmix", "token_mix"),
        ("AMP_DTYPE", "bf16", "bfloat16"),
    ],
)
def test_a_wrong_name_is_refused_with_the_choices_and_the_nearest(key, value, nearest):
    message = refusal(key, value)
    assert (
        f"{key}: {value!r}" in message
        and "allowed: " in message
        and (f"did you mean {nearest!r}?" in message)
    )


def test_mixture_of_experts_is_refused_and_its_stray_settings_are_dropped_with_a_note(
    caplog, tmp_path
):
    assert "mixture-of-experts" in refusal("MODEL.TYPE", "swin_moe")
    with caplog.at_level(logging.WARNING):
        cfg = load_config(
            write(
                tmp_path,
                "dump.yaml",
                "MODEL: {SWIN_MOE: {TOP_VALUE: 2}}\nTRAIN: {MOE: {SAVE_MASTER: False}}\n",
            )
        )
    assert (
        "SWIN_MOE" not in cfg.MODEL
        and "MODEL.SWIN_MOE has no effect" in caplog.text
        and "TRAIN.MOE has no effect" in caplog.text
    )


@pytest.mark.parametrize(
    "opts, words",
    [
        (("TRAIN.EPOCHS", 10), ("TRAIN.WARMUP_EPOCHS", "20", "TRAIN.EPOCHS 10")),
        (("TRAIN.LR_SCHEDULER.NAME", "multistep"), ("TRAIN.LR_SCHEDULER.MULTISTEPS", "is empty")),
        (
            ("TRAIN.LR_SCHEDULER.NAME", "multistep", "TRAIN.LR_SCHEDULER.MULTISTEPS", [10, 30]),
            ("MULTISTEPS", "[10, 30]", "warm-up"),
        ),
        (("DATA.BATCH_SIZE", 7), ("DATA.BATCH_SIZE", "7 is odd", "AUG.CUTMIX")),
        (
            ("DATA.ZIP_MODE", True, "DATA.DATASET", "cifar10"),
            ("DATA.ZIP_MODE", "'folder'", "'imagenet'"),
        ),
        (("TRAIN.DISTILL.KIND", "hard"), ("TRAIN.DISTILL.TEACHER", "'hard'")),
        (
            ("TRAIN.DISTILL.TEACHER", "regnety_160"),
            ("TRAIN.DISTILL.KIND", "regnety_160", "hard, soft"),
        ),
        (("MODEL.SWIN.NUM_HEADS", [3, 6, 12]), ("MODEL.SWIN.NUM_HEADS", "3 entries", "4 stages")),
        (
            ("MODEL.SWIN.NUM_HEADS", [3, 6, 12, 25]),
            ("MODEL.SWIN.NUM_HEADS", "25 heads", "768 channels"),
        ),
        (
            ("MODEL.TYPE", "swinv2", "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES", [12, 6]),
            ("PRETRAINED_WINDOW_SIZES", "2 entries", "4 stages"),
        ),
        (("MODEL.SWIN.DEPTHS", [], "MODEL.SWIN.NUM_HEADS", []), ("MODEL.SWIN.DEPTHS", "no stage")),
        (("MODEL.NUM_CLASSES", 10), ("MODEL.NUM_CLASSES", "10", "'imagenet'", "1000")),
        (("MODEL.NUM_CLASSES", 0), ("MODEL.NUM_CLASSES", "0", "'imagenet'", "1000")),
        (("DATA.MEAN", [0.5]), ("DATA.MEAN", "1 numbers", "3 numbers each")),
        (("DATA.MEAN", [0.5, 0.5, 0.5]), ("DATA.STD", "together")),
    ],
)
def test_impossible_combinations_are_refused_by_name(opts, words):
    message = refusal(*opts)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("mode", ["EVAL_MODE", "THROUGHPUT_MODE"])
def test_rules_of_training_do_not_bind_evaluation(mode):
    cfg = settings(mode, True, "DATA.BATCH_SIZE", 1, "TRAIN.EPOCHS", 1)
    assert cfg.DATA.BATCH_SIZE == 1


def test_sections_of_other_families_are_not_checked():
    assert settings("MODEL.SWINV2.NUM_HEADS", [7]).MODEL.SWINV2.NUM_HEADS == [7]


def test_an_odd_number_of_options_is_refused():
    assert "'AUG.MIXUP'" in refusal("TRAIN.EPOCHS", 30, "AUG.MIXUP") and "pairs" in refusal(
        "AUG.MIXUP"
    )


def test_a_section_is_no_key_and_a_key_is_no_section(tmp_path):
    assert "a section is meant" in refusal("TRAIN", 3)
    assert "TRAIN.EPOCHS" in _file_refusal(
        tmp_path, "TRAIN: {EPOCHS: {MANY: 1}}"
    ) and "whole number" in _file_refusal(tmp_path, "TRAIN: {EPOCHS: {MANY: 1}}")


@pytest.mark.parametrize(
    "text, words",
    [
        ("- 1\n- 2\n", ("a mapping",)),
        ("TRAIN: {EPOCHS: 3\n", ("not valid YAML",)),
        ("TRAIN:\n  EPOCHS: 30\n  EPOCHS: 40\n", ("EPOCHS is given twice", "line 3")),
        ("TRAIN: !!python/object/apply:os.system ['true']\n", ("not valid YAML", "python/object")),
        ("BASE: {a: 1}\n", ("BASE", "a list")),
        ("x: &x {y: *x}\n", ("unknown key x",)),
        (
            (
                "a: &a [z,z,z,z,z,z,z,z]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c"
                " [*b,*b,*b,*b,*b,*b,*b]\nTAG: [*c,*c,*c,*c]\n"
            ),
            ("unknown key",),
        ),
    ],
)
def test_a_file_that_is_no_plain_mapping_is_refused_and_nothing_in_it_runs(text, words, tmp_path):
    message = _file_refusal(tmp_path, text)
    assert all(word in message for word in words) and len(message) < 1500


def test_binary_content_is_refused_in_one_line(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path):
    write(tmp_path, "digits.yaml", "")
    with pytest.raises(ConfigError, match="did you mean .*digits.yaml"):
        load_config(tmp_path / "digit.yaml")
    with pytest.raises(
        ConfigError,
        match="child.yaml: BASE: .*digits.yml.* is not a file; did you mean .*digits.yaml",
    ):
        load_config(write(tmp_path, "child.yaml", "BASE: [digits.yml]"))


def test_random_values_give_a_configuration_or_a_config_error_and_nothing_else():
    generator = random.Random(0)
    values = [
        None,
        True,
        False,
        0,
        1,
        -1,
        3.5,
        "",
        "off",
        "none",
        "1e-3",
        "(2, 2)",
        "[",
        [],
        [1],
        [None],
        {},
        {"a": 1},
        (0.5, 0.9),
        "x" * 5000,
        float("nan"),
        "\n",
        b"\x00",
        "MODEL",
        [[1], [2]],
        10**40,
        "'",
        "é",
    ]
    for key in [*config.KEYS, *config.SECTIONS, "NOPE", "", ".", "TRAIN.", 3]:
        for value in generator.sample(values, 12):
            try:
                assert settings(key, value).is_frozen()
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000


def test_flags_that_only_look_alike_in_their_dashes_are_not_suggested(capsys):
    for given in ("--amp", "--foo", "--lr", "--xyz"):
        assert "did you mean" not in usage_error(capsys, "--cfg", str(NAMED), given, "3")


def test_a_file_is_not_said_to_mean_itself(tmp_path):
    (tmp_path / "child.yaml").write_text("BASE: [chld.yaml]")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "child.yaml")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "given, nearest",
    [
        ("--bach-size", "--batch-size"),
        ("--epoch", "--epochs"),
        ("--use_checkpoint", "--use-checkpoint"),
        ("--print_config", "--print-config"),
        ("--disable-am", "--disable-amp"),
    ],
)
def test_an_unknown_flag_ends_the_program_and_names_the_nearest(given, nearest, capsys):
    assert f"unknown flag {given}; did you mean {nearest}?" in usage_error(
        capsys, "--cfg", str(NAMED), given, "3"
    )


def test_a_stray_argument_a_missing_cfg_and_a_wrong_number_are_each_one_line(capsys):
    assert "--cfg FILE" in usage_error(capsys, "--cfg", str(NAMED), "stray")
    assert "--cfg" in usage_error(capsys, "--eval")
    assert "--batch-size" in usage_error(capsys, "--cfg", str(NAMED), "--batch-size", "many")


def test_help_lists_every_flag_with_a_text(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    reference = (
        "--cfg --opts --batch-size --data-path --zip --cache-mode --pretrained --resume"
        " --accumulation-steps --use-checkpoint --disable_amp --amp-opt-level --output --tag --eval"
        " --throughput --local_rank --local-rank --fused_window_process --fused_layernorm --optim"
    )
    assert all(
        flag in printed
        for flag in [
            *reference.split(),
            "--print-config",
            "--epochs",
            "--seed",
            "--device",
            "--compile",
        ]
    )
    parser = build_parser(config.KEYS)
    assert all(action.help for action in parser._actions)


def test_a_flag_that_is_not_given_overrides_nothing(tmp_path):
    """In Swin the defaults of --cache-mode and --output hide what the YAML says."""
    path = write(
        tmp_path,
        "a.yaml",
        "DATA: {CACHE_MODE: full}\nOUTPUT: runs\nTAG: mine\nAMP_ENABLE: False\nSEED: 7\n",
    )
    args = parse_args(["--cfg", str(path)])
    assert not {
        name: value
        for name, value in vars(args).items()
        if name not in ("cfg", "print_config") and value is not None
    }
    cfg = get_config(args)
    assert (cfg.DATA.CACHE_MODE, cfg.OUTPUT, cfg.AMP_ENABLE, cfg.SEED) == (
        "full",
        "runs/swin_tiny_patch4_window7_224/mine",
        False,
        7,
    )


def test_every_flag_sets_its_key_and_wins_over_the_options():
    argv = (
        "--batch-size 2 --data-path d --zip --cache-mode no --pretrained p --resume r"
        " --accumulation-steps 3 --use-checkpoint --disable_amp --output o --tag t --eval"
        " --throughput --fused_window_process --fused_layernorm --optim sgd --epochs 21 --seed 0"
        " --device cpu --compile --resume-changed"
    )
    cfg = command("--opts", "DATA.BATCH_SIZE", "64", "SEED", "9", *argv.split())
    plain = to_dict(cfg)
    expected = {
        "DATA.BATCH_SIZE": 2,
        "DATA.DATA_PATH": "d",
        "DATA.ZIP_MODE": True,
        "DATA.CACHE_MODE": "no",
        "MODEL.PRETRAINED": "p",
        "MODEL.RESUME": "r",
        "TRAIN.ACCUMULATION_STEPS": 3,
        "TRAIN.USE_CHECKPOINT": True,
        "AMP_ENABLE": False,
        "OUTPUT": "o",
        "TAG": "t",
        "EVAL_MODE": True,
        "THROUGHPUT_MODE": True,
        "FUSED_WINDOW_PROCESS": True,
        "FUSED_LAYERNORM": True,
        "TRAIN.OPTIMIZER.NAME": "sgd",
        "TRAIN.EPOCHS": 21,
        "SEED": 0,
        "DEVICE": "cpu",
        "MODEL.COMPILE": True,
        "TRAIN.RESUME_CHANGED": True,
    }
    assert {flag.key for flag in config.FLAGS} == set(expected)
    assert {key: _look_up(plain, key) for key in expected} == expected
    assert cfg.OUTPUT == "o/swin_tiny_patch4_window7_224/t"


def _look_up(tree: dict, key: str):
    for name in key.split("."):
        tree = tree[name]
    return tree


def test_a_wrong_value_of_a_flag_names_flag_and_key():
    with pytest.raises(ConfigError, match="--optim: TRAIN.OPTIMIZER.NAME: 'adam' is not allowed"):
        command("--optim", "adam")


def test_options_given_twice_add_up():
    cfg = command("--opts", "SEED", "1", "TAG", "a", "--eval", "--opts", "TAG", "b")
    assert (cfg.SEED, cfg.TAG) == (1, "b")


def test_the_deprecated_precision_flag_acts_as_in_the_reference(caplog):
    assert (
        not command("--amp-opt-level", "O0").AMP_ENABLE
        and command("--amp-opt-level", "O1").AMP_ENABLE
    )
    assert caplog.text.count("deprecated") == 2


def test_any_object_with_some_attributes_will_do():
    assert get_config(argparse.Namespace(batch_size=4, zip=False, opts=None)).DATA.BATCH_SIZE == 4
    assert get_config(None).DATA.BATCH_SIZE == 128


def test_local_rank_is_the_launchers_then_the_flags_then_0(monkeypatch, tmp_path):
    assert (
        command().LOCAL_RANK == 0
        and command("--local_rank", "2").LOCAL_RANK == 2
        and command("--local-rank=3").LOCAL_RANK == 3
    )
    assert load_config(write(tmp_path, "a.yaml", "LOCAL_RANK: 5")).LOCAL_RANK == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert command("--local_rank", "2").LOCAL_RANK == 1
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        command()


@pytest.mark.parametrize(
    "key, written, read",
    [
        ("AUG.MIXUP", 0, 0.0),  # a whole number stands for a float
        ("AUG.MIXUP", "0", 0.0),
        ("TRAIN.CLIP_GRAD", "5", 5.0),
        ("TRAIN.CLIP_GRAD", 0, 0.0),  # stays; 0 and None both mean off
        ("TRAIN.CLIP_GRAD", None, None),
        ("TRAIN.CLIP_GRAD", "None", None),
        ("MODEL.SWIN.QK_SCALE", "None", None),
        ("AUG.CUTMIX_MINMAX", "[0.2, 0.8]", (0.2, 0.8)),
        ("TRAIN.WEIGHT_DECAY", "1e-8", 1e-8),  # YAML 1.1 reads 1e-8 as text
        ("MODEL.SWIN.MLP_RATIO", 4, 4.0),
        ("MODEL.SWIN.DEPTHS", "2,2,2,2", [2, 2, 2, 2]),
        ("MODEL.SWIN.DEPTHS", (1, 1, 1, 1), [1, 1, 1, 1]),
        ("TRAIN.OPTIMIZER.BETAS", [0.9, "0.95"], (0.9, 0.95)),
        ("DATA.IMG_SIZE", "(224, 448)", (224, 448)),
        ("DATA.IMG_SIZE", [224, 448], (224, 448)),
        ("DATA.IMG_SIZE", "256", 256),
        ("MODEL.SWIN.WINDOW_SIZE", "7,14", (7, 14)),
        ("DATA.DATASET", "IMAGENET", "imagenet"),
        ("DATA.CACHE_MODE", False, "no"),  # YAML 1.1 reads a bare no and off as False
        ("MODEL.PRE_MLP.WHERE", False, "off"),
        ("AUG.AUTO_AUGMENT", None, "none"),
        ("AUG.AUTO_AUGMENT", False, "none"),
        ("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
        ("TRAIN.OPTIMIZER.NAME", "AdamW", "adamw"),
        ("TRAIN.OPTIMIZER.NAME", "timm:lion", "timm:lion"),
        ("MODEL.PRETRAINED", None, ""),
        ("TAG", "0012", "0012"),
        ("EVAL_MODE", "true", True),
        ("TRAIN.LR_SCHEDULER.WARMUP_PREFIX", "False", False),  # the released weights' schedule
        ("MODEL.ATTENTION.MODIFIERS", "qk_residual", ["qk_residual"]),
        (
            "MODEL.ATTENTION.MODIFIERS",
            "qk_residual, crpw(source=table, init_std=1e-4)",
            ["qk_residual", "crpw(source=table, init_std=1e-4)"],
        ),
        (
            "MODEL.ATTENTION.MODIFIERS",
            "['qk_residual', 'crpw(apply=probs, renormalise=True)']",
            ["qk_residual", "crpw(apply=probs, renormalise=True)"],
        ),
        ("MODEL.ATTENTION.MODIFIERS", "[qk_residual, crpw]", ["qk_residual", "crpw"]),
    ],
)
def test_values_are_read_as_they_are_meant(key, written, read):
    value = _look_up(settings(key, written), key)
    assert value == read and type(value) is type(read)


def test_an_unquoted_comma_inside_a_modifier_is_named(tmp_path):
    message = _file_refusal(
        tmp_path, "MODEL: {ATTENTION: {MODIFIERS: [crpw(source=table, init_std=1e-4)]}}"
    )
    assert "'crpw(source=table' is not complete" in message and "quote" in message


def test_bare_words_of_yaml_that_mean_false_are_the_choices_they_spell(tmp_path):
    cfg = load_config(
        write(
            tmp_path,
            "a.yaml",
            "DATA: {CACHE_MODE: no}\nMODEL: {PRE_MLP: {WHERE: off}, SW_MLP: off}\n",
        )
    )
    assert (cfg.DATA.CACHE_MODE, cfg.MODEL.PRE_MLP.WHERE, cfg.MODEL.SW_MLP) == ("no", "off", "off")


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    assert (
        load_config(write(tmp_path, "a.yaml", "TRAIN:\n  WEIGHT_DECAY: 1e-8\n")).TRAIN.WEIGHT_DECAY
        == 1e-8
    )


@pytest.mark.parametrize(
    "dataset, classes",
    [
        ("imagenet", 1000),
        ("imagenet22K", 21841),
        ("digits", 10),
        ("cifar10", 10),
        ("cifar100", 100),
        ("svhn", 10),
        ("tiny_imagenet", 200),
        ("folder", 0),
    ],
)
def test_the_number_of_classes_is_the_data_sets(dataset, classes):
    assert settings("DATA.DATASET", dataset).MODEL.NUM_CLASSES == classes


def test_an_explicit_number_of_classes_stands_for_a_folder():
    assert settings("DATA.DATASET", "folder", "MODEL.NUM_CLASSES", 1000).MODEL.NUM_CLASSES == 1000


def test_no_transfer_of_windows_fits_any_number_of_stages():
    cfg = settings(
        "MODEL.TYPE", "swinv2", "MODEL.SWINV2.DEPTHS", [2], "MODEL.SWINV2.NUM_HEADS", [3]
    )
    assert cfg.MODEL.SWINV2.PRETRAINED_WINDOW_SIZES == [0]


def test_the_configuration_is_frozen_and_can_be_pickled():
    cfg = settings()
    with pytest.raises(AttributeError):
        cfg.TRAIN.BASE_LR = 1.0
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_reading_twice_gives_equal_configurations_that_share_no_list():
    first, second = settings(), settings()
    assert first == second and first.MODEL.SWIN.DEPTHS is not second.MODEL.SWIN.DEPTHS


def test_superseded_settings_are_accepted_with_a_note_and_defaults_without(caplog):
    assert notes(settings()) == [] and caplog.text == ""
    cfg = settings(
        "FUSED_LAYERNORM",
        True,
        "FUSED_WINDOW_PROCESS",
        True,
        "ENABLE_AMP",
        True,
        "DATA.MASK_RATIO",
        0.5,
        "AMP_OPT_LEVEL",
        "O1",
    )
    assert len(notes(cfg)) == 5 and all(note in caplog.text for note in notes(cfg))
    assert "torch's own fused LayerNorm" in caplog.text


def test_other_processes_stay_silent(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    settings("FUSED_LAYERNORM", True)
    assert caplog.text == ""


def test_a_minimum_above_the_peak_is_noted():
    assert "the rate will rise" in notes(settings("TRAIN.BASE_LR", 1e-6))[0]


def test_every_key_has_a_meaning_and_a_default_that_its_own_kind_accepts_unchanged():
    for key, entry in config.KEYS.items():
        assert entry.meaning and entry.kind.allowed, key
        assert entry.kind.convert(entry.default) == entry.default and type(
            entry.kind.convert(entry.default)
        ) is type(entry.default), key


def test_the_references_defaults_are_kept():
    expected = {
        "DATA.BATCH_SIZE": 128,
        "DATA.DATA_PATH": "",
        "DATA.DATASET": "imagenet",
        "DATA.IMG_SIZE": 224,
        "DATA.INTERPOLATION": "bicubic",
        "DATA.ZIP_MODE": False,
        "DATA.CACHE_MODE": "part",
        "DATA.PIN_MEMORY": True,
        "DATA.NUM_WORKERS": 8,
        "DATA.MASK_PATCH_SIZE": 32,
        "DATA.MASK_RATIO": 0.6,
        "MODEL.TYPE": "swin",
        "MODEL.NAME": "swin_tiny_patch4_window7_224",
        "MODEL.PRETRAINED": "",
        "MODEL.RESUME": "",
        "MODEL.NUM_CLASSES": 1000,
        "MODEL.DROP_RATE": 0.0,
        "MODEL.DROP_PATH_RATE": 0.1,
        "MODEL.LABEL_SMOOTHING": 0.1,
        "MODEL.SIMMIM.NORM_TARGET.ENABLE": False,
        "MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE": 47,
        "TRAIN.START_EPOCH": 0,
        "TRAIN.EPOCHS": 300,
        "TRAIN.WARMUP_EPOCHS": 20,
        "TRAIN.WEIGHT_DECAY": 0.05,
        "TRAIN.BASE_LR": 5e-4,
        "TRAIN.WARMUP_LR": 5e-7,
        "TRAIN.MIN_LR": 5e-6,
        "TRAIN.CLIP_GRAD": 5.0,
        "TRAIN.AUTO_RESUME": True,
        "TRAIN.ACCUMULATION_STEPS": 1,
        "TRAIN.USE_CHECKPOINT": False,
        "TRAIN.LR_SCHEDULER.NAME": "cosine",
        "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 30,
        "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.1,
        "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": True,
        "TRAIN.LR_SCHEDULER.GAMMA": 0.1,
        "TRAIN.LR_SCHEDULER.MULTISTEPS": [],
        "TRAIN.OPTIMIZER.NAME": "adamw",
        "TRAIN.OPTIMIZER.EPS": 1e-8,
        "TRAIN.OPTIMIZER.BETAS": (0.9, 0.999),
        "TRAIN.OPTIMIZER.MOMENTUM": 0.9,
        "TRAIN.LAYER_DECAY": 1.0,
        "AUG.COLOR_JITTER": 0.4,
        "AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
        "AUG.REPROB": 0.25,
        "AUG.REMODE": "pixel",
        "AUG.RECOUNT": 1,
        "AUG.MIXUP": 0.8,
        "AUG.CUTMIX": 1.0,
        "AUG.CUTMIX_MINMAX": None,
        "AUG.MIXUP_PROB": 1.0,
        "AUG.MIXUP_SWITCH_PROB": 0.5,
        "AUG.MIXUP_MODE": "batch",
        "TEST.CROP": True,
        "TEST.SEQUENTIAL": False,
        "TEST.SHUFFLE": False,
        "ENABLE_AMP": False,
        "AMP_ENABLE": True,
        "AMP_OPT_LEVEL": "",
        "TAG": "default",
        "SAVE_FREQ": 1,
        "PRINT_FREQ": 10,
        "SEED": 0,
        "EVAL_MODE": False,
        "THROUGHPUT_MODE": False,
        "LOCAL_RANK": 0,
        "FUSED_WINDOW_PROCESS": False,
        "FUSED_LAYERNORM": False,
        "MODEL.SWIN.QK_SCALE": None,
        "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES": [0, 0, 0, 0],
    }
    family = {
        "PATCH_SIZE": 4,
        "IN_CHANS": 3,
        "EMBED_DIM": 96,
        "DEPTHS": [2, 2, 6, 2],
        "NUM_HEADS": [3, 6, 12, 24],
        "WINDOW_SIZE": 7,
        "MLP_RATIO": 4.0,
        "APE": False,
        "PATCH_NORM": True,
    }
    expected |= {
        f"MODEL.{name}.{leaf}": value
        for name in ("SWIN", "SWINV2", "SWIN_MLP")
        for leaf, value in family.items()
    }
    expected |= {f"MODEL.{name}.QKV_BIAS": True for name in ("SWIN", "SWINV2")}
    assert {key: _look_up(settings(), key) for key in expected} == expected
    # --output is "output" by default, as in Swin
    assert settings().OUTPUT == "output/swin_tiny_patch4_window7_224/default"


def test_base_files_come_first_depth_first_in_list_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "root.yaml", "TAG: root\nSEED: 1\nPRINT_FREQ: 1\nSAVE_FREQ: 1\n")
    write(tmp_path / "sub", "left.yaml", "BASE: ['../root.yaml']\nTAG: left\nSEED: 2\n")
    write(tmp_path / "sub", "right.yaml", "BASE: ''\nSEED: 3\nSAVE_FREQ: 3\n")
    cfg = load_config(
        write(tmp_path, "leaf.yaml", "BASE: [sub/left.yaml, sub/right.yaml]\nSAVE_FREQ: 4\n")
    )
    assert (cfg.TAG, cfg.SEED, cfg.PRINT_FREQ, cfg.SAVE_FREQ) == ("left", 3, 1, 4)
    assert cfg.BASE == [""]


def test_base_may_be_a_bare_name_and_a_file_may_be_reached_twice(tmp_path):
    write(tmp_path, "root.yaml", "SEED: 4\n")
    write(tmp_path, "a.yaml", "BASE: root.yaml\nTAG: a\n")
    write(tmp_path, "b.yaml", "BASE: root.yaml\nPRINT_FREQ: 2\n")
    cfg = load_config(write(tmp_path, "c.yaml", "BASE: [a.yaml, b.yaml]\n"))
    assert (cfg.SEED, cfg.TAG, cfg.PRINT_FREQ) == (4, "a", 2)


def test_a_cycle_of_base_files_is_named(tmp_path):
    write(tmp_path, "a.yaml", "BASE: b.yaml\n")
    path = write(tmp_path, "b.yaml", "BASE: [a.yaml]\n")
    with pytest.raises(ConfigError, match="b.yaml -> a.yaml -> b.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match="own.yaml -> own.yaml"):
        load_config(write(tmp_path, "own.yaml", "BASE: own.yaml\n"))


def test_anchors_and_merge_keys_of_yaml_work(tmp_path):
    cfg = load_config(
        write(
            tmp_path,
            "a.yaml",
            "MODEL:\n  SWIN: &same {EMBED_DIM: 48, NUM_HEADS: [2, 4, 8, 16]}\n"
            "  SWINV2: {<<: *same, EMBED_DIM: 64}\n",
        )
    )
    assert (cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWINV2.EMBED_DIM, cfg.MODEL.SWINV2.NUM_HEADS) == (
        48,
        64,
        [2, 4, 8, 16],
    )


def test_an_empty_file_and_empty_sections_are_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "empty.yaml", "")) == settings()
    assert (
        load_config(write(tmp_path, "hollow.yaml", "# nothing\nTRAIN:\nBASE:\nMODEL: {SWIN: {}}\n"))
        == settings()
    )


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--output", "", "--tag", "x"),
        ("--output", "/", "--tag", "a/b"),
        ("--output", "runs/", "--amp-opt-level", "O0"),
        (
            "--opts",
            "DATA.IMG_SIZE",
            "(224, 448)",
            "TRAIN.CLIP_GRAD",
            "None",
            "MODEL.SW_MLP",
            "off",
            "AUG.CUTMIX_MINMAX",
            "0.1,0.9",
        ),
        (
            "--opts",
            "MODEL.ATTENTION.MODIFIERS",
            "crpw(source=table, init_std=1e-4)",
            "TAG",
            "no",
            "TRAIN.WEIGHT_DECAY",
            "1e-8",
            "DATA.DATASET",
            "folder",
        ),
    ],
    ids=lambda argv: " ".join(argv) or "plain",
)
def test_the_printed_configuration_reads_back_equal_output_included(argv, tmp_path):
    cfg = command(*argv)
    again = load_config(write(tmp_path, "printed.yaml", dump_config(cfg)))
    assert again == cfg and again.OUTPUT == cfg.OUTPUT
    assert dump_config(again) == dump_config(cfg)


def test_the_printed_configuration_is_the_same_on_every_process(monkeypatch):
    first = dump_config(settings())
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert dump_config(settings()) == first


def test_the_plain_dict_holds_only_plain_values():
    def plain(value) -> bool:
        if isinstance(value, dict):
            return type(value) is dict and all(map(plain, value.values()))
        return (
            all(map(plain, value))
            if type(value) is list
            else type(value) in (str, int, float, bool, type(None))
        )

    assert plain(to_dict(settings("DATA.IMG_SIZE", (224, 448))))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_yaml_is_valid_reads_back_equal_and_opens_with_its_command(path, tmp_path):
    cfg = load_config(path)
    assert load_config(write(tmp_path, "printed.yaml", dump_config(cfg))) == cfg
    assert notes(cfg) == []
    assert (
        f"main.py --cfg {path.relative_to(ROOT).as_posix()}" in path.read_text().split("BASE:")[0]
    )
    published = [
        line for line in path.read_text().splitlines() if line.startswith("#") and "%" in line
    ]
    assert all("ublished" in line for line in published)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_name_is_the_files_so_that_no_two_runs_share_a_folder(path):
    """In Swin the large 12to16 file has the base model's name. Its SimMIM files differ by TAG."""
    cfg = load_config(path)
    assert path.stem == (cfg.TAG if path.parent.name == "simmim" else cfg.MODEL.NAME)


STD = (300, 20, 0.05, 5e-4, 5e-7, 5e-6)
K22, FT = (90, 5, 0.05, 1.25e-4, 1.25e-7, 1.25e-6), (30, 5, 1e-8, 2e-5, 2e-8, 2e-7)
K22_V2 = (90, 5, 0.1, 1.25e-4, 1.25e-7, 1.25e-6)
D6, D18 = [2, 2, 6, 2], [2, 2, 18, 2]
# file: image, channels, blocks, heads of stage 0, window, drop path, schedule, centre crop
TABLE = {
    "swin/swin_tiny_patch4_window7_224": (224, 96, D6, 3, 7, 0.2, STD, True),
    "swin/swin_small_patch4_window7_224": (224, 96, D18, 3, 7, 0.3, STD, True),
    "swin/swin_base_patch4_window7_224": (224, 128, D18, 4, 7, 0.5, STD, True),
    "swin/swin_tiny_c24_patch4_window8_256": (256, 96, D6, 4, 8, 0.2, STD, True),
    "swin/swin_base_patch4_window12_384_finetune": (384, 128, D18, 4, 12, 0.5, FT, False),
    "swin/swin_tiny_patch4_window7_224_22k": (224, 96, D6, 3, 7, 0.1, K22, True),
    "swin/swin_small_patch4_window7_224_22k": (224, 96, D18, 3, 7, 0.2, K22, True),
    "swin/swin_base_patch4_window7_224_22k": (224, 128, D18, 4, 7, 0.2, K22, True),
    "swin/swin_large_patch4_window7_224_22k": (224, 192, D18, 6, 7, 0.2, K22, True),
    "swin/swin_tiny_patch4_window7_224_22kto1k_finetune": (224, 96, D6, 3, 7, 0.1, FT, True),
    "swin/swin_small_patch4_window7_224_22kto1k_finetune": (224, 96, D18, 3, 7, 0.2, FT, True),
    "swin/swin_base_patch4_window7_224_22kto1k_finetune": (224, 128, D18, 4, 7, 0.2, FT, True),
    "swin/swin_large_patch4_window7_224_22kto1k_finetune": (224, 192, D18, 6, 7, 0.2, FT, True),
    "swin/swin_base_patch4_window12_384_22kto1k_finetune": (
        384,
        128,
        D18,
        4,
        12,
        0.2,
        FT,
        False,
    ),
    "swin/swin_large_patch4_window12_384_22kto1k_finetune": (
        384,
        192,
        D18,
        6,
        12,
        0.2,
        FT,
        False,
    ),
    "swinv2/swinv2_tiny_patch4_window8_256": (256, 96, D6, 3, 8, 0.2, STD, True),
    "swinv2/swinv2_tiny_patch4_window16_256": (256, 96, D6, 3, 16, 0.2, STD, True),
    "swinv2/swinv2_small_patch4_window8_256": (256, 96, D18, 3, 8, 0.3, STD, True),
    "swinv2/swinv2_small_patch4_window16_256": (256, 96, D18, 3, 16, 0.3, STD, True),
    "swinv2/swinv2_base_patch4_window8_256": (256, 128, D18, 4, 8, 0.5, STD, True),
    "swinv2/swinv2_base_patch4_window16_256": (256, 128, D18, 4, 16, 0.5, STD, True),
    "swinv2/swinv2_base_patch4_window12_192_22k": (192, 128, D18, 4, 12, 0.2, K22_V2, True),
    "swinv2/swinv2_large_patch4_window12_192_22k": (192, 192, D18, 6, 12, 0.2, K22_V2, True),
    "swinv2/swinv2_base_patch4_window12to16_192to256_22kto1k_ft": (
        256,
        128,
        D18,
        4,
        16,
        0.2,
        FT,
        True,
    ),
    "swinv2/swinv2_base_patch4_window12to24_192to384_22kto1k_ft": (
        384,
        128,
        D18,
        4,
        24,
        0.2,
        FT,
        False,
    ),
    "swinv2/swinv2_large_patch4_window12to16_192to256_22kto1k_ft": (
        256,
        192,
        D18,
        6,
        16,
        0.2,
        FT,
        True,
    ),
    "swinv2/swinv2_large_patch4_window12to24_192to384_22kto1k_ft": (
        384,
        192,
        D18,
        6,
        24,
        0.2,
        FT,
        False,
    ),
    "swinmlp/swin_mlp_base_patch4_window7_224": (224, 128, D18, 4, 7, 0.5, STD, True),
    "swinmlp/swin_mlp_tiny_c24_patch4_window8_256": (256, 96, D6, 4, 8, 0.2, STD, True),
    "swinmlp/swin_mlp_tiny_c12_patch4_window8_256": (256, 96, D6, 8, 8, 0.2, STD, True),
    "swinmlp/swin_mlp_tiny_c6_patch4_window8_256": (256, 96, D6, 16, 8, 0.2, STD, True),
}


def _node(cfg):
    return cfg.MODEL[cfg.MODEL.TYPE.upper()]


def test_no_named_configuration_is_missing_from_the_table():
    assert set(TABLE) == {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        for path in CONFIGS
        if path.parent.name in ("swin", "swinv2", "swinmlp")
        and path.parent.parent.name == "configs"
    }


@pytest.mark.parametrize("name", TABLE)
def test_named_configurations_hold_the_tables_values(name):
    cfg = load_config(ROOT / f"configs/{name}.yaml")
    node, train = _node(cfg), cfg.TRAIN
    schedule = (
        train.EPOCHS,
        train.WARMUP_EPOCHS,
        train.WEIGHT_DECAY,
        train.BASE_LR,
        train.WARMUP_LR,
        train.MIN_LR,
    )
    values = (
        cfg.DATA.IMG_SIZE,
        node.EMBED_DIM,
        node.DEPTHS,
        node.NUM_HEADS[0],
        node.WINDOW_SIZE,
        cfg.MODEL.DROP_PATH_RATE,
        schedule,
        cfg.TEST.CROP,
    )
    assert values == TABLE[name]
    assert node.NUM_HEADS == [node.NUM_HEADS[0] * 2**stage for stage in range(4)]
    assert (cfg.DATA.DATASET, cfg.MODEL.NUM_CLASSES) == (
        ("imagenet22K", 21841) if name.endswith("_22k") else ("imagenet", 1000)
    )
    assert (
        cfg.MODEL.TYPE
        == {"swin": "swin", "swinv2": "swinv2", "swinmlp": "swin_mlp"}[name.split("/")[0]]
    )
    if cfg.MODEL.TYPE == "swinv2":
        assert node.PRETRAINED_WINDOW_SIZES == ([12, 12, 12, 6] if "12to" in name else [0, 0, 0, 0])


def test_named_configurations_are_the_references():
    """Everything but mixture of experts and SimMIM pre-training, which this program does not have,
    and the name that Swin shares with the base model.
    """
    described, _ = golden("zoo")
    entries = [entry for entry in described["models"] if not entry["simmim_pretrain"]]
    assert len(entries) == 33
    for entry in entries:
        cfg = load_config(ROOT / "configs" / entry["yaml"])
        node = _node(cfg)
        outside = {
            "img_size": cfg.DATA.IMG_SIZE,
            "num_classes": cfg.MODEL.NUM_CLASSES,
            "drop_rate": cfg.MODEL.DROP_RATE,
            "drop_path_rate": cfg.MODEL.DROP_PATH_RATE,
        }
        assert {
            key: outside[key] if key in outside else node[key.upper()] for key in entry["model"]
        } == entry["model"], entry["yaml"]
        assert {key: cfg.TRAIN[key] for key in entry["train"]} == entry["train"], entry["yaml"]
        assert (cfg.MODEL.TYPE, cfg.TRAIN.LR_SCHEDULER.NAME, cfg.DATA.DATASET, cfg.TEST.CROP) == (
            entry["family"],
            entry["lr_scheduler"],
            entry["dataset"],
            entry["test_crop"],
        ), entry["yaml"]
        assert cfg.MODEL.NAME == (
            entry["name"]
            if "large_patch4_window12to16" not in entry["yaml"]
            else Path(entry["yaml"]).stem
        )


COMBINATIONS = [
    "",
    "_qkres",
    "_crpw",
    "_premlp",
    "_qkres_crpw",
    "_qkres_premlp",
    "_crpw_premlp",
    "_qkres_crpw_premlp",
]


@pytest.mark.parametrize(
    "stem, where",
    [
        ("identity/swin_tiny_patch4_window7_224", "stem"),
        ("identity/swinv2_tiny_patch4_window8_256", "stage"),
        ("digits/digits_swin", "stem"),
        ("digits/digits_swinv2", "stage"),
    ],
)
def test_the_grid_switches_exactly_what_its_names_say(stem, where):
    base = to_dict(load_config(ROOT / f"configs/{stem}.yaml"))
    for suffix in COMBINATIONS:
        cfg = load_config(ROOT / f"configs/{stem}{suffix}.yaml")
        parts = suffix.split("_")
        assert cfg.MODEL.ATTENTION.MODIFIERS == [
            name for part, name in (("qkres", "qk_residual"), ("crpw", "crpw")) if part in parts
        ]
        assert cfg.MODEL.PRE_MLP.WHERE == (where if "premlp" in parts else "off")
        rest = to_dict(cfg)
        rest["MODEL"] |= {key: base["MODEL"][key] for key in ("NAME", "ATTENTION")}
        rest["MODEL"]["PRE_MLP"]["WHERE"] = "off"
        assert rest == base


def test_build_up_networks_differ_in_depth_and_pre_mlp_alone():
    for depth, pre_mlp in [
        (0, True),
        (1, False),
        (1, True),
        (2, False),
        (2, True),
        (3, False),
        (3, True),
        (4, False),
    ]:
        cfg = load_config(
            ROOT
            / f"configs/identity/buildup/buildup_{'premlp_' if pre_mlp else ''}depth{depth}.yaml"
        )
        node = cfg.MODEL.SWINV2
        shape = (
            cfg.DATA.IMG_SIZE,
            node.EMBED_DIM,
            node.DEPTHS,
            node.NUM_HEADS,
            node.WINDOW_SIZE,
            node.MLP_RATIO,
        )
        assert shape == (256, 384, [depth], [12], 8, 2.0)
        assert cfg.MODEL.ATTENTION.MODIFIERS == ["qk_residual", "crpw"]
        assert (cfg.MODEL.PRE_MLP.WHERE, cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS) == (
            "stage" if pre_mlp else "off",
            100,
            10,
        )
        assert not pre_mlp or cfg.MODEL.PRE_MLP.RATIO == 2.0


def test_the_quickstart_needs_no_data_no_workers_and_no_gpu():
    cfg = load_config(DIGITS)
    assert (cfg.DATA.DATASET, cfg.DATA.DATA_PATH, cfg.DATA.NUM_WORKERS, cfg.DEVICE) == (
        "digits",
        "",
        0,
        "auto",
    )
    assert (
        cfg.MODEL.ATTENTION.MODIFIERS == ["qk_residual", "crpw"]
        and cfg.MODEL.PRE_MLP.WHERE != "off"
    )
    assert cfg.MODEL.SWINV2.IN_CHANS == 1 and cfg.MODEL.NUM_CLASSES == 10


def test_the_home_folder_may_be_written_short_in_output(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(None, ["OUTPUT", "~/runs"]).OUTPUT.startswith(f"{tmp_path}/runs/")
