"""Calls of main.py on two processes of which the second differs, one after the other in the same
processes: some by two_ranks.py, the others by this file under torchrun.
"""

import io
import json
import os
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import main  # noqa: E402
from engine.state import CheckpointFolder  # noqa: E402
from engine.trainer import Trainer  # noqa: E402
from program import setup  # noqa: E402
from tests.wiring.runs import SETTINGS, few_digits  # noqa: E402

# What the second process is told otherwise.
SETTINGS_OF_ONE = {
    "rate": {"TRAIN.BASE_LR": 0.2},
    "seed": {"SEED": 1},
    "decay": {"TRAIN.WEIGHT_DECAY": 0.3},
    "modifiers": {"MODEL.ATTENTION.MODIFIERS": "[qk_residual]"},
    "batch": {"DATA.BATCH_SIZE": 4},
    "accumulation": {"TRAIN.ACCUMULATION_STEPS": 2},
    "saving": {"TRAIN.SAVE_STEPS": 1},
    "precision": {"AMP_DTYPE": "bfloat16"},
}
PLACES = {"TRAIN.THREADS": 1, "DATA.TIMEOUT": 7.0, "DATA.DATA_PATH": "elsewhere"}
EVERY = {"TRAIN.CHECK_RANKS": 1, "DATA.BATCH_SIZE": 2}
HASTY = {"TRAIN.GROUP_TIMEOUT": 2.0}


def other_images():
    digits = few_digits()
    digits.images[0, 0, 0] += 1
    return digits


def other_code(real=setup.describe_code):
    return real() | {"source of models": "changed"}


def other_attention(model):
    return "by another kernel"


def other_weights(*args, real=setup.build_model):
    model = real(*args)
    model.head.weight.data[0, 0] += 1e-3
    return model


def teacher(*_):
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 16, 10))


def other_teacher(*_):
    model = teacher()
    model[1].bias.data[3] += 1e-3
    return model


def nudged(trainer, *args, real=Trainer.advance):
    """One weight moves by a bit after the second update."""
    if trainer.state.update == 1:
        trainer.model.head.bias.data[3] += 1e-7
    real(trainer, *args)


def nudged_average(trainer, *args, real=Trainer.advance):
    if trainer.state.update == 1:
        trainer.ema.module.head.bias.data[3] += 1e-7
    real(trainer, *args)


def nudged_moment(trainer, *args, real=Trainer.capture):
    trainer.optimizer.state[trainer.model.head.bias]["exp_avg"][3] += 1e-7
    return real(trainer, *args)


def unreduced(trainer, batches, real=Trainer.update):
    """The second update leaves out the exchange of gradients."""
    if trainer.state.update != 1:
        return real(trainer, batches)
    with trainer.parallel.no_sync():
        return real(trainer, batches)


def late(seconds: float, real):
    def call(*args, **options):
        time.sleep(seconds)
        return real(*args, **options)

    return call


def stuck(trainer, batches, real=Trainer.update):
    time.sleep(8)
    return real(trainer, batches)


# name: settings of both, settings of the second, what is patched on the second (or the first).
CASES = {name: ({}, one, [], []) for name, one in SETTINGS_OF_ONE.items()} | {
    "places": (EVERY, PLACES, [], []),
    "images": ({}, {}, [], [("sklearn.datasets.load_digits", other_images)]),
    "code": ({}, {}, [], [("program.setup.describe_code", other_code)]),
    "attention": ({}, {}, [], [("main.describe_attention", other_attention)]),
    "weights": ({}, {}, [], [("program.setup.build_model", other_weights)]),
    "teacher": (
        {"TRAIN.DISTILL.KIND": "soft", "TRAIN.DISTILL.TEACHER": "resnet18"},
        {},
        [("main.Program.build_teacher", teacher)],
        [("main.Program.build_teacher", other_teacher)],
    ),
    "drift": (EVERY, {}, [], [("engine.trainer.Trainer.advance", nudged)]),
    "average": (
        EVERY | {"MODEL.EMA.ENABLE": True},
        {},
        [],
        [("engine.trainer.Trainer.advance", nudged_average)],
    ),
    "moment": ({}, {}, [], [("engine.trainer.Trainer.capture", nudged_moment)]),
    "skipped": (
        EVERY,
        {},
        [],
        [("engine.trainer.Trainer.update", unreduced)],
    ),
    "slow": (
        HASTY,
        {},
        [("engine.state.CheckpointFolder.save", late(3.0, CheckpointFolder.save))],
        [("main.build_data", late(3.0, main.build_data))],
    ),
    "stuck": (HASTY, {}, [], [("engine.trainer.Trainer.update", stuck)]),
}


QUICK = ("modifiers", "batch", "images", "weights", "teacher", "skipped")


def run_cases(folder: Path, names) -> None:
    """Writes {case: [status, stderr, lines of the log, seconds]} of this process."""
    done = {name: run_case(name, folder / name) for name in names}
    (folder / f"process{os.environ['RANK']}.json").write_text(json.dumps(done))


def run_case(name: str, folder: Path) -> list:
    rank = int(os.environ["RANK"])
    both, one, first, second = CASES[name]
    chosen = SETTINGS | {"OUTPUT": str(folder)} | both | (one if rank else {})
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"base{rank}.yaml"
    base.write_text("")
    argv = ["--cfg", str(base), "--opts", *(str(word) for pair in chosen.items() for word in pair)]
    errors = io.StringIO()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = f"1{list(CASES).index(name)}"  # a store of its own
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(patch("sklearn.datasets.load_digits", few_digits))
        for target, value in second if rank else first:
            stack.enter_context(patch(target, value))
        stack.enter_context(redirect_stderr(errors))
        stack.enter_context(redirect_stdout(io.StringIO()))
        try:
            status = main.main(argv)
        except SystemExit as end:
            status = end.code
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_flush_denormal(False)
    log = folder / "small" / "default" / f"log_rank{rank}.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    return [status, errors.getvalue(), lines, time.monotonic() - began]


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), [name for name in CASES if name not in QUICK])
