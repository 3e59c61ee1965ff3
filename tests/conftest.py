"""What a test changes for its whole process does not reach the next one."""

import pytest
import torch


@pytest.fixture(autouse=True)
def subnormals_as_pytorch_starts():
    """main.py in this process sets subnormal results to zero (utils.prepare_device)."""
    yield
    torch.set_flush_denormal(False)
