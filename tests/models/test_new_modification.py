"""Adding a modification takes one file and one YAML, on every kind of backbone, with no other
edit.
"""

import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.helpers import ROOT

MODIFIER = '''"""A sample: the logits of each head are multiplied by a learned temperature."""

import torch
from torch import nn

from .base import MODIFIERS, TermModifier


@MODIFIERS.register("sample_temperature")
class SampleTemperature(TermModifier):
    """scale <- scale * exp(temperature).

    Shapes: temperature (heads,).
    """

    def __init__(self, geometry, start: float = 0.0):
        super().__init__(geometry)
        self.temperature = nn.Parameter(torch.full((geometry.num_heads,), start))

    def forward(self, terms):
        return terms.replace(scale=terms.scale * self.temperature.exp())
'''
CONFIG = """BASE: ['{base}']
MODEL: {{NAME: sample, ATTENTION: {{MODIFIERS: ['sample_temperature(start=0.5)']}}}}
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The files that the program consists of, with one more modifier."""
    copy = tmp_path_factory.mktemp("copy") / "repository"
    ignored = shutil.ignore_patterns(
        ".*", "output", "__pycache__", "tests", "csrc", "*.md", "build"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / "models" / "attention" / "modifiers" / "sample_temperature.py").write_text(MODIFIER)
    return copy


@pytest.mark.parametrize("base", ["digits_swin.yaml", "digits_vit.yaml"])
def test_one_file_and_one_yaml_train_a_new_modifier(repository, base):
    (repository / "configs" / "digits" / "sample.yaml").write_text(CONFIG.format(base=base))
    command = [
        sys.executable,
        "main.py",
        "--cfg",
        "configs/digits/sample.yaml",
        "--opts",
        "TRAIN.MAX_STEPS",
        "2",
        "LOG.PLOT",
        "False",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WINDOW_ATTENTION_BUILD": "0"}
    done = subprocess.run(
        command, cwd=repository, env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    weights = load_file(repository / "output" / "sample" / "default" / "model.safetensors")
    learned = [
        tensor
        for name, tensor in weights.items()
        if name.endswith("modifiers.sample_temperature.temperature")
    ]
    assert learned and all((tensor != 0.5).all() for tensor in learned)
    shutil.rmtree(repository / "output")
