"""Outputs that vanish while a run is under way: a closed pipe, a lost terminal, a full disk."""

import errno
import io
import logging
import os
import subprocess
import sys

import pytest

import main as program
import utils
from engine.console import LastingStream, lasting_streams, print_all
from engine.logs import MetricLog, read_metrics
from tests.helpers import ROOT
from tests.wiring.runs import PLACE, command, metrics
from utils import RunError


class Gone(io.StringIO):
    """A stream whose reader has left after some text."""

    def __init__(self, number: int = errno.EPIPE, after: int = 0, tty: bool = False) -> None:
        super().__init__()
        self.number, self.after, self.tty = number, after, tty

    def write(self, text: str) -> int:
        if len(self.getvalue()) >= self.after:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def isatty(self) -> bool:
        return self.tty


def test_closed_standard_streams_do_not_end_a_run_and_the_log_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone(after=500, tty=True))
    monkeypatch.setattr(sys, "stderr", Gone(errno.EIO, tty=True))  # the progress bar's
    assert program.main(command(tmp_path, {"TRAIN.MAX_STEPS": 2})) == 0
    log = (tmp_path / PLACE / "log_rank0.txt").read_text()
    assert log.count("standard output is gone, the run goes on: [Errno 32]") == 1
    assert log.count("standard error is gone, the run goes on: [Errno 5]") == 1
    assert "best accuracy" in log and len(metrics(tmp_path, "train")) == 2


def test_an_error_keeps_its_status_where_nobody_can_read_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Gone())
    assert program.main(["--cfg", "no/such.yaml"]) == 2
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    assert program.main(["--cfg", "no/such.yaml"]) == 2


