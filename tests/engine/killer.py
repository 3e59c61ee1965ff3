"""Runs main.py and kills this process at a chosen point: python killer.py PLACE UPDATE RANK
<arguments of main.py>.

PLACE: update (an update is done, nothing saved yet), save (a checkpoint is written but has not
taken its name), validate (an evaluation is done), batch (of an evaluation); term, termgroup:
SIGTERM after the update, to this process or to its whole process group (data workers and launcher
too), as schedulers send it; termbatch, termgroupbatch: in an evaluation; termsave: twice, while a
checkpoint is written; stop: SIGSTOP, after which the process does nothing more; say: a line on
standard error and on. It happens when UPDATE updates are reached, and not again after a restart by
torchrun.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main  # noqa: E402
import utils  # noqa: E402
from engine import evaluate, train, trainer  # noqa: E402

SIGNALS = {
    "update": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "termgroup": signal.SIGTERM,
}


def arm(place: str, update: int, rank: int) -> None:
    """Wraps the function that reaches the chosen point."""
    reached = {"update": 0}

    def fire(number: int = signal.SIGKILL) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and reached["update"] >= update and int(os.environ.get("RANK", 0)) == rank:
            os.kill(0 if place.startswith("termgroup") else os.getpid(), number)

    def terminate(times: int = 1) -> None:
        if reached["update"] >= update and not reached.get("terminated"):
            reached["terminated"] = True
            for _ in range(times):
                fire(signal.SIGTERM)

    def after(function, action):
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            action(*args)
            return result

        return wrapped

    def count(running, *_) -> None:
        reached["update"] = running.state.update
        if place in SIGNALS and reached["update"] == update:
            fire(SIGNALS[place])
        if place == "say" and reached["update"] == update:
            print("REACHED", file=sys.stderr, flush=True)

    trainer.Trainer.advance = after(trainer.Trainer.advance, count)
    if place == "save":
        utils.os.fsync = after(utils.os.fsync, lambda *_: fire())
    if place == "termsave":
        utils.os.fsync = after(utils.os.fsync, lambda *_: terminate(times=2))
    if place in ("termbatch", "termgroupbatch"):
        evaluate.Totals.add = after(evaluate.Totals.add, lambda *_: terminate())
    if place == "batch":
        evaluate.Totals.add = after(evaluate.Totals.add, lambda *_: fire())
    if place == "validate":
        train.validate = after(train.validate, lambda *_: fire())


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.exit(main.main(sys.argv[4:]))
