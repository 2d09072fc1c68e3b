"""Fixtures of all tests."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """One thread: for networks this small more cost time, and another order of sums changes the last bits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """Accelerate keeps one state for a whole process; a test must not see that of the one before."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=False)
