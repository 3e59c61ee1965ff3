"""Settings that nobody can mean, in YAML, --opts and flags: one line, and status 2."""

import os
import time

import pytest

from config import ConfigError, get_config, load_config, parse_args
from tests.fuzz import call_main, one_line, refusal

DIGITS = "configs/digits/digits_tiny.yaml"
BOMB = "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" if n else "a0: &a0 {SEED: 1}\n"
    for n in range(12)
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def file_refusal(folder, content: str | bytes) -> str:
    path = folder / "odd.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    message = refusal(lambda: load_config(path))
    assert message and time.monotonic() - start < 20
    return message


@pytest.mark.parametrize(
    "content, words",
    [
        ("TRAIN: {EPOCHS: 2020-13-45}", "TRAIN.EPOCHS: '2020-13-45'"),
        ("TRAIN: {EPOCHS: 2020-10-12T99:99:99Z}", "TRAIN.EPOCHS"),
        ("TRAIN: {EPOCHS: 010}", "TRAIN.EPOCHS: '010'"),  # 8 in YAML 1.1
        ("TRAIN: {EPOCHS: 1:30}", "TRAIN.EPOCHS: '1:30'"),  # 90 in YAML 1.1
        ("TRAIN: {EPOCHS: !!int foo}", "line 1): 'foo' is no int"),
        ("TRAIN: {BASE_LR: !!float foo}", "'foo' is no float"),
        ("TRAIN: {DETERMINISTIC: !!bool foo}", "'foo' is no bool"),
        ("TAG: !!timestamp foo", "'foo' is no timestamp"),
        ("TAG: " + "[" * 2000 + "]" * 2000, "nested too deep"),
        ("".join(f"{' ' * n}a:\n" for n in range(1000)), "nested too deep"),
        (f"TRAIN: {{EPOCHS: {'9' * 5000}}}", "not valid YAML (line 1)"),
        (f"TRAIN: {{EPOCHS: 0x{'f' * 5000}}}", "TRAIN.EPOCHS: a int of too many digits"),
        (f"TRAIN: {{BASE_LR: 1{'0' * 400}}}", "TRAIN.BASE_LR"),
        (f"BASE: {'x' * 5000}", "BASE: "),
        (f"BASE: {'x/' * 3000}", "BASE: "),
        ('BASE: "a\\0b"', "is not a file"),
        ("BASE: odd.yaml", "include each other"),
        (BOMB, "odd.yaml: "),  # PyYAML before 6.0.4 merges exponentially
        ("TAG: x".encode("utf-16"), "no UTF-8 text"),
        (b"\xff\xfe\x00", "no UTF-8 text"),
        (b"TAG: a\x00b", "special characters are not allowed"),
        ("TRAIN:\n\tEPOCHS: 3", "line 2"),
        ("TAG: a\nTAG: b", "TAG is given twice"),
        ('TAG: "a\\0b"', "control character"),
        ('MODEL: {NAME: "a\\nb"}', "control character"),
        ('DATA: {DATA_PATH: "\\ud800"}', "no Unicode text"),
        ("TAG: ..", "without .."),
        ("TAG: a/./b", "without .."),
        ('"\\e[31m": 3', "unknown key '\\x1b[31m'"),
        ("[a]: 3", "unhashable key"),
        ("TAG: a\n---\nTAG: b", "another document"),
        ("TRAIN: {THREADS: 100000}", "more than 1024 cannot be used"),
        ("TRAIN: {EPOCHS: 1000000000}", "more than 1000000 cannot be used"),
        ("DATA: {IMG_SIZE: 1000000000}", "more than 32768 cannot be used"),
        ("MODEL: {SWIN: {DEPTHS: [100000000]}}", "more than 1000 cannot be used"),
        ("MODEL: {SWIN: {MLP_RATIO: 1.0e+300}}", "more than 1000 cannot be used"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_odd_yaml_is_one_line(content, words, tmp_path):
    assert words in file_refusal(tmp_path, content)


def test_a_file_reached_thousands_of_times_is_refused(tmp_path):
    for level in range(12):
        names = f"BASE: [{', '.join([f'{level + 1}.yaml'] * 4)}]" if level < 11 else "SEED: 1"
        (tmp_path / f"{level}.yaml").write_text(names)
    with pytest.raises(ConfigError, match="more than 500 files"):
        load_config(tmp_path / "0.yaml")


def test_text_that_yaml_1_1_reads_otherwise_is_taken_as_it_is_written(tmp_path):
    for word in ("2020-10-12", "0012", "1__0", "1:30", "run_100%", "{}", "1_0:00.5"):
        path = tmp_path / "text.yaml"
        path.write_text(f"TAG: {word!r}" if word == "{}" else f"TAG: {word}")
        assert load_config(path).TAG == word


@pytest.mark.parametrize(
    "flag", ["--resume", "--pretrained", "--data-path", "--tag", "--cfg", "--optim", "--device"]
)
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_value_from_an_unset_shell_variable_is_refused(flag, value):
    argv = [flag, value] if flag == "--cfg" else ["--cfg", DIGITS, flag, value]
    with pytest.raises(ConfigError, match=f"^{flag}: .* is empty"):
        get_config(parse_args(argv))


def test_an_empty_checkpoint_among_the_options_is_refused_and_none_is_none():
    for key in ("MODEL.RESUME", "MODEL.PRETRAINED"):
        with pytest.raises(ConfigError, match=f"--opts: {key}: '' is empty"):
            load_config(None, [key, ""])
        assert load_config(None, [key, "None"]).MODEL[key.split(".")[1]] == ""


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--resume", "https://[::1", "--eval"], "is no URL"),
        (["--resume", "~nouser/x", "--eval"], "~nouser/x does not exist"),
        (["--pretrained", "a\0b"], "control character"),
        (["--opts", "DATA.IMG_SIZE", "(" * 5000], "DATA.IMG_SIZE"),
        (["--opts", "DATA.IMG_SIZE", "9" * 5000], "DATA.IMG_SIZE"),
        (["--opts", "TRAIN.BASE_LR", "1" + "0" * 400], "TRAIN.BASE_LR"),
        (["--opts", "A\x1b[31m", "1"], "unknown key"),
        (["--epochs", "9" * 5000], "--epochs"),
        (["--\x1b[31m"], "unknown argument"),
        (["--opts", "MODEL.SWINV2.EMBED_DIM", "65536", "MODEL.SWINV2.MLP_RATIO", "1000"], ""),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_odd_command_is_one_line(argv, words, tmp_path):
    status, _, error = call_main("--cfg", DIGITS, "--output", tmp_path, "--print-config", *argv)
    if "--eval" in argv:
        status, _, error = call_main("--cfg", DIGITS, "--output", tmp_path, *argv)
    assert status == (2 if words else 0) and words in error
    assert not words or one_line(error.rstrip("\n"))


def test_a_home_folder_of_nobody_is_a_folder_that_is_not_there(tmp_path):
    words = ["DATA.DATASET", "folder", "AUG.AFFINE", "False", "MODEL.SWINV2.IN_CHANS", "3"]
    argv = ["--cfg", DIGITS, "--output", tmp_path, "--data-path", "~nouser/x", "--opts", *words]
    status, _, error = call_main(*argv)
    assert status == 2 and "~nouser/x" in error


def test_a_name_with_a_percent_sign_names_its_log_lines(tmp_path):
    from tests.wiring.runs import run

    left = run(tmp_path, {"MODEL.NAME": "run_100%s{}", "TAG": "50%"})
    assert left["status"] == [0]
    log = (tmp_path / "output" / "run_100%s{}" / "50%" / "log_rank0.txt").read_text()
    assert " run_100%s{}] " in log
    assert os.path.isfile(tmp_path / "output/run_100%s{}/50%/last.pth")


# ---- settings that do nothing


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.SWINV2.EMBED_DIM", 48], "MODEL.TYPE is swin; did you mean MODEL.SWIN.EMBED_DIM?"),
        (["MODEL.CAIT.CLASS_DEPTH", 1], "MODEL.TYPE is swin"),
        (["MODEL.PRE_MLP.RATIO", 2], "MODEL.PRE_MLP.WHERE is 'off'"),
        (["MODEL.PRE_MLP.DROP_PATH", True], "MODEL.PRE_MLP.WHERE is 'off'"),
        (["TRAIN.LR_SCHEDULER.GAMMA", 0.5], "TRAIN.LR_SCHEDULER.NAME is 'cosine'"),
        (["MODEL.EMA.DECAY", 0.9], "MODEL.EMA.ENABLE is False"),
        (["AUG.COLOR_JITTER", 0.1], "AUG.AUTO_AUGMENT is 'rand-m9-mstd0.5-inc1'"),
        (["TRAIN.OPTIMIZER.MOMENTUM", 0.5], "TRAIN.OPTIMIZER.NAME is 'adamw'"),
        (["MODEL.INIT_OVER_PRETRAINED", True, "EVAL_MODE", True], "EVAL_MODE is True"),
        (["MODEL.INIT_OVER_PRETRAINED", True], ""),
        (["MODEL.PRE_MLP.RATIO", 2, "MODEL.PRE_MLP.WHERE", "stem"], ""),
        (["MODEL.SWIN.EMBED_DIM", 48], ""),
        (["MODEL.SWINV2.EMBED_DIM", 96], ""),  # its default
    ],
    ids=str,
)
def test_a_setting_that_does_nothing_beside_others_is_told(opts, words, caplog, tmp_path):
    load_config(None, opts)
    assert (f"{opts[0]} {opts[1]!r}" in caplog.text.replace("2.0", "2")) == bool(words)
    assert words in caplog.text
    assert caplog.text.count("has no effect") == bool(words)


def test_what_a_base_file_has_for_other_families_is_not_told(caplog, tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {SWIN: {EMBED_DIM: 48}}")
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("BASE: base.yaml\nMODEL: {TYPE: swinv2, SWINV2: {EMBED_DIM: 48}}")
    load_config(leaf)
    assert "no effect" not in caplog.text
    leaf.write_text("MODEL: {TYPE: swinv2, SWIN: {EMBED_DIM: 48}}")
    load_config(leaf)
    assert "did you mean MODEL.SWINV2.EMBED_DIM?" in caplog.text


# ---- forced backends


@pytest.mark.parametrize("backend", ["eager", "sdpa", "fused"])
def test_a_backend_that_forms_no_matrix_is_refused_where_a_modifier_needs_it(backend):
    words = ["MODEL.ATTENTION.MODIFIERS", "talking_heads", "MODEL.ATTENTION.BACKEND", backend]
    status, _, error = call_main("--cfg", DIGITS, "--print-config", "--opts", *words)
    assert status == 2 and f"MODEL.ATTENTION.BACKEND {backend}: a modifier needs" in error
    words[-1] = "reference"
    status, _, _ = call_main("--cfg", DIGITS, "--print-config", "--opts", *words)
    assert status == 0


@pytest.mark.parametrize(
    "said, words",
    [
        ("sdpa", "WINDOW_ATTENTION_BACKEND sdpa: "),  # the model's scale is one per offset
        ("fussed", "did you mean 'fused'?"),
        ("fused", "WINDOW_ATTENTION_BACKEND fused does not apply"),
    ],
)
def test_a_backend_of_the_environment_is_checked_too(said, words, monkeypatch, tmp_path):
    monkeypatch.setenv("WINDOW_ATTENTION_BACKEND", said)
    monkeypatch.setattr("kernels.window_attention.interface.missing", lambda device: "none here")
    for mode in ("--throughput", "--tag=x"):
        argv = ["--cfg", DIGITS, "--device", "cpu", "--output", tmp_path, mode]
        status, _, error = call_main(*argv)
        assert status == 2 and words in error
