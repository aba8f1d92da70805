"""The variable-length kernels of a GPU against attention row by row on the same numbers."""

from __future__ import annotations

import pytest
import torch

from pipeline.model import attention
from tests.gpu.part_kernels import KERNELS, LENGTHS, LIMIT, kernel_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_equals_attention_row_by_row_with_gradients(
    name: str, causal: bool, window: int | None
) -> None:
    kernel = getattr(attention, name)()
    if kernel is None:
        pytest.skip(f"{name} is not available")
    error = kernel_error(
        kernel, LENGTHS, 64, causal=causal, window=window, device=torch.device("cuda")
    )

    assert error <= LIMIT
