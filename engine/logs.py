"""Numbers of a run: metrics.jsonl, which a resumed run continues exactly, and on request
TensorBoard and Weights & Biases.
"""

import json
import logging
import math
import os
from pathlib import Path

from utils import RunError

_logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class LogError(RunError):
    """A log that cannot be written as asked, in one line."""


class MetricLog:
    """Writes one JSON object a line: {"step": updates done, "epoch": ..., "kind": "train" | "val" |
    ..., <name>: number, ...}.

    Args:
        folder: the run's; None makes a log that writes nothing (all ranks but 0).
        resume_step: how the existing file goes on. n: entries of later steps are dropped, and
            entries of step n that are already there are not written twice, so that the file ends up
            as that of a run never stopped. -1: begin anew. None: add to what is there. What is
            dropped stays in metrics.jsonl.bak.
        tensorboard: also event files in folder/tensorboard.
        wandb: also a W&B run, named `name`, with `config` (plain values).
    Raises: LogError if W&B is asked for and not installed. A missing TensorBoard is a warning,
        since it is on by default.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: bool = False,
        name: str = "",
        config: dict | None = None,
    ):
        self.path = Path(folder) / FILE if folder is not None else None
        self._stream = None
        self._board = None
        self._run = None
        self._present: set[tuple[int, str]] = set()
        if self.path is None:
            return
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        entries = _truncate(self.path, resume_step)
        self._present = {(e["step"], e["kind"]) for e in entries if e["step"] == resume_step}
        self._stream = self.path.open("a", encoding="utf-8")
        if tensorboard:
            self._board = _open_tensorboard(folder, resume_step)
        if wandb:
            self._run = _open_wandb(folder, name, config or {}, resume_step)

    def write(self, step: int, epoch: int | float, kind: str, **scalars: float) -> None:
        """Adds an entry; scalars are numbers or one-element tensors (which are waited for). NaN and
        infinities become null.
        """
        if self._stream is None or (step, kind) in self._present:
            return
        values = {name: _plain(value) for name, value in scalars.items()}
        entry = {"step": int(step), "epoch": _plain(epoch), "kind": kind, **values}
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()  # out of this process, so that a killed run keeps it
        numbers = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log({**numbers, "epoch": epoch}, step=step)

    def close(self) -> None:
        """Ends all outputs; a second call does nothing."""
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()
        self._stream = None
        self._board = None
        self._run = None

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict]:
    """The entries of a metrics.jsonl, without a last line that a killed run left unfinished."""
    entries = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": entry["step"], "kind": entry["kind"]})
        except (json.JSONDecodeError, KeyError, TypeError):
            _logger.warning("%s: line %d is not a metrics entry and is left out", path, number + 1)
    return entries


def _truncate(path: Path, resume_step: int | None) -> list[dict]:
    """Rewrites the file with the entries up to resume_step; returns them."""
    if not path.exists():
        return []
    before = path.read_text(encoding="utf-8", errors="replace")
    entries = read_metrics(path)
    if resume_step is not None:
        entries = [entry for entry in entries if entry["step"] <= resume_step]
    after = "".join(json.dumps(entry) + "\n" for entry in entries)
    if after != before:
        new = path.with_suffix(".tmp")
        new.write_text(after, encoding="utf-8")
        os.replace(path, path.with_name(path.name + ".bak"))
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
    return SummaryWriter(
        folder / "tensorboard", purge_step=None if resume_step is None else resume_step + 1
    )


def _open_wandb(folder: Path, name: str, config: dict, resume_step: int | None):
    try:
        import wandb
    except ImportError as problem:
        raise LogError(
            "LOG.WANDB is on but wandb is not installed: `pip install wandb`, or set it to False"
        ) from problem
    mark = folder / "wandb_id.txt"
    if resume_step is None or resume_step < 0 or not mark.exists():
        mark.write_text(wandb.util.generate_id())
    return wandb.init(
        project=name.split("/")[0] or None,
        name=name or None,
        config=config,
        dir=str(folder),
        id=mark.read_text().strip(),
        resume="allow",
    )
