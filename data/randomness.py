"""Randomness as a function of (seed, epoch, image, copy): nothing to save, the same for any number
of workers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch


class Key(NamedTuple):
    """One sample of one epoch. copy counts the repetitions of an image under repeated augmentation,
    from 0.
    """

    epoch: int
    index: int
    copy: int = 0


# Which of several independent streams of one seed; the numbers are arbitrary but must stay as they
# are.
ORDER, SAMPLE, REPLACEMENT, AFFINE = 1, 2, 3, 4


def stream(purpose: int, seed: int, *position: int) -> np.random.RandomState:
    """A generator for `purpose` at `position`. RandomState, because NumPy promises never to change
    its numbers.
    """
    return np.random.RandomState(np.random.MT19937(_sequence(purpose, seed, position)))


def seed_sample(seed: int, key: Key) -> None:
    """Seeds Python's, NumPy's and torch's global CPU generators, from which the transforms draw,
    for one sample.
    """
    words = _sequence(SAMPLE, seed, key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # Not torch.manual_seed: before CUDA is initialised that queues one more call per sample, for
    # ever.
    torch.default_generator.manual_seed(int(words[2]))


def rng_states() -> tuple:
    """The states of the three global CPU generators."""
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def restore_rng(states: tuple) -> None:
    """Sets the three global CPU generators to what `rng_states` gave."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.default_generator.set_state(states[2])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores the three global CPU generators on leaving, so that loading in the main process
    leaves no trace.
    """
    states = rng_states()
    try:
        yield
    finally:
        restore_rng(states)


def _sequence(purpose: int, seed: int, position: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence([purpose, seed % 2**64, *position])
