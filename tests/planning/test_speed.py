"""The projected time of a step: FLOPs by schedule, and what links and host memory add."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_planning import BASE, QWEN_7B, SEVEN_B, WORKLOAD

from pipeline.config import LoraConfig
from pipeline.errors import UserError
from pipeline.loss.tiles import loss_cost
from pipeline.planning.calibration import choose_machine
from pipeline.planning.memory import GPU_GIB
from pipeline.planning.shape import ModelShape
from pipeline.planning.speed import GPUS, LINK_USE, StepWork, step_flops, step_seconds

LOSS = loss_cost(
    num_queries=4096, num_documents=4096, width=3584, world_size=128, score_bytes=2**29
)
WORK = StepWork(workload=WORKLOAD, chunks=(), causal=False, kept=0.0, loss=LOSS, network=50e9)


def seconds(schedule: str, work: StepWork = WORK, gpu: str = "h100") -> dict[str, float]:
    """Seconds by part."""
    parts = step_seconds(SEVEN_B, work, schedule, GPUS[gpu])  # type: ignore[arg-type]
    return {part.part: part.seconds for part in parts}


def test_every_gpu_with_a_memory_has_a_speed() -> None:
    assert GPUS.keys() == GPU_GIB.keys()
    machine = choose_machine("24", None, ranks_per_host=8)
    with pytest.raises(UserError, match="--gpu 24: its speed is not known"):
        machine.require_speed()


def test_full_training_without_caching_takes_six_flops_a_weight_and_token() -> None:
    layers = SEVEN_B.num_layers * SEVEN_B.layer_parameters
    assert step_flops(SEVEN_B, WORK, "plain") == 6 * layers * WORKLOAD.rank_tokens


def test_caching_takes_four_forwards_for_three_and_kept_graphs_take_it_back() -> None:
    """Factor (4 - k / C) / 3 with k of C graphs kept; checkpointing adds a fifth forward."""
    plain = step_flops(SEVEN_B, WORK, "plain")
    for kept in (0.0, 0.25, 1.0):
        work = dataclasses.replace(WORK, kept=kept)
        assert step_flops(SEVEN_B, work, "cache") == pytest.approx(plain * (4 - kept) / 3)
    assert step_flops(SEVEN_B, WORK, "sweep") == pytest.approx(plain * 4 / 3)
    checkpointed = dataclasses.replace(WORKLOAD, gradient_checkpointing=True)
    again = dataclasses.replace(WORK, workload=checkpointed)
    assert step_flops(SEVEN_B, again, "cache") == pytest.approx(plain * 5 / 3)


def test_frozen_weights_need_no_gradient_and_attention_needs_the_same() -> None:
    shape = ModelShape.planned(QWEN_7B, dataclasses.replace(BASE, lora=LoraConfig()))
    full, lora = (step_flops(model, WORK, "plain") for model in (SEVEN_B, shape))
    # Two products for three, and 0.6 % for the adapters.
    assert lora / full == pytest.approx(2 / 3, rel=0.02)
    # Texts of 4,096 tokens: 4 L q FLOPs a token and layer, 3.5 times with the backward.
    texts = np.full(35, 4096)
    attention = 3.5 * 4 * 4096 * 3584 * 28 * texts.sum()
    for model, alone in ((SEVEN_B, full), (shape, lora)):
        work = dataclasses.replace(WORK, chunks=(texts,))
        assert step_flops(model, work, "plain") - alone == pytest.approx(attention)
        causal = dataclasses.replace(work, causal=True)
        assert step_flops(model, causal, "plain") - alone == pytest.approx(attention / 2)


def test_a_cached_step_gathers_and_reduces_once_and_waits_for_both() -> None:
    """On 16 hosts with 100 Gb/s: 15 / 16 of 14.1 GB each at 80 % of 12.5 GB/s."""
    found = seconds("cache", dataclasses.replace(WORK, network=12.5e9))
    once = 14.14e9 * 15 / 16 / 12.5e9 / LINK_USE
    assert found["gather"] == pytest.approx(once, rel=0.01)
    assert found["reduce"] == pytest.approx(once, rel=0.01)


def test_a_sweep_hides_all_but_one_layer_behind_enough_work() -> None:
    found = seconds("sweep")
    layer = SEVEN_B.layer_parameters * 2 * 15 / 16 / 50e9 / LINK_USE
    outer = SEVEN_B.outer_parameters * 2 * 15 / 16 / 50e9 / LINK_USE
    assert found["gather"] == pytest.approx(outer + layer)
    assert found["reduce"] == pytest.approx(outer + layer)
    # With little work nothing is hidden: 2 gathers and 1 reduction of all layers.
    tiny = dataclasses.replace(WORKLOAD, rank_tokens=8)
    waiting = seconds("sweep", dataclasses.replace(WORK, workload=tiny))
    assert waiting["gather"] == pytest.approx(outer + 56 * layer, rel=0.03)


def test_one_gpu_exchanges_nothing() -> None:
    alone = dataclasses.replace(WORKLOAD, world_size=1, stage=2)
    found = seconds("cache", dataclasses.replace(WORK, workload=alone, loss=None))
    assert found.keys() == {"compute", "update"}


def test_what_lies_on_the_host_takes_its_time() -> None:
    offloaded = dataclasses.replace(WORKLOAD, offload_optimizer=True, boundaries_on_host=True)
    found = seconds("sweep", dataclasses.replace(WORK, workload=offloaded))
    share = SEVEN_B.parameters / 128
    optimizer = 2 * share * 2 / 50e9 + 8 * share * 30 / 200e9
    # Compute hides all but one of 56 copies of 30 GB in all, each way.
    copies = 2 * 2 * 3584 * 29 * WORKLOAD.rank_tokens / 50e9 / 56
    assert found["host"] == pytest.approx(optimizer + copies)
    assert "update" not in found