@pytest.mark.parametrize("number, status", [(errno.EPIPE, 0), (errno.ENOSPC, 2)])
def test_settings_cut_short_by_a_reader_are_fine_and_by_a_full_disk_are_not(
    number, status, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdout", Gone(number))
    argv = ["--cfg", "configs/digits/digits_tiny.yaml", "--print-config"]
    assert program.main(argv) == status
    said = capsys.readouterr().err
    assert said.count("cannot be written") == said.count("\n") == (status == 2)


@pytest.mark.slow
def test_the_interpreters_last_flush_cannot_fail():
    text = (
        "import sys\nfrom engine.console import lasting_streams\n"
        "with lasting_streams():\n    sys.stdin.read(1)\n    print('x' * 99)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        errors = process.communicate(b"go")[1]
    assert process.returncode == 0 and b"Exception ignored" not in errors


def test_characters_that_a_stream_lacks_are_escaped_and_closed_streams_ignored():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with_escapes = LastingStream(stream, "standard output")
    with_escapes.write("größe \udcff\n")
    with_escapes.flush()
    assert raw.getvalue() == rb"gr\xf6\xdfe \udcff" + b"\n"
    stream.close()
    with_escapes.write("more")
    assert not with_escapes.isatty()
    with lasting_streams():
        print_all("")
        sys.stdout.error = OSError(errno.EIO, "lost")
        with pytest.raises(RunError, match="standard output cannot be written"):
            print_all("text")


class Full:
    """A disk that is full for some writes; then it takes three bytes, then everything."""

    def __init__(self, file, times: int) -> None:
        self.file, self.times = file, times

    def write(self, content: bytes) -> int:
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content[: 3 if self.times == -1 else None])

    def close(self) -> None:
        self.file.close()


def test_lines_that_a_full_disk_refuses_follow_once_there_is_space(tmp_path, caplog):
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.write(1, 0, "train", loss=1.0)
        log._lines._file = Full(log._lines._file, 2)
        for step in (2, 3, 4, 5):
            log.write(step, 0, "train", loss=1.0)
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert caplog.text.count("No space left") == 1


def test_a_disk_that_stays_full_ends_neither_log_nor_run(tmp_path, caplog):
    with MetricLog(tmp_path, tensorboard=False) as log:
        log._lines._file = Full(log._lines._file, 99)
        log.write(1, 0, "train", loss=1.0)
    assert caplog.text.count("is not written") == 2  # the entry, and the end


def test_a_log_file_on_a_full_disk_or_without_permission_is_told_once(tmp_path, monkeypatch):
    told = []
    (tmp_path / "log_rank1.txt").mkdir()
    monkeypatch.setattr(utils.LOGGER, "warning", lambda *words: told.append(words[0] % words[1:]))
    utils.create_logger(tmp_path, "name", rank=1)
    logger = utils.create_logger(tmp_path, "name", rank=2)
    monkeypatch.undo()
    assert len(told) == 1 and "log_rank1.txt is not written" in told[0]
    [handler] = [h for h in logging.getLogger().handlers if isinstance(h, utils._LogFile)]
    messages = []
    monkeypatch.setattr(utils.LOGGER, "warning", lambda *words: messages.append(words))
    handler.stream = Gone(errno.ENOSPC)
    logger.info("one")
    logger.info("two")
    assert len(messages) == 1


def test_a_log_that_is_rotated_goes_on(tmp_path):
    logger = utils.create_logger(tmp_path, "name", rank=3)
    logger.info("one")
    (tmp_path / "log_rank3.txt").rename(tmp_path / "log_rank3.txt.1")
    logger.info("two")
    (tmp_path / "log_rank3.txt.1").unlink()
    logger.info("three")


def test_tensorboard_that_cannot_write_is_a_warning(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    with MetricLog(tmp_path, tensorboard=True) as log:
        log.write(1, 0, "train", loss=1.0)
        log._board = type(
            "Broken", (), {"add_scalar": lambda *_: 1 / 0, "close": lambda _: 1 / 0}
        )()
        log.write(2, 0, "train", loss=1.0)
    assert caplog.text.count("TensorBoard is not written") == 2
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


ODD = [
    "[]",
    "3",
    "null",
    "[" * 50000,
    '{"step": "1", "kind": "train"}',
    '{"step": 1.5, "kind": "train"}',
    '{"step": true, "kind": "train"}',
    '{"step": 1, "kind": ["train"]}',
    '{"step": 1, "kind": "train", "loss": "low"}',
    '{"step": 1, "kind": "train", "loss": ' + 5000 * "9" + "}",
    '{"step": 1, "kind": "train", "loss": [1]}',
    '{"step": 1' + 999 * "0" + ', "kind": "train"}',
    "\x00\x00",
]


def test_lines_that_are_no_metrics_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 2, "epoch": 0, "kind": "train", "loss": null}'
    path.write_text("\n".join([good, *ODD, good]) + "\n")
    with MetricLog(tmp_path, resume_step=2, tensorboard=False) as log:
        log.write(3, 0, "train", loss=1.0)
    assert [entry["step"] for entry in read_metrics(path)] == [2, 2, 3]
    assert f"{len(ODD)} line(s) are no metrics entries and are left out, the first is line 2" in (
        caplog.text
    )


def test_a_metrics_file_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics.jsonl: "):
        MetricLog(tmp_path, tensorboard=False)


def test_a_kill_while_the_metrics_are_cut_loses_none(tmp_path, monkeypatch):
    with MetricLog(tmp_path, tensorboard=False) as log:
        for step in (1, 2, 3):
            log.write(step, 0, "train", loss=1.0)
    replace = os.replace

    def killed(source, target):  # in the last moment before the new file
        return 1 / 0 if target.name == "metrics.jsonl" else replace(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(ZeroDivisionError):
        MetricLog(tmp_path, resume_step=2, tensorboard=False)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_pipe_where_the_log_should_be_is_left_alone(tmp_path, caplog):
    os.mkfifo(tmp_path / "log_rank0.txt")
    try:
        utils.create_logger(tmp_path, "run", rank=0)
        assert "log_rank0.txt is not written, the run goes on: it is no file" in caplog.text
    finally:
        utils.create_logger(None, "run", rank=1)
