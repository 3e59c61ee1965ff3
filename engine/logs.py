"""Numbers of a run: metrics.jsonl, which a resumed run continues exactly, and on request
TensorBoard and Weights & Biases.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.wandb_run import LogError, WandbOptions, WandbRun
from utils import one_line

_logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class MetricLog:
    """Writes one JSON object a line: {"step": updates done, "epoch": ..., "kind": "train" | "val" |
    ..., <name>: number, ...}.

    An output that fails while the run is under way (disk full, folder gone) is told once and never
    ends the run; lines that a full disk has not taken follow once there is space.

    Args:
        folder: the run's; None makes a log that writes nothing (all ranks but 0).
        resume_step: how the existing file goes on. n: entries of later steps are dropped, and
            entries of step n that are already there are not written twice, so that the file ends up
            as that of a run never stopped. -1: begin anew. None: add to what is there. What is
            dropped stays in metrics.jsonl.bak.
        tensorboard: also event files in folder/tensorboard.
        wandb: also a W&B run, named `name`, with `config` (plain values); None: none.
        known: as `WandbRun` takes it.
    Raises: LogError if the file cannot be read or opened, or W&B is asked for and not installed. A
        TensorBoard that is missing or cannot write is a warning, since it is on by default.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: WandbOptions | None = None,
        name: str = "",
        config: dict | None = None,
        known: Mapping[str, Any] | None = None,
    ):
        self.path = Path(folder) / FILE if folder is not None else None
        self._lines = None
        self._board = None
        self._run = None
        self._present: set[tuple[int, str]] = set()
        self._failed: set[str] = set()  # outputs whose failure has been told
        if self.path is None:
            return
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entries = _truncate(self.path, resume_step)
            self._lines = Lines(self.path)
        except OSError as error:
            raise LogError(f"{self.path}: {error.strerror or error}") from error
        self._present = {(e["step"], e["kind"]) for e in entries if e["step"] == resume_step}
        if tensorboard:
            self._board = _open_tensorboard(folder, resume_step)
        if wandb is not None:
            fresh = resume_step is None or resume_step < 0
            with self._surviving("Weights & Biases", LogError):
                self._run = WandbRun(
                    folder, wandb, name=name, config=config or {}, fresh=fresh, known=known
                )

    def write(self, step: int, epoch: int | float, kind: str, **scalars: float) -> None:
        """Adds an entry; scalars are numbers or one-element tensors (which are waited for). NaN and
        infinities become null.
        """
        if self._lines is None or (step, kind) in self._present:
            return
        values = {name: _plain(value) for name, value in scalars.items()}
        entry = {"step": int(step), "epoch": _plain(epoch), "kind": kind, **values}
        with self._surviving(str(self.path)):
            self._lines.write(json.dumps(entry) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        with self._surviving("TensorBoard"):
            for name, value in numbers.items() if self._board is not None else ():
                self._board.add_scalar(name, value, step)
        if self._run is not None:
            with self._surviving("Weights & Biases"):
                self._run.log(step, {**numbers, "epoch": epoch})

    @property
    def mark(self) -> dict[str, Any]:
        """What a checkpoint has to hold for the logs to go on: plain data."""
        return {} if self._run is None else {"wandb": self._run.mark}

    @contextmanager
    def _surviving(self, output: str, ending: type[BaseException] | tuple = ()) -> Iterator[None]:
        """Turns any failure inside, but for those that end the run, into a warning, the first
        time.
        """
        try:
            yield
        except ending:
            raise
        except Exception as error:  # libraries raise anything
            if output not in self._failed:
                self._failed.add(output)
                _logger.warning("%s is not written, the run goes on: %s", output, one_line(error))

    def close(self) -> None:
        """Ends all outputs; a second call does nothing."""
        if self._lines is not None:
            with self._surviving(f"the end of {self.path}"):
                self._lines.close()
        if self._board is not None:
            with self._surviving("the end of TensorBoard's events"):
                self._board.close()
        if self._run is not None:
            with self._surviving("the end of the Weights & Biases run"):
                self._run.finish()
        self._lines = None
        self._board = None
        self._run = None

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Lines:
    """A file to which lines are added, each out of this process at once so that a killed run keeps
    it. What the disk does not take is kept here and written with the next line.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)
        self._waiting = b""

    def write(self, line: str) -> None:
        """Adds a line. Raises: OSError."""
        self._waiting += line.encode()
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            written = self._file.write(self._waiting)
            if not written:
                raise OSError("nothing can be written")
            self._waiting = self._waiting[written:]

    def close(self) -> None:
        """Tries once more to write what is left. Raises: OSError."""
        try:
            self._flush()
        finally:
            self._file.close()


def read_metrics(path: str | Path) -> list[dict]:
    """The entries of a metrics.jsonl, without lines that are none, such as a last one that a killed
    run left unfinished. Raises: OSError.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(0, "not a regular file")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [_entry(line) for line in lines]
    wrong = [number for number, entry in enumerate(entries, 1) if entry is None]
    if wrong:
        _logger.warning(
            "%s: %d line(s) are no metrics entries and are left out, the first is line %d",
            path,
            len(wrong),
            wrong[0],
        )
    return [entry for entry in entries if entry is not None]


def _entry(line: str) -> dict | None:
    """What a line says: whole step, kind, and numbers or null; None where it does not."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    numbers = [value for name, value in entry.items() if name != "kind"]
    fits = (
        type(entry.get("step")) is int
        and isinstance(entry.get("kind"), str)
        and all(value is None or _is_number(value) for value in numbers)
    )
    return entry if fits else None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -(2**1000) < value < 2**1000


def _truncate(path: Path, resume_step: int | None) -> list[dict]:
    """Rewrites the file with the entries up to resume_step; returns them. A kill leaves the old
    file or the new one.
    """
    if not path.exists():
        return []
    entries = read_metrics(path)
    before = path.read_bytes()
    if resume_step is not None:
        entries = [entry for entry in entries if entry["step"] <= resume_step]
    after = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    if after != before:
        new = path.with_suffix(".tmp")
        new.write_bytes(after)
        shutil.copyfile(path, path.with_name(path.name + ".bak"))
        os.replace(new, path)
    return entries


def _plain(value):
    """A number for JSON; None for NaN and infinities."""
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, int):
        return number
    return float(number) if math.isfinite(number) else None


def _open_tensorboard(folder: Path, resume_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _logger.warning(
            "LOG.TENSORBOARD is on but tensorboard is not installed: `pip install tensorboard`, or"
            " set it to False"
        )
        return None
    purge = None if resume_step is None else resume_step + 1
    try:
        return SummaryWriter(folder / "tensorboard", purge_step=purge)
    except Exception as error:  # it passes on what its file system raises
        _logger.warning("TensorBoard is not written, the run goes on: %s", one_line(error))
        return None
