"""Times calls on the CPU or a CUDA device, interleaved, and says what memory they need."""

import statistics
import time
from collections.abc import Callable

import torch


def clock(device: str) -> Callable[[Callable], float]:
    """A function that returns the seconds that a call takes on the device."""
    if device == "cpu":

        def on_cpu(call: Callable) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return on_cpu

    def on_cuda(call: Callable) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(
            10_000_000
        )  # 5 ms, so that the launches are queued before the first one runs
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    return on_cuda


def interleaved(
    calls: dict[str, Callable], rounds: int, device: str, warm_up: int = 3
) -> dict[str, dict]:
    """{"ms": median, "least": } of each, each round in another order; one that fails has {"failed":
    its reason}.
    """
    timer, seconds, failed = clock(device), {name: [] for name in calls}, {}
    for turn in range(-warm_up, rounds):
        names = [name for name in calls if name not in failed]
        for name in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
            try:
                took = timer(calls[name])
            except Exception as error:  # a competitor that cannot do the shape must not end the run
                first_line = (str(error).strip().splitlines() or [""])[0]
                failed[name] = f"{type(error).__name__}: {first_line}"[:160]
                continue
            if turn >= 0:
                seconds[name].append(took)
    done = {name: values for name, values in seconds.items() if name not in failed}
    rows = {
        name: {"ms": 1e3 * statistics.median(values), "least": 1e3 * min(values)}
        for name, values in done.items()
    }
    return {**rows, **{name: {"failed": reason} for name, reason in failed.items()}}


def relative_speed(found: dict[str, dict], row: dict) -> float | None:
    """Of a row of `interleaved` to that of "fused", or None where one of the two failed."""
    if "ms" not in row or "ms" not in found["fused"]:
        return None
    return found["fused"]["ms"] / row["ms"]


def copy_rate(device: str, repeats: int = 5) -> float:
    """GB/s, read and written, of a copy of a gigabyte (on the CPU 64 MiB): what memory allows."""
    source = torch.randn((1 << 28) if device == "cuda" else 1 << 24, device=device)
    target, timer = torch.empty_like(source), clock(device)
    seconds = [timer(lambda: target.copy_(source)) for _ in range(repeats)]
    return 2 * source.nbytes / min(seconds[1:]) / 1e9


def peak(call: Callable, device: str) -> float | None:
    """MiB that a call needs at most beyond what is held, or None where it fails or the device does
    not say.
    """
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        call()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return None
    return (torch.cuda.max_memory_allocated() - held) / 2**20
