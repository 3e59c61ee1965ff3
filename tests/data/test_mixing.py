"""Mixup and CutMix, and when there is none."""

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.mixing import build_mixup


def test_all_three_switches_off_means_no_mixing():
    assert build_mixup(10, 7) is None


@pytest.mark.parametrize(
    "switch",
    [{"mixup": 0.8}, {"cutmix": 1.0}, {"cutmix_minmax": (0.2, 0.8)}, {"mixup": 0.8, "cutmix": 1.0}],
)
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_any_switch_gives_soft_targets_with_smoothing_inside(switch, mode):
    mix = build_mixup(5, 4, **switch, mode=mode, smoothing=0.1)
    np.random.seed(0)
    images, targets = mix(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert images.shape == (4, 3, 8, 8) and targets.shape == (4, 5)
    assert torch.allclose(targets.sum(1), torch.ones(4)) and targets.min() >= 0.1 / 5 - 1e-6


def test_mixing_follows_numpys_generator_alone():
    mix = build_mixup(5, 4, mixup=0.8, cutmix=1.0)
    outputs = []
    for torch_seed in (1, 2):
        np.random.seed(3)
        torch.manual_seed(torch_seed)
        outputs.append(mix(torch.arange(4.0).view(4, 1, 1, 1).repeat(1, 1, 8, 8), torch.arange(4)))
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])


def test_an_odd_batch_and_an_unknown_mode_are_refused():
    with pytest.raises(DataError, match="BATCH_SIZE 7 is odd.*AUG.CUTMIX 0"):
        build_mixup(10, 7, cutmix=1.0)
    with pytest.raises(DataError, match="MIXUP_MODE 'half' is unknown; allowed: batch, pair, elem"):
        build_mixup(10, 8, cutmix=1.0, mode="half")
