"""The plan of a run before it starts: memory, the schedule that follows from it, its text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.config import (
    ChunkConfig,
    DataConfig,
    MaskedDiffusionConfig,
    ModelConfig,
    ObjectiveConfig,
    PrepareConfig,
    SourceConfig,
    TrainConfig,
)
from pipeline.data.prepare import prepare
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder
from pipeline.planning import (
    ModelShape,
    RankWorkload,
    choose_schedule,
    describe,
    graphs_that_fit,
    loading_peak,
    memory_per_rank,
    plan_run,
)
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.token_step import TILE_BYTES
from tests.tiny_models import tiny_starter

# Qwen2.5-7B without lm_head.
SEVEN_B = ModelShape(
    parameters=7_070_619_136,
    trainable=7_070_619_136,
    layer_parameters=233_057_792,
    num_layers=28,
    hidden_size=3584,
    intermediate_size=18944,
)
WORKLOAD = RankWorkload(
    world_size=128,
    stage=3,
    dtype="bfloat16",
    rank_tokens=147_000,
    chunk_tokens=8192,
    gradient_checkpointing=False,
)
GIB = 2**30


def test_known_sizes_of_a_7b_model_come_out() -> None:
    """Against the figures of a hand calculation: 14.1 GB of weights, 7-8 MB of graph a token."""
    memory = memory_per_rank(SEVEN_B, WORKLOAD, "cache")
    assert memory["weights gathered for the step"] == pytest.approx(14.1e9, rel=0.01)
    assert memory["gradients"] == pytest.approx(28.3e9, rel=0.01)
    assert memory["fp32 master and AdamW moments"] == pytest.approx(0.66e9, rel=0.01)
    assert 7e6 < memory["activations of one chunk"] / 8192 < 8e6
    sweep = memory_per_rank(SEVEN_B, WORKLOAD, "sweep")
    assert sweep["inputs of all layers, all chunks"] == pytest.approx(30e9, rel=0.05)
    # One layer and the token embedding: 0.47 + 1.09 GB.
    assert sweep["weights gathered for the step"] == pytest.approx(1.56e9, rel=0.01)


def test_schedules_are_taken_in_the_order_of_their_flops() -> None:
    few = dataclasses.replace(WORKLOAD, rank_tokens=8192)
    assert choose_schedule(SEVEN_B, few, 130 * GIB) == "plain"
    assert choose_schedule(SEVEN_B, WORKLOAD, 130 * GIB) == "cache"
    assert choose_schedule(SEVEN_B, WORKLOAD, 80 * GIB) == "sweep"


def test_boundaries_on_the_host_make_room_on_the_device() -> None:
    on_host = dataclasses.replace(WORKLOAD, boundaries_on_host=True)
    assert choose_schedule(SEVEN_B, on_host, 40 * GIB) == "sweep"
    with pytest.raises(UserError, match=r"found none that fits into 40.0 GiB per rank"):
        choose_schedule(SEVEN_B, WORKLOAD, 40 * GIB)


def test_graphs_are_kept_where_there_is_room() -> None:
    one = memory_per_rank(SEVEN_B, WORKLOAD, "cache")["activations of one chunk"]
    base = sum(memory_per_rank(SEVEN_B, WORKLOAD, "cache").values())
    assert graphs_that_fit(SEVEN_B, WORKLOAD, base - 1, 18) == 0
    assert graphs_that_fit(SEVEN_B, WORKLOAD, base + 2.5 * one, 18) == 2
    assert graphs_that_fit(SEVEN_B, WORKLOAD, base + 99 * one, 18) == 18


def test_stage_2_holds_all_weights_and_stage_3_its_share() -> None:
    two = memory_per_rank(SEVEN_B, dataclasses.replace(WORKLOAD, stage=2), "cache")
    assert two["weights"] == pytest.approx(14.1e9, rel=0.01)
    assert two["weights gathered for the step"] == 0
    three = memory_per_rank(SEVEN_B, WORKLOAD, "cache")
    assert three["weights"] == pytest.approx(14.1e9 / 128, rel=0.01)


def test_stage_3_loads_a_share_and_a_piece_and_stage_2_the_whole_model() -> None:
    assert loading_peak(SEVEN_B, dataclasses.replace(WORKLOAD, stage=2)) == pytest.approx(
        14.1e9, rel=0.01
    )
    # The token embedding is the largest piece: 152,064 x 3,584 numbers.
    assert loading_peak(SEVEN_B, WORKLOAD) == pytest.approx(14.1e9 / 128 + 1.09e9, rel=0.01)


def test_lora_keeps_optimizer_state_for_its_adapters_only() -> None:
    lora = dataclasses.replace(SEVEN_B, trainable=40_000_000)
    memory = memory_per_rank(lora, WORKLOAD, "cache")
    assert memory["gradients"] == 160e6
    assert memory["fp32 master and AdamW moments"] == pytest.approx(12 * 40e6 / 128)


def test_activation_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    """28 inputs of 3,584 numbers in two bytes are 200,704 bytes a token."""
    name = "activations of one chunk"
    kept = memory_per_rank(SEVEN_B, WORKLOAD, "cache")[name]
    checkpointed = dataclasses.replace(WORKLOAD, gradient_checkpointing=True)
    saved = memory_per_rank(SEVEN_B, checkpointed, "cache")[name]
    assert saved == pytest.approx(kept / 28 + 200_704 * 8192)


def test_an_optimizer_on_the_host_takes_nothing_of_the_device() -> None:
    offloaded = dataclasses.replace(WORKLOAD, offload_optimizer=True)
    assert memory_per_rank(SEVEN_B, offloaded, "cache")["fp32 master and AdamW moments"] == 0


def test_fp32_takes_twice_the_bytes_but_for_what_is_in_fp32_anyway() -> None:
    half = memory_per_rank(SEVEN_B, WORKLOAD, "cache")
    full = memory_per_rank(SEVEN_B, dataclasses.replace(WORKLOAD, dtype="float32"), "cache")
    assert {name: full[name] / half[name] for name in half} == {
        "weights": 2,
        "weights gathered for the step": 2,
        "gradients": 1,
        "fp32 master and AdamW moments": 1,
        "activations of one chunk": 2,
    }
    single = dataclasses.replace(WORKLOAD, dtype="float32")
    assert loading_peak(SEVEN_B, single) == 2 * loading_peak(SEVEN_B, WORKLOAD)


def test_no_schedule_combines_sweep_with_activation_checkpointing() -> None:
    checkpointed = dataclasses.replace(WORKLOAD, gradient_checkpointing=True)
    with pytest.raises(UserError, match="found none"):
        choose_schedule(SEVEN_B, checkpointed, 40 * GIB)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """20 lines of 40 words, in blocks of 32 tokens."""
    raw = tmp_path / "lines.txt"
    raw.write_text("".join(f"{number} " + "far and near " * 13 + "\n" for number in range(20)))
    model = str(tiny_starter(tmp_path / "model", raw))
    source = SourceConfig(name="lines", format="lines", path=str(raw))
    shards = PrepareConfig(output_dir=tmp_path / "shards", tokenizer=model, sources=(source,))
    return TrainConfig(
        output_dir=tmp_path / "run",
        num_steps=10,
        model=ModelConfig(path=model, dtype="float32"),
        data=DataConfig(
            path=prepare(shards, num_workers=1),
            global_batch_size=8,
            homogeneous="none",
            block_length=32,
        ),
        chunks=ChunkConfig(max_tokens=64),
        objective=ObjectiveConfig(masked_diffusion=MaskedDiffusionConfig()),
    )


def test_the_plan_counts_blocks_the_head_and_a_tile_of_its_scores(config: TrainConfig) -> None:
    ds_config = resolve_ds_config({"zero_optimization": {"stage": 3}}, config, world_size=2)
    plan = plan_run(config, ds_config, world_size=2, available=4 * GIB)
    body = sum(p.numel() for p in build_encoder(config.model, meta=True).parameters())
    assert plan.shape.parameters == plan.shape.trainable == body + 300 * 32
    assert (plan.schedule, plan.keep_graphs) == ("cache", 0)
    assert (plan.workload.rank_tokens, plan.workload.chunk_tokens) == (128, 64)
    memory = memory_per_rank(plan.shape, plan.workload, plan.schedule)
    assert memory["scores of one tile"] == TILE_BYTES["cuda"]
    text = describe(plan, config)
    assert "masked_diffusion" in text
    assert "8 texts" in text
    assert f"10 x 8 = 80 texts = {80 / plan.num_examples:.2f} epochs of" in text
    with pytest.raises(UserError, match="none that fits"):
        plan_run(config, ds_config, world_size=2, available=TILE_BYTES["cuda"])
