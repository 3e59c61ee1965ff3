"""Plain data of a file: bounded, so that no later step of a run can be stalled by it.

Lists that hold each other, or the same one many times, are small in a file and without end when
they are printed or compared.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .errors import CheckpointError

DEPTH = 100  # of nested dicts and lists; configs have about 5
VALUES = 5_000_000  # written out, what is shared counted each time
CHARACTERS = 1000  # of text that count as another value
BITS = 1024  # of a whole number


def check_plain(content: Any, source: str) -> None:
    """Raises CheckpointError where a file's nested data are deeper, longer or larger than anything
    that a training writes, or contain themselves.
    """
    sizes: dict[int, int] = {}  # written out, of the containers that are done
    open_ones: list[tuple[Any, Iterator[Any], int]] = []  # a container, its rest, its size so far
    inside: set[int] = set()

    def enter(value: Any) -> None:
        open_ones.append((value, children(value), 1))
        inside.add(id(value))

    if not is_container(content):
        return
    enter(content)
    while open_ones:
        value, rest, size = open_ones.pop()
        child = next(rest, DONE)
        if child is DONE:
            sizes[id(value)] = size
            inside.discard(id(value))
            if open_ones:
                above, others, before = open_ones.pop()
                open_ones.append((above, others, before + size))
            continue
        if not is_container(child):
            open_ones.append((value, rest, size + weight(child, source)))
        elif id(child) in inside:
            raise endless(source, "contains itself")
        elif id(child) in sizes:
            open_ones.append((value, rest, size + sizes[id(child)]))
        else:
            open_ones.append((value, rest, size))
            enter(child)
        if len(open_ones) > DEPTH:
            raise endless(source, f"is nested more than {DEPTH} deep")
        if open_ones and open_ones[-1][2] > VALUES:
            raise endless(source, f"is more than {VALUES:,} values written out")


DONE = object()


def is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple, set, frozenset))


def children(value: Any) -> Iterator[Any]:
    if not isinstance(value, Mapping):
        yield from value
        return
    for key, inner in value.items():
        yield key
        yield inner


def weight(value: Any, source: str) -> int:
    """How many values one counts for. Raises: CheckpointError for a number beyond all use."""
    if isinstance(value, Tensor):
        return 1
    if isinstance(value, int) and value.bit_length() > BITS:
        raise CheckpointError(
            f"{source} holds a whole number of {value.bit_length()} bits, which no training writes;"
            " fetch or write it again"
        )
    return 1 + (len(value) // CHARACTERS if isinstance(value, (str, bytes, bytearray)) else 0)


def endless(source: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: what it holds beside its tensors {problem}, which no training writes; fetch or"
        " write it again"
    )
