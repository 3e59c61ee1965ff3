"""The fused operation in several processes: replicated (DDP) and sharded (FSDP2), on the CPU."""

import os
import subprocess
import sys

import pytest
import torch

from kernels.window_attention import fused
from tests.helpers import ROOT
from tests.kernels.fused_training import build, train

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.kernels.fused_training import build, train

mode, out = sys.argv[1:]
dist.init_process_group("gloo")
rank, model = dist.get_rank(), build()
if mode == "ddp":
    wrapped = DistributedDataParallel(model)
else:
    wrapped = model
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.layers:
        for block in layer.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
train(wrapped, slice(2 * rank, 2 * rank + 2))
state = {
    name: p.full_tensor() if hasattr(p, "full_tensor") else p
    for name, p in model.named_parameters()
}
torch.save({name: p.detach().clone() for name, p in state.items()}, f"{out}.{rank}")
dist.barrier()
dist.destroy_process_group()
"""


def run(mode, folder, name):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        mode,
        str(folder / name),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{folder / name}.{rank}") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does_and_to_the_same_bits_each_time(mode, tmp_path):
    reason = fused.missing("cpu")
    if reason:
        pytest.skip(f"the CPU kernel is not here: {reason}")
    first, again = run(mode, tmp_path, "first"), run(mode, tmp_path, "again")
    alone = build()
    train(alone, slice(0, 4))
    for name, ours in alone.named_parameters():
        for other in (first[1], *again):
            assert torch.equal(first[0][name], other[name]), name
        torch.testing.assert_close(first[0][name], ours.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        alone.layers[0].blocks[1].attn.logit_scale, build().layers[0].blocks[1].attn.logit_scale
    )
