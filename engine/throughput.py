"""How fast and how large a model is, on synthetic images: no data set is read."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.ema import unwrap
from engine.evaluate import Autocast, entered
from engine.finite import refuse_outputs, refuse_weights
from engine.progress import MIB, peak_memory
from kernels.linear import evaluation

# (model, images) -> multiply-accumulates of one image, see models/counting.py
Count = Callable[[nn.Module, Tensor], Any]


@torch.no_grad()
def throughput(
    model: nn.Module,
    batch_size: int,
    img_size: int | tuple[int, int],
    in_chans: int,
    device,
    autocast: Autocast = None,
    iters: int | None = None,
    warmup: int | None = None,
    count: Count | None = None,
) -> dict:
    """Forward passes of `model` in eval mode, in the dtype that `autocast` sets.

    Args:
        img_size: pixels, a side or (height, width).
        iters, warmup: timed and untimed passes; by default 30 and 50 as in Swin, on the CPU 5 and
            2.
        count: counts multiply-accumulates by running the model; None leaves that out.
    Returns: a dict of plain values:
        images_per_s, ms (per batch, mean), batch_size, img_size (h, w), device, dtype (of the
        logits), iters;
        peak_mib and peak_of: on CUDA the most memory the caching allocator held in tensors during
            the timed passes, elsewhere the process's largest resident size so far (None where the
            system does not tell);
        params: all parameters, trainable or not;
        macs: multiply-accumulates of one image by `model.flops()`, the family's formula (for Swin
            Swin's: norms counted as C per token, softmax, bias and position MLP not), or None;
        macs_with_attention, macs_without_attention: as counted by `count`, linear layers and
            convolutions plus either the attention products or the norms (2 per number); None
            without `count`.
    """
    device = torch.device(device)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    usual_iters, usual_warmup = (5, 2) if device.type == "cpu" else (30, 50)
    iters = iters or usual_iters
    warmup = usual_warmup if warmup is None else warmup
    refuse_weights(unwrap(model))
    images = torch.randn(batch_size, in_chans, height, width, device=device)
    training = model.training
    model.eval()
    try:
        with evaluation(model):
            logits = _run(model, images, autocast, max(warmup, 1))
            bad = int((~logits.isfinite().flatten(1).all(1)).sum())
            refuse_outputs(bad, batch_size, logits.dtype)
            seconds, peak = _timed(model, images, autocast, iters)
        macs = count(unwrap(model), images[:1]) if count else None
    finally:
        model.train(training)
    return {
        "images_per_s": iters * batch_size / seconds,
        "ms": 1000 * seconds / iters,
        "batch_size": batch_size,
        "img_size": (height, width),
        "device": device.type,
        "dtype": str(logits.dtype).removeprefix("torch."),
        "iters": iters,
        **peak,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": _formula(unwrap(model)),
        "macs_with_attention": macs.with_attention if macs else None,
        "macs_without_attention": macs.without_attention if macs else None,
    }


def describe(result: dict) -> str:
    """One line for the log."""
    counts = {
        "formula": result["macs"],
        "linear + attention products": result["macs_with_attention"],
        "linear + norms, no attention products": result["macs_without_attention"],
    }
    macs = [f"{macs / 1e9:.4f} ({name})" for name, macs in counts.items() if macs is not None]
    peak = "unknown"
    if result["peak_mib"] is not None:
        peak = f"{result['peak_mib']:.0f} MiB ({result['peak_of']})"
    height, width = result["img_size"]
    line = (
        f"batch_size {result['batch_size']} throughput {result['images_per_s']:.1f} images/s"
        f" {result['ms']:.2f} ms/batch image {height}x{width} {result['device']} {result['dtype']}"
        f" peak memory {peak} params {result['params']}"
    )
    if macs:
        line += f" GMACs per image {', '.join(macs)}"
    return line


def _formula(model: nn.Module) -> int | None:
    return int(model.flops()) if hasattr(model, "flops") else None


def _run(model: nn.Module, images: Tensor, autocast: Autocast, passes: int) -> Tensor:
    for _ in range(passes):
        with entered(autocast):
            logits = model(images)
    _wait(images.device)
    return logits


def _timed(model: nn.Module, images: Tensor, autocast: Autocast, iters: int) -> tuple[float, dict]:
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.device)
    begin = time.perf_counter()
    _run(model, images, autocast, iters)
    return time.perf_counter() - begin, _peak(images.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak(device: torch.device) -> dict:
    if device.type == "cuda":
        return {"peak_mib": peak_memory(device), "peak_of": "tensors on the device"}
    if sys.platform == "win32":
        return {"peak_mib": None, "peak_of": "process"}
    import resource  # POSIX only

    units_per_mib = MIB if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_mib": largest / units_per_mib, "peak_of": "process"}
