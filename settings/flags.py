"""The command line: the flags, the keys they set, and the parser."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from registry import nearest
from settings.kinds import ConfigError, Key, Kind, show, show_name
from settings.reading import Given, log_note


@dataclass(frozen=True)
class Flag:
    """A command-line flag and the key it sets. `sets` is the value of a flag that takes none;
    `type` reads the value of one that does.
    """

    names: tuple[str, ...]
    key: str
    help: str
    type: type = str
    sets: Any = None

    @property
    def dest(self) -> str:
        """The attribute of the parsed arguments."""
        return self.names[0].lstrip("-").replace("-", "_")


# fmt: off
FLAGS = (
    Flag(("--batch-size",), "DATA.BATCH_SIZE", "images per process and step", int),
    Flag(("--data-path",), "DATA.DATA_PATH", "root of the data set"),
    Flag(("--zip",), "DATA.ZIP_MODE", "read zip archives", sets=True),
    Flag(("--cache-mode",), "DATA.CACHE_MODE", "zip mode: bytes held in memory"),
    Flag(("--pretrained",), "MODEL.PRETRAINED", "weights to start from: file or https URL"),
    Flag(("--resume",), "MODEL.RESUME",
        "training checkpoint to continue or evaluate: file or https URL"),
    Flag(("--resume-changed",), "TRAIN.RESUME_CHANGED",
        "go on from, or evaluate, a checkpoint with other settings or images", sets=True),
    Flag(("--accumulation-steps",), "TRAIN.ACCUMULATION_STEPS", "batches per update", int),
    Flag(("--use-checkpoint",), "TRAIN.USE_CHECKPOINT",
        "recompute activations to save memory", sets=True),
    Flag(("--disable_amp", "--disable-amp"), "AMP_ENABLE", "no mixed precision", sets=False),
    Flag(("--output",), "OUTPUT", "folder of all runs; this one writes to OUTPUT/MODEL.NAME/TAG"),
    Flag(("--tag",), "TAG", "name of the run"),
    Flag(("--eval",), "EVAL_MODE", "evaluate only", sets=True),
    Flag(("--throughput",), "THROUGHPUT_MODE",
        "measure images per second only; needs no data set", sets=True),
    Flag(("--fused_window_process", "--fused-window-process"), "FUSED_WINDOW_PROCESS",
        "superseded: MODEL.ATTENTION.BACKEND", sets=True),
    Flag(("--fused_layernorm", "--fused-layernorm"), "FUSED_LAYERNORM",
        "superseded: torch's LayerNorm is fused", sets=True),
    Flag(("--optim",), "TRAIN.OPTIMIZER.NAME", "optimizer"),
    Flag(("--epochs",), "TRAIN.EPOCHS", "epochs in all", int),
    Flag(("--seed",), "SEED", "seed of every random choice", int),
    Flag(("--device",), "DEVICE", "device"),
    Flag(("--compile",), "MODEL.COMPILE", "torch.compile the model", sets=True),
)
# fmt: on


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; an unknown flag's names the nearest one."""

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return known
        given = show_name(unknown[0].split("=")[0])
        if not given.startswith("-"):
            self.error(
                f"unknown argument {given}; the YAML is given as --cfg FILE, keys as --opts KEY"
                " VALUE"
            )
        guess = nearest(given, self._option_string_actions)
        hint = f"; did you mean {guess}?" if guess else ""
        self.error(f"unknown flag {given}{hint}")

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 and one line."""
        shown = message if message.isprintable() and len(message) < 500 else show(message)
        self.exit(2, f"{self.prog}: error: {shown} (--help lists every flag)\n")


def build_parser(keys: dict[str, Key]) -> Parser:
    """The parser of main.py; `keys` says which names a flag's key takes, for the help."""
    parser = Parser(
        allow_abbrev=False,
        description=(
            "Train, resume, evaluate or time Swin Transformers with identity-sharpened attention."
        ),
        epilog=(
            "A flag that is not given leaves the YAML's value alone. config.py lists every key of"
            " --opts with its meaning; --print-config shows the values of a run."
        ),
    )
    parser.add_argument(
        "--cfg", required=True, metavar="FILE", help="YAML file of the run, see configs/"
    )
    parser.add_argument(
        "--opts",
        nargs="+",
        action="extend",
        metavar="KEY VALUE",
        help="any keys, such as TRAIN.EPOCHS 100 AUG.MIXUP 0",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="check the settings as a run would, files apart; print the merged YAML, which can be"
        " given back as --cfg, and stop",
    )
    for flag in FLAGS:
        _add_flag(parser, flag, keys[flag.key].kind)
    parser.add_argument(
        "--amp-opt-level",
        choices=("O0", "O1", "O2"),
        metavar="LEVEL",
        help="deprecated; O0 means --disable_amp",
    )
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        metavar="N",
        help="set by some launchers [LOCAL_RANK]",
    )
    return parser


def _add_flag(parser: Parser, flag: Flag, kind: Kind) -> None:
    names = f": {kind.allowed}" if kind.choices else ""
    if flag.sets is not None:
        how = {"action": "store_true"}
    elif flag.type is int:
        how = {"type": int, "metavar": "N"}
    else:
        how = {"type": flag.type, "metavar": "VALUE"}
    text = f"{flag.help}{names} [{flag.key}]"
    parser.add_argument(*flag.names, dest=flag.dest, default=None, help=text, **how)


def add_flags(given: Given, args: Any) -> None:
    """Adds what the named flags say; a missing or None attribute says nothing, nor does False
    where the flag takes no value. Raises: ConfigError.
    """
    for flag in FLAGS:
        value = getattr(args, flag.dest, None)
        if flag.sets is not None:
            value = flag.sets if value else None
        if value is not None:
            if flag.key != "OUTPUT":  # '' is the present folder
                refuse_empty(flag.names[0], value)
            given.add(flag.names[0], [(flag.key, value)])
    level = getattr(args, "amp_opt_level", None)
    if level == "O0":
        log_note("--amp-opt-level O0 is deprecated: use --disable_amp")
        given.values["AMP_ENABLE"] = False
    elif level:
        log_note(f"--amp-opt-level {level} is deprecated: it has no effect, use AMP_DTYPE")


def refuse_empty(where: str, value: Any) -> None:
    """Raises ConfigError for '', which is what a shell makes of a variable that is not set: a
    checkpoint named so would be silently left out.
    """
    if isinstance(value, str) and not value.strip():
        raise ConfigError(
            f"{where}: {value!r} is empty, perhaps a shell variable that is not set; leave it out"
            " where none is meant"
        )


def add_local_rank(given: Given, args: Any) -> None:
    """This process' index on its machine: the launcher's environment variable, else the flag, else
    0; never a file's. Raises: ConfigError.
    """
    sources = {
        "environment: LOCAL_RANK": os.environ.get("LOCAL_RANK"),
        "--local-rank": getattr(args, "local_rank", None),
    }
    given.values["LOCAL_RANK"] = 0
    for where, value in sources.items():
        if value is not None and value != "":
            given.values["LOCAL_RANK"] = given.convert(where, "LOCAL_RANK", value)
            return
