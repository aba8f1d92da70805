"""The variable-length kernels of a GPU against attention row by row on the same numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.model import attention
from pipeline.model.attention import PackedRows, packed_attention

pytestmark = pytest.mark.gpu
LENGTHS = [5, 1, 300, 64]


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["flash_attention", "torch_varlen"])
def test_a_kernel_equals_attention_row_by_row_with_gradients(
    kernel: str, causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = getattr(attention, kernel)()
    if chosen is None:
        pytest.skip(f"{kernel} is not available")
    module = SimpleNamespace(config=SimpleNamespace(sliding_window=window))
    rows = PackedRows.of(torch.tensor(LENGTHS, device="cuda"), causal=causal)
    generator = torch.Generator("cuda").manual_seed(0)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        generator.manual_seed(0)
        inputs: list[Any] = [
            torch.randn(1, sum(LENGTHS), heads, 64, device="cuda", generator=generator)
            .to(dtype)
            .transpose(1, 2)
            .requires_grad_()
            for heads in (8, 2, 2)
        ]
        out, _ = packed_attention(module, *inputs, None, rows=rows, sliding_window=window)
        out.float().pow(2).sum().backward()
        return [out.float(), *(x.grad.float() for x in inputs)]

    exact = run(torch.float32)  # fp32 always goes row by row
    monkeypatch.setattr(attention, "choose_kernel", lambda *_, **__: chosen)
    for ours, wanted in zip(run(torch.bfloat16), exact, strict=True):
        assert (ours - wanted).abs().max() <= 0.03 * wanted.abs().max()
