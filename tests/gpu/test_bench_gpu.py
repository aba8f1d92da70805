"""The GPU benchmark counts its FLOPs right and builds the model it names; checked on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.training.engine import ChunkOutOfMemoryError
from tests.benchmarks.bench_support import load
from tests.gpu import bench_gpu

LENGTH = 64


def count(work: Callable[[], Any]) -> int:
    """FLOPs by torch's own counter, which knows attention only as matrix products."""
    # Unknown to the counter: the product that a LoRA layer adds in place.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


def test_flops_of_a_forward_are_those_that_torch_counts() -> None:
    setting = bench_gpu.settings(tiny=True, peak_tflops=1)
    encoder = bench_gpu.build(setting, lora=False, checkpointing=False)

    counted = count(lambda: encoder(torch.arange(LENGTH), torch.tensor([LENGTH])))
    assert counted == LENGTH * sum(bench_gpu.forward_flops(setting.shape, LENGTH))


@pytest.mark.parametrize("name", ["cache", "sweep", "checkpointing"])
def test_flops_of_a_step_follow_the_stated_factor(name: str) -> None:
    setting = bench_gpu.settings(tiny=True, peak_tflops=1)
    schedule, checkpointing = bench_gpu.SCHEDULES[name]
    encoder = bench_gpu.build(setting, lora=False, checkpointing=checkpointing)
    batch = bench_gpu.batch_of(setting, LENGTH, 4 * LENGTH)
    counted = count(lambda: bench_gpu.step(encoder, batch, schedule, setting.device))

    flops = bench_gpu.step_flops(setting.shape, LENGTH, lora=False, checkpointing=checkpointing)
    assert counted == pytest.approx(flops.done * batch.tokens, rel=0.01)


def test_frozen_weights_spare_a_linear_layers_backward_but_not_attentions() -> None:
    setting = bench_gpu.settings(tiny=True, peak_tflops=1)
    encoder = bench_gpu.build(setting, lora=True, checkpointing=False)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    batch = bench_gpu.batch_of(setting, LENGTH, 4 * LENGTH)
    counted = count(lambda: bench_gpu.step(encoder, batch, "cache", setting.device))
    # Each adapted layer multiplies by two small matrices, twice forward and twice backward.
    adapters = sum(p.numel() for name, p in encoder.named_parameters() if "lora_" in name)
    flops = bench_gpu.step_flops(setting.shape, LENGTH, lora=True, checkpointing=False)

    assert counted == pytest.approx((flops.done + 8 * adapters) * batch.tokens, rel=0.02)


def test_a_cell_that_does_not_fit_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ChunkOutOfMemoryError("a chunk does not fit into memory")

    monkeypatch.setattr(bench_gpu, "step", fail)
    setting = bench_gpu.settings(tiny=True, peak_tflops=1)

    (cell,) = bench_gpu.run_cells(setting, ["LoRA/cache/16"])
    assert "out of memory" in cell.line and cell.planned_gib > 0


def test_a_model_made_on_the_device_computes_like_a_loaded_one(tmp_path: Path) -> None:
    setting = bench_gpu.settings(tiny=True, peak_tflops=1)
    made = bench_gpu.build(setting, lora=False, checkpointing=False)
    made.save_backbone(tmp_path)

    ids, lengths = torch.arange(20), torch.tensor([12, 8])
    with torch.no_grad():
        assert torch.allclose(made(ids, lengths), load(tmp_path)(ids, lengths), atol=1e-6)
