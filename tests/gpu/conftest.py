"""Tests of this folder that need GPUs are skipped where there are too few."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = 2 if item.get_closest_marker("multi_gpu") else 1
    if item.get_closest_marker("gpu") and torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} CUDA device(s)")
