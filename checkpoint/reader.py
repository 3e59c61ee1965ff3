"""The one reader of checkpoint files: a path or URL -> `Checkpoint`, which says what it is.

    checkpoint = read_checkpoint("~/output/best.pth")
    checkpoint.kind                 "training", "swin" or "weights"
    checkpoint.weights("ema")       {key: tensor}, for `load_weights`
    checkpoint.training_state()     all that a run goes on from

The file is opened once, read once, and checked while it is read: checksums, no code, then, for what
is asked of it, names, types, ranges and lengths (schema.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .archive import can_be_mapped, map_pickle, read_pickle
from .errors import CheckpointError
from .files import locate, refuse_other_files
from .plain import check_plain
from .schema import check_numbers, check_swin, check_training
from .sealed import check_header, is_safetensors
from .weights import Weights, read_safetensors, select

TRAINING, SWIN, WEIGHTS = "training", "swin", "weights"
# Entries that training states of this program alone have.
OWN_ENTRIES = {"progress", "layout", "ranks"}
QUICK = 1 << 24  # bytes of a file that is read as a whole for a short look


class Checkpoint:
    """The content of a file, and what it is.

    Args:
        content: tensors and plain data.
        source: path or URL as given, for messages.
        path: the file on this machine.
        checked: whether checksums have vouched for the content.
        mapped: the tensors are on disk still, and their values are not looked at.
    """

    def __init__(
        self,
        content: Any,
        source: str,
        path: Path,
        checked: bool = True,
        mapped: bool = False,
    ) -> None:
        check_plain(content, source)
        self.content = content
        self.source = source
        self.path = path
        self.checked = checked
        self.mapped = mapped
        self.kind = kind_of(content)
        self._checked = False

    def weights(self, entry: str | None = None) -> Weights:
        """The part called `entry` ("model", "ema", ...; see `weights.unwrap`), by default the
        weights that were trained.

        Raises: CheckpointError where the file has none.
        """
        if entry is None and self.kind == TRAINING:
            entry = "model"  # never the average instead
        weights = select(self.content, self.source, entry)
        weights.checked &= self.checked
        return weights

    @property
    def has_average(self) -> bool:
        """Whether this is a training state of this program with averaged weights in it."""
        return self.kind == TRAINING and isinstance(self.content.get("ema"), Mapping)

    def training_state(self) -> dict[str, Any]:
        """A training state of this program, checked.

        Raises: CheckpointError for another kind of file, or one that names the entry that is
            missing or of another type, range or length.
        """
        if self.kind != TRAINING:
            raise CheckpointError(
                f"{self.source} holds no training state of this program, only weights at most;"
                " start from its weights with --pretrained"
            )
        if not self._checked:
            check_training(self.content, self.source)
            if not self.mapped:
                check_numbers(self.content, self.source)
            self._checked = True
        return self.content

    def swin_state(self) -> dict[str, Any]:
        """What the Swin repository saves beside the weights (optimizer, epoch, max_accuracy,
        scaler), checked. Raises: CheckpointError.
        """
        check_swin(self.content, self.source)
        return self.content


def kind_of(content: Any) -> str:
    """What a file is, by the names of its entries."""
    if not isinstance(content, Mapping) or isinstance(content, Weights):
        return WEIGHTS
    if OWN_ENTRIES & content.keys() or type(content.get("format")) is int:
        return TRAINING
    return SWIN if {"optimizer", "epoch"} <= content.keys() else WEIGHTS


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Reads a .pth (pickle, restricted to tensors and plain data) or .safetensors file, from disk
    or an https URL, onto the CPU. Its content tells the format, not its name.

    Raises: CheckpointError, one line, for a missing, empty, truncated, corrupt or unsafe file.
    """
    path, checked = locate(source), True
    with opened(path) as (file, head):
        if is_safetensors(head):
            content = read_safetensors(path, str(source))
        else:
            content, checked = read_pickle(path, file)
    return Checkpoint(content, str(source), path, checked)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, bytes]]:
    """The file at its beginning, and its first bytes. Raises: CheckpointError for one of another
    format, and where something in the block cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            file.seek(0)
            refuse_other_files(path, head)
            yield file, head
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def peek_checkpoint(path: str | Path) -> Checkpoint:
    """A .pth file without its tensors' values, which stay on disk and are not checked: names,
    shapes and plain data alone are read.

    Raises: CheckpointError.
    """
    path = locate(path)
    return Checkpoint(map_pickle(path), str(path), path, mapped=True)


def check_file(source: str | Path, entry: str | None = None, run: bool = False) -> None:
    """Looks at a file of weights without reading its tensors: whether it is whole as far as its
    header and directory tell, safe, and has the `entry`. run: it may be a training state to go on
    with.

    Raises: CheckpointError.
    """
    path = locate(source)
    with opened(path) as (file, head):
        if is_safetensors(head):
            check_header(path, file)
            return
        mapped = can_be_mapped(path, file)
    if not mapped and head[:1] == b"\x80" and path.stat().st_size > QUICK:
        return  # a pickle of before torch 1.6, which can only be read as a whole
    checkpoint = peek_checkpoint(path) if mapped else read_checkpoint(path)
    if run and checkpoint.kind == TRAINING:
        checkpoint.training_state()
    else:
        checkpoint.weights(entry)


def read_weights(source: str | Path, entry: str | None = None) -> Weights:
    """The weights of a file: `read_checkpoint(source).weights(entry)`.

    entry: which part of a wrapped file to take ('model', 'model_ema', ...); see `weights.unwrap`.
    Raises: CheckpointError, one line, for a file that cannot be read or has no weights.
    """
    return read_checkpoint(source).weights(entry)
