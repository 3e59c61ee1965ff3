"""Weights & Biases: a run there that goes on as the run here does, and that never ends it."""

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import RunError, one_line

_logger = logging.getLogger(__name__)

LONGEST = 128  # characters of a name there
FORBIDDEN = r"/\#?%:"  # in the name of a project
# Standard output stays as it is: the log has it. Lost connections are waited for at the end only so
# many seconds.
SETTINGS = {"console": "off", "finish_timeout": 300, "login_timeout": 60}


class LogError(RunError):
    """A log that cannot be written as asked, in one line."""


@dataclass(frozen=True)
class WandbOptions:
    """Where a run is shown: project ('' = the first part of its name), entity, group, tags."""

    project: str = ""
    entity: str = ""
    group: str = ""
    tags: Sequence[str] = ()


class WandbRun:
    """A run of W&B.

    Args:
        folder: for its files; also holds its id.
        name: of the run, MODEL.NAME/TAG.
        config: plain values.
        fresh: begins here; otherwise it goes on under the id that `known` or the folder holds.
        known: of the checkpoint, `mark` of the run that saved it; counts where the name is the
            same.
    Raises: LogError if W&B is not installed. All else that fails is a warning, and the run goes on
        without; where the network or an account is missing, its files are kept for `wandb sync`.
    """

    def __init__(
        self,
        folder: Path,
        options: WandbOptions,
        *,
        name: str,
        config: dict[str, Any],
        fresh: bool = True,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as problem:
            raise LogError(
                "LOG.WANDB is on but wandb cannot be imported: `pip install wandb`, or set it to"
                " False"
            ) from problem
        self.mark = {"id": choose_id(folder, name, fresh, known), "name": name}
        self._run = None
        asked = {
            "project": options.project or project_of(name),
            "entity": options.entity or None,
            "group": options.group or None,
            "tags": list(options.tags) or None,
            "name": name[-LONGEST:] or None,
            "config": config,
            "dir": str(folder),
            "id": self.mark["id"],
            "resume": "allow",
            "settings": SETTINGS,
        }
        try:
            self._run = wandb.init(**asked)
        except Exception as error:  # no account, no network, a server that refuses, ...
            _logger.warning(
                "LOG.WANDB: %s; numbers are kept in %s/wandb for `wandb sync`",
                one_line(error)[:300],
                folder,
            )
            wandb.teardown()  # the start that failed would go on holding the id
            self._run = wandb.init(**asked, mode="offline")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds numbers of an update."""
        self._run.log(dict(numbers), step=step)

    def finish(self) -> None:
        """Sends what is left."""
        self._run.finish()


def choose_id(folder: Path, name: str, fresh: bool, known: Mapping[str, Any] | None) -> str:
    """The id of a run that goes on, or a new one; the folder holds it from here on."""
    file = folder / "wandb_id.txt"
    number = ""
    if not fresh and known and known.get("name") == name:
        number = str(known.get("id", ""))
    elif not fresh and file.exists():
        number = file.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", number):
        return new_id(folder)
    file.write_text(number, encoding="utf-8")
    return number


def new_id(folder: Path) -> str:
    """An id that no run has had; the folder holds it from here on."""
    number = secrets.token_hex(4)
    (folder / "wandb_id.txt").write_text(number, encoding="utf-8")
    return number


def project_of(name: str) -> str | None:
    """The project of a run that names none: the first part of its name, as W&B allows it."""
    part = re.sub(f"[{re.escape(FORBIDDEN)}]", "_", name.split("/")[0])
    return part[:LONGEST] or None
