"""What every run needs and no method contains: processes, devices, random states, logs and files
written whole.
"""

import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from termcolor import colored
from tqdm import tqdm

from processes import Peers
from registry import UserError

LOGGER = logging.getLogger("run")
# What torch says, in errors of no class of their own, where there is no memory left.
EXHAUSTED = re.compile(r"out of memory|annot allocate memory|can't allocate memory|ALLOC_FAILED")
# Seconds that a process waits for the others to start, at least: imports can be slow.
START = 1800.0
PACKAGES = (
    "run",
    "checkpoint",
    "config",
    "data",
    "engine",
    "kernels",
    "lr_scheduler",
    "models",
    "optimizer",
    "processes",
    "program",
    "settings",
)


class RunError(UserError, RuntimeError):
    """Something the user can fix: a folder, a device, a launch, a run that diverged. The message
    is one line.
    """


class World:
    """The processes of this run: one alone, or those that torchrun started, joined in a group.

    rank in 0 .. size - 1, local_rank on this machine, device. `control` is a CPU (gloo) group for
    messages that must not wait for the device; it, `peers` and the default group exist only where
    size > 1. A context manager: leaving it ends the group.

    Args:
        timeout: seconds that an exchange waits for a process; where one process works for the
            others, or takes longer to begin, they `meet` it, which takes as long as it lives.
    """

    def __init__(self, device: str = "auto", local_rank: int = 0, timeout: float = 1800.0) -> None:
        self.rank, self.size = launched()
        self.local_rank = launcher_says("LOCAL_RANK", local_rank)
        self.device = choose_device(device, self.local_rank)
        self.timeout = timeout
        self.control = None
        self.peers: Peers | None = None
        if self.size > 1:
            with meeting(), ended_by_signals():
                self._join()

    def _join(self) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        start = timedelta(seconds=max(self.timeout, START))
        store, rank, size = next(dist.rendezvous("env://", timeout=start))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # A prefix of its own for each restart, so that no process meets addresses that a killed one
        # left in the store.
        store = dist.PrefixStore(f"attempt_{attempt}", store)
        self._compare_devices(store)
        timeout = timedelta(seconds=self.timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        self.control = dist.new_group(backend="gloo", timeout=timeout)
        self.peers = Peers(store.clone(), rank, size, self.timeout)

    def _compare_devices(self, store: dist.Store) -> None:
        """Before there is a group, which processes of several kinds could not form.

        Raises: RunError.
        """
        store.set(f"device/{self.rank}", f"{self.device.type} {self.size}")
        if self.is_main:
            kinds = [store.get(f"device/{rank}").decode() for rank in range(self.size)]
            others = [rank for rank, kind in enumerate(kinds) if kind != kinds[0]]
            verdict = f"{others[0]} {kinds[others[0]]} {kinds[0]}" if others else ""
            store.set("device", verdict or "equal")
        verdict = store.get("device").decode()
        if verdict != "equal":
            rank, device, size, first, first_size = verdict.split()
            raise RunError(
                f"process {rank} runs on {device} as one of {size}, process 0 on {first} as one of"
                f" {first_size}: give all processes the same DEVICE (--device) and WORLD_SIZE, and"
                " machines that have the device"
            )

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.control is not None:
            with self.waiting("a barrier"):
                dist.barrier(group=self.control)

    def meet(self, what: str) -> None:
        """Waits until every process is here, however long that takes, while all of them live:
        where one does something for all, or may be slow to begin.

        Raises: PeerError.
        """
        if self.peers is not None:
            self.peers.meet(what)

    def waiting(self, what: str) -> AbstractContextManager:
        """While it is open the process counts as waiting for others; after five minutes all stacks
        are logged.
        """
        return nullcontext() if self.peers is None else self.peers.waiting(what)

    def broadcast(self, value: Any) -> Any:
        """The main process' value (anything that pickles), on every process."""
        box = [value]
        if self.control is not None:
            with self.waiting("a value of process 0"):
                dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all processes in order of rank, on the main process; None elsewhere."""
        if self.control is None:
            return [value]
        values = [None] * self.size if self.is_main else None
        with self.waiting("the values of all processes"):
            dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def mean(self, value: float) -> float:
        """The mean of a number over the processes, on every process."""
        if self.control is None:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        with self.waiting("a mean over the processes"):
            dist.all_reduce(total, group=self.control)
        return float(total) / self.size

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if self.peers is not None:
            lost = None if error is None else self.peers.explain(error)
            self.peers.end(lost or error)
            if lost is not None:
                raise lost from error
        # After an error the others may wait in a collective: leave without them.
        if self.control is not None and kind is None:
            dist.destroy_process_group()


def launched() -> tuple[int, int]:
    """Rank and number of processes, as the launcher's RANK and WORLD_SIZE say; (0, 1) without.

    Raises: RunError where they are no such numbers: as the process that it is not, this one would
        save nothing, or wait for others that are not there.
    """
    rank, size = launcher_says("RANK", 0), launcher_says("WORLD_SIZE", 1)
    if size > 1 and not os.environ.get("RANK"):
        raise RunError(
            f"environment: WORLD_SIZE is {size} and RANK is not set: start with torchrun"
        )
    if rank >= size:
        raise RunError(
            f"environment: RANK is {rank} of {size} processes (WORLD_SIZE); start with torchrun, or"
            " unset RANK for one process"
        )
    return rank, size


def launcher_says(name: str, default: int) -> int:
    """A number from the environment. Raises: RunError for anything else."""
    text = os.environ.get(name) or str(default)
    low = 1 if name == "WORLD_SIZE" else 0
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= low):
        raise RunError(f"environment: {name} is {text[:80]!r}; allowed: a whole number >= {low}")
    return int(text)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Signals that have a handler in Python end the process inside: it waits in torch, where no
    such handler is called, and has nothing to save.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        handled = [number for number in numbers if callable(signal.getsignal(number))]
        before = {number: signal.signal(number, signal.SIG_DFL) for number in handled}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def meeting() -> Iterator[None]:
    """Turns what goes wrong while the processes look for each other into a RunError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"the {os.environ['WORLD_SIZE']} processes cannot meet at {place} ({reason}): start"
            " them with torchrun, which chooses a free port, or set MASTER_PORT to one"
        ) from error


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name` (auto, cuda, mps or cpu; auto takes the first of these that works
    here).

    Raises: RunError where the device does not exist on this machine.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, works in found.items() if works)
    if not found.get(name, False):
        works = ", ".join(kind for kind, ok in found.items() if ok)
        raise RunError(
            f"DEVICE {name}: not available on this machine (available: {works}); choose one of"
            " these or auto"
        )
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise RunError(
            f"process {local_rank} of this machine has no GPU of its own"
            f" ({torch.cuda.device_count()} found): start with"
            f" --nproc-per-node={torch.cuda.device_count()}, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_precision(device: torch.device, name: str = "auto", enabled: bool = True) -> torch.dtype:
    """The dtype of autocast. auto: bfloat16 on CUDA from sm_80 on, float16 on older CUDA, float32
    (no autocast) elsewhere.
    """
    if not enabled:
        return torch.float32
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def autocast_factory(device: torch.device, dtype: torch.dtype) -> Callable[[], torch.autocast]:
    """A function without arguments that opens an autocast region of this dtype; float32 means no
    autocast.
    """
    enabled = dtype != torch.float32
    return partial(torch.autocast, device.type, dtype=dtype if enabled else None, enabled=enabled)


def memory_format(channels_last: bool) -> torch.memory_format:
    """The order of image-like tensors in memory."""
    return torch.channels_last if channels_last else torch.preserve_format


def prepare_device(device: torch.device, threads: int = 0, deterministic: bool = False) -> None:
    """Process-wide settings. threads: CPU threads of torch, 0 leaves them. deterministic: kernels
    that give the same bits each time; torch raises where it has none.
    """
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        # exp(-100) of masked pairs is a denormal, which slows the CPU down
        torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_rng(device: torch.device) -> dict[str, Any]:
    """The states of all generators of this process as tensors and numbers, so that they load under
    weights_only=True.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what `capture_rng` took; a device state of another kind of device is left out."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(state["torch"])
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type])


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when it is complete and on disk; until then the
    old file stays.

    Raises: RunError naming the path where the system refuses the write (disk full, file too large,
        no permission).
    """
    partial_path = path.with_name(f".{path.name}.partial")
    try:
        with open(partial_path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_path, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error} (free on that disk:"
            f" {free_space(path.parent)}); nothing that was there has changed"
        ) from error
    finally:
        partial_path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, written whole. Raises: RunError."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_config(
    folder: Path, plain: dict[str, Any], text: str, class_names: Sequence[str] = ()
) -> None:
    """The run's settings, as config.json (Swin's name) and as config.yaml, which can be
    given back as --cfg. class_names: by label; config.json holds them too, as id2label.
    """
    labels = {"id2label": dict(enumerate(class_names))} if class_names else {}
    write_text(folder / "config.json", json.dumps(plain | labels, indent=1))
    write_text(folder / "config.yaml", text)


def has_config(folder: Path) -> bool:
    """Whether the files of `write_config` are there."""
    return all((folder / f"config.{ending}").is_file() for ending in ("json", "yaml"))


def _sync_folder(folder: Path) -> None:
    """Makes a rename in this folder survive a power cut; systems that cannot open folders (Windows)
    need no such call.
    """
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def free_space(folder: Path) -> str:
    """Free bytes of the disk that holds this folder, for people."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
    except OSError:  # the folder is gone
        return "unknown"


def prepare_folder(folder: str | Path) -> Path:
    """Creates a folder and proves that it can be written to, before anything else is done. Raises:
    RunError.
    """
    folder = Path(folder)
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"output folder {folder}: {error.strerror or error}; choose another one with --output"
        ) from error
    return folder


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar, if there is one, and leaves out the lines that the bar
    replaces.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not (getattr(record, "progress", False) and on_terminal()):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A log file that may fail (disk full): the run goes on, and the other outputs say so once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        """Called where a record could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            LOGGER.warning("%s is not written, the run goes on: %s", self.baseFilename, error)


def on_terminal() -> bool:
    """True where a person watches: progress bars and colours make sense."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


def create_logger(folder: Path | None, name: str, rank: int = 0) -> logging.Logger:
    """The log of the run: folder/log_rank{rank}.txt (appended; None: no file) and, on rank 0, the
    console.

    Lines read `[date time name] (file line): LEVEL message`. Warnings of every library arrive here
    too.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "of_run", False)]:
        root.removeHandler(handler)
        handler.close()
    when = f"[%(asctime)s {name.replace('%', '%%')}]"
    where = "(%(filename)s %(lineno)d)"
    what = "%(levelname)s %(message)s"
    plain = f"{when} {where}: {what}"
    coloured = f"{colored(when, 'green')}{colored(where, 'yellow')}: {what}"
    if rank == 0:
        _attach(root, _ConsoleHandler(), coloured if on_terminal() else plain)
    if folder is not None:
        _attach_file(root, folder / f"log_rank{rank}.txt", plain)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    logging.captureWarnings(True)
    return LOGGER


def behind_bar(logger: logging.Logger) -> logging.LoggerAdapter:
    """The same log, but a terminal with a progress bar does not show its lines."""
    return logging.LoggerAdapter(logger, {"progress": True})


def _attach(root: logging.Logger, handler: logging.Handler, pattern: str) -> None:
    handler.of_run = True
    handler.setFormatter(logging.Formatter(pattern, datefmt="%Y-%m-%d %H:%M:%S"))
    root.addHandler(handler)


def _attach_file(root: logging.Logger, path: Path, pattern: str) -> None:
    try:
        if path.exists() and not path.is_file():  # opening a pipe waits for a reader
            raise OSError("it is no file")
        _attach(root, _LogFile(path), pattern)
    except OSError as error:
        LOGGER.warning("%s is not written, the run goes on: %s", path, error)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of this machine is full."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, UserError) or not isinstance(error, RuntimeError):
        return False
    return EXHAUSTED.search(str(error)) is not None


def print_error(error: BaseException) -> None:
    """One line on stderr; processes other than the first say which they are."""
    message = one_line(error)
    if out_of_memory(error):
        wanted = re.search(r"you tried to allocate (\d+) bytes", message)
        said = message.partition(" GPU ")[0][:300].rstrip(".")
        if wanted:
            said = f"this machine has no {int(wanted[1]) / 2**30:.2f} GiB of memory left"
        message = (
            f"{said}. Memory is full: lower DATA.BATCH_SIZE"
            " (--batch-size; raise --accumulation-steps by the same factor to keep the result), or"
            " add --use-checkpoint"
        )
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f" (process {rank})"
    print(f"main.py: error{process}: {message}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; of an error from a DataLoader worker only its
    own last line.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "in DataLoader worker" in lines[0]:
        return printable(lines[-1].partition(": ")[2] or lines[-1])
    return printable(" ".join(lines))


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would act on, or cannot show."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
