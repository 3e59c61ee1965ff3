"""Order: what every rank sees, in which order, from where."""

import numpy as np
import pytest

from data.errors import DataError
from data.randomness import Key
from data.samplers import EvalBatches, TrainBatches


def epoch_of(epoch: int, start: int = 0, **arguments) -> list[list[Key]]:
    batches = TrainBatches(**arguments)
    batches.epoch, batches.start = epoch, start
    return list(batches)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [12, 13, 31])
def test_an_epoch_shows_no_image_twice_and_every_rank_has_equally_many_batches(world, length):
    ranks = [
        epoch_of(0, length=length, batch_size=2, rank=rank, world_size=world)
        for rank in range(world)
    ]
    seen = [key.index for rank in ranks for batch in rank for key in batch]
    assert {len(rank) for rank in ranks} == {length // (2 * world)} and all(
        len(batch) == 2 for rank in ranks for batch in rank
    )
    assert len(seen) == len(set(seen)) == length // (2 * world) * 2 * world


def test_each_epoch_has_another_order_and_over_epochs_every_rank_sees_every_image():
    epochs = [epoch_of(epoch, length=20, batch_size=2, rank=1, world_size=2) for epoch in range(12)]
    orders = [[key.index for batch in batches for key in batch] for batches in epochs]
    assert len({tuple(order) for order in orders}) == 12
    assert set().union(*orders) == set(range(20))


def test_the_order_is_a_function_of_seed_and_epoch_that_stays():
    first, second = (epoch_of(3, length=8, batch_size=4, seed=seed) for seed in (5, 6))
    assert [key.index for batch in first for key in batch] == [
        7,
        6,
        3,
        1,
        2,
        0,
        5,
        4,
    ]  # NumPy promises these numbers for ever
    assert first == epoch_of(3, length=8, batch_size=4, seed=5) != second


def test_starting_at_a_batch_gives_the_rest_of_the_epoch():
    whole = epoch_of(2, length=23, batch_size=2, world_size=2, rank=1)
    for start in range(len(whole) + 1):
        assert epoch_of(2, start, length=23, batch_size=2, world_size=2, rank=1) == whole[start:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equal_global_batches_see_equal_images_whatever_the_world_size(world):
    ranks = [
        epoch_of(1, length=50, batch_size=8 // world, rank=rank, world_size=world)
        for rank in range(world)
    ]
    together = [sorted(key.index for batch in parts for key in batch) for parts in zip(*ranks)]
    assert together == [
        sorted(key.index for key in batch) for batch in epoch_of(1, length=50, batch_size=8)
    ]


def test_an_iterator_does_not_follow_later_changes_of_the_epoch():
    batches = TrainBatches(8, 2)
    iterator = iter(batches)
    batches.epoch = 7
    assert {key.epoch for batch in iterator for key in batch} == {0}


def test_repeated_augmentation_shows_a_third_of_the_images_three_times_each_copy_numbered():
    keys = [key for batch in epoch_of(0, length=30, batch_size=5, copies=3) for key in batch]
    indices, counts = np.unique([key.index for key in keys], return_counts=True)
    assert len(keys) == len(set(keys)) == 30 and len(indices) == 10 and set(counts) == {3}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_evaluation_shows_every_image_once_over_all_ranks(world, shuffle):
    ranks = [EvalBatches(10, 3, rank, world, shuffle) for rank in range(world)]
    seen = [key.index for rank in ranks for batch in rank for key in batch]
    assert sorted(seen) == list(range(10)) and all(len(list(rank)) == len(rank) for rank in ranks)


def test_more_ranks_than_validation_images_leave_some_ranks_without_a_batch():
    assert [len(EvalBatches(2, 4, rank, 3)) for rank in range(3)] == [1, 1, 0]


def test_a_batch_larger_than_the_data_is_an_error_that_says_the_most_allowed():
    with pytest.raises(DataError, match="BATCH_SIZE 8 x 2 process.* 15 training images; at most 7"):
        TrainBatches(15, 8, world_size=2)
