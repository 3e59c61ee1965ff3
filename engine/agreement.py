"""What the processes of a run must have in common: settings, data, code, weights.

Gradients are averaged over the processes, weights are not: where two processes begin or step
differently, they train different networks from then on.
"""

import hashlib
import logging
import platform
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils import PACKAGES, RunError, World

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
PARTS = ("main", "registry", "utils", *(name for name in PACKAGES if name != "run"))
SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h")
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
DRIFTED = (
    "this was not saved; start the same command again to go on from the last checkpoint"
    " (TRAIN.CHECK_RANKS 0 turns this comparison off)"
)


def agree(
    world: World, what: str, facts: Mapping[str, Any], remedy: str, shown: bool = True
) -> None:
    """Compares named facts (plain data) over the processes.

    Every process must call it; one that takes longer to come here is waited for.
    shown: the values say something to people.
    Raises: RunError, on every process, that names what differs and on which process.
    """
    if world.control is None:
        return
    world.meet(what)
    texts = {name: repr(value) for name, value in facts.items()}
    digests = world.gather(hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest())
    if not world.broadcast(digests is not None and len(set(digests)) > 1):
        return
    all_texts = world.gather(texts)
    refuse_differences(what, world.broadcast(all_texts), remedy, shown)


def tell_differences(world: World, what: str, text: str) -> None:
    """Logs a warning on the main process where the others' text is not its own."""
    world.meet(what)
    texts = world.gather(text) or []
    others = [rank for rank, other in enumerate(texts) if other != text]
    if others:
        LOGGER.warning(
            "%s is not the same on process %d: %s; here: %s",
            what,
            others[0],
            short(texts[others[0]], 300),
            short(text, 300),
        )


def refuse_differences(
    what: str, facts: list[dict[str, Any]], remedy: str, shown: bool = True
) -> None:
    """Raises RunError where the facts of the processes, in order of rank, are not the same."""
    names = list(dict.fromkeys(name for one in facts for name in one))
    found = []
    for name in names:
        values = [one.get(name, "absent") for one in facts]
        usual = most_common(values)
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            rank, other = odd[0], values.index(usual)
            found.append(
                f"{name} is {short(values[rank])} on process {rank} and {short(usual)} on process"
                f" {other}"
                if shown
                else f"{name} differs, process {rank} from process {other}"
            )
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise RunError(f"the processes do not agree on {what}: {found[0]}{more}; {remedy}")


def most_common(values: list[Any]) -> Any:
    """The value that most processes have; of two equally common ones the first."""
    return max(values, key=lambda value: (values.count(value), -values.index(value)))


def short(text: str, limit: int = 80) -> str:
    """Text of at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 20]}...{text[-17:]}"


def describe_code(root: Path = ROOT) -> dict[str, str]:
    """What computes: versions of Python and of the libraries, and a digest of the sources of each
    part of this project.
    """
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        found[f"version of {name}"] = version(name)
    for part in PARTS:
        files = sorted(path for path in (root / part).rglob("*") if path.suffix in SOURCES)
        sha = hashlib.sha256()
        for path in [root / f"{part}.py", *files]:
            if path.is_file():
                sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
        found[f"source of {part}"] = sha.hexdigest()[:12]
    return found


def version(name: str) -> str:
    """The installed version of a package, or that there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


class WeightCheck:
    """Every `every` updates (0: never) compares the position and all weights of the processes.

    The host waits for nothing: checksums are formed on the device and copied after one update,
    exchanged over the CPU group during the next, and compared after the one after that.

    Args:
        every: the same on all processes.
    """

    def __init__(self, world: World, every: int) -> None:
        self.world = world
        self.every = every if world.control is not None else 0
        self._taken: tuple[list[str], Tensor, torch.cuda.Event | None] | None = None
        self._sent: tuple[list[str], list[Tensor], dist.Work] | None = None

    def after_update(
        self,
        update: int,
        position: Callable[[], Mapping[str, int]],
        tensors: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Moves what is under way one step on, and begins anew where it is time; every process must
        call it after every update.

        Raises: RunError, on every process, that names what differs and on which process.
        """
        if not self.every:
            return
        self._receive(update)
        self._send()
        if update % self.every == 0:
            self._take(position(), tensors())

    def _take(self, position: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        sums = [checksum(tensor) for tensor in tensors.values()]
        device = sums[0].device if sums else torch.device("cpu")
        place = torch.tensor(list(position.values()))
        if device.type != "cuda":
            values = torch.cat([place, torch.stack(sums).cpu()]) if sums else place
            self._taken = ([*position, *tensors], values, None)
            return
        values = torch.empty(len(place) + len(sums), dtype=torch.int64, pin_memory=True)
        values[: len(place)] = place
        values[len(place) :].copy_(torch.stack(sums), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._taken = ([*position, *tensors], values, copied)

    def _send(self) -> None:
        if self._taken is None:
            return
        names, values, copied = self._taken
        self._taken = None
        if copied is not None:
            copied.synchronize()  # of the update before the last one
        everybodys = [torch.empty_like(values) for _ in range(self.world.size)]
        work = dist.all_gather(everybodys, values, group=self.world.control, async_op=True)
        self._sent = (names, everybodys, work)

    def _receive(self, update: int) -> None:
        if self._sent is None:
            return
        names, everybodys, work = self._sent
        self._sent = None
        with self.world.waiting("the comparison of weights"):
            work.wait()
        if all(torch.equal(values, everybodys[0]) for values in everybodys):
            return
        # Without another exchange: a process that has left one out may not come to it.
        facts = [dict(zip(names, values.tolist(), strict=True)) for values in everybodys]
        what = f"the weights after update {update - 2}"
        refuse_differences(what, facts, DRIFTED, shown=False)


def checksum(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device that tells contents apart, exact in any order of
    addition: the sum of the bits of each row, as integers, weighted by the row.
    """
    bits = tensor.detach()
    if bits.is_complex():
        bits = torch.view_as_real(bits)
    bits = bits.view(INTEGERS[bits.element_size()])
    if bits.dim() > 1:
        bits = bits.sum(tuple(range(1, bits.dim())), dtype=torch.int64)
    return (bits * row_weights(bits.shape, bits.device)).sum(dtype=torch.int64)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Of each tensor, read with one wait for each device."""
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    found = {}
    for device in {one.device for one in sums.values()}:
        names = [name for name, one in sums.items() if one.device == device]
        values = torch.stack([sums[name] for name in names]).tolist()
        found |= dict(zip(names, values, strict=True))
    return {name: found[name] for name in sums}


@lru_cache(maxsize=1024)
def row_weights(shape: torch.Size, device: torch.device) -> Tensor:
    """Odd numbers of no pattern, one for each row."""
    rows = torch.arange(shape.numel(), dtype=torch.int64, device=device)
    return (2 * (rows * 2654435761 % 2**31) + 1).view(shape)
