"""The command line as a user meets it: main.py in a process of its own."""

import pytest

from tests.helpers import run_main

DIGITS = ("--cfg", "configs/digits/digits_tiny.yaml")


def test_the_printed_configuration_given_back_prints_itself(tmp_path):
    first = run_main(*DIGITS, "--epochs", "7", "--tag", "again", "--print-config")
    assert first.returncode == 0, first.stderr
    path = tmp_path / "printed.yaml"
    path.write_text(first.stdout)
    second = run_main("--cfg", path, "--print-config")
    assert "EPOCHS: 7" in second.stdout and second.stdout == first.stdout


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            (*DIGITS, "--opts", "DATA.BATCHSIZE", "8"),
            ("DATA.BATCHSIZE", "'8'", "did you mean DATA.BATCH_SIZE?"),
        ),
        (
            (*DIGITS, "--opts", "TRAIN.EPOCHS", "many"),
            ("TRAIN.EPOCHS", "'many'", "a whole number >= 1"),
        ),
        (
            (*DIGITS, "--opts", "DATA.DATASET", "digit"),
            ("DATA.DATASET", "'digit'", "did you mean 'digits'?"),
        ),
        (
            (*DIGITS, "--opts", "MODEL.NUM_CLASSES", "12"),
            ("MODEL.NUM_CLASSES", "12", "'digits'", "10 classes"),
        ),
        ((*DIGITS, "--bach-size", "8"), ("unknown flag --bach-size; did you mean --batch-size?",)),
        (
            ("--cfg", "configs/digits/digits_tny.yaml"),
            ("digits_tny.yaml", "did you mean 'configs/digits/digits_tiny.yaml'?"),
        ),
    ],
    ids=lambda value: " ".join(value[2:]) if value and value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line_a_failing_status_and_leaves_nothing_behind(argv, words, tmp_path):
    done = run_main(*argv, "--output", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "out").exists()


def test_help_needs_no_configuration():
    done = run_main("--help")
    assert done.returncode == 0 and "--print-config" in done.stdout and done.stderr == ""
