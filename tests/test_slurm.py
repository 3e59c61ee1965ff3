"""The SLURM script of get_started.md requeues what a signal has stopped, and nothing else."""

import os
import re
import signal
import subprocess

import pytest

from tests.helpers import ROOT

SCRIPT = re.search(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "get_started.md").read_text(), re.S)
# A job step that ends with a status of its own, or, once it is signalled, with another one.
SRUN = """#!/bin/bash
echo $$ > "$FOLDER/step"
trap 'sleep 0.2; exit {stopped}' TERM
{then}
"""


def put(folder, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    "then, stopped, signalled, requeued, status",
    [
        ("exit 0", 1, False, False, 0),
        ("exit 2", 1, False, False, 2),
        ("sleep 30 & wait", 1, True, True, 1),
        ("sleep 30 & wait", 0, True, False, 0),  # it was just done
    ],
    ids=["done", "failed", "stopped", "signalled and done"],
)
def test_the_script_requeues_what_a_signal_has_stopped(
    tmp_path, then, stopped, signalled, requeued, status
):
    put(tmp_path, "job.sh", SCRIPT[1])
    put(tmp_path, "srun", SRUN.format(stopped=stopped, then=then))
    put(tmp_path, "scancel", '#!/bin/bash\nkill -TERM "$(cat "$FOLDER/step")"\n')
    put(tmp_path, "scontrol", '#!/bin/bash\necho "$@" >> "$FOLDER/calls"\necho host\n')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a[1-2]"}
    with subprocess.Popen([tmp_path / "job.sh"], cwd=tmp_path, env=environment) as job:
        while signalled and job.poll() is None and not (tmp_path / "step").exists():
            pass
        if signalled:
            job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == status
    assert ("requeue 7" in (tmp_path / "calls").read_text()) == requeued
    assert "SBATCH --signal=B:USR1@" in SCRIPT[1]
