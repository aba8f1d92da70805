"""What a run that predicts tokens costs, before it starts."""

from __future__ import annotations

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
from pipeline.planning import describe, memory_per_rank, plan_run
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.token_step import TILE_BYTES
from tests.tiny_models import tiny_starter

GIB = 2**30


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
    assert (plan.layout.rank_tokens, plan.layout.chunk_tokens) == (128, 64)
    memory = memory_per_rank(plan.shape, plan.layout, plan.schedule)
    assert memory["scores of one tile"] == TILE_BYTES["cuda"]
    text = describe(plan, config)
    assert "masked_diffusion" in text
    assert "8 texts" in text
    assert f"10 x 8 = 80 texts = {80 / plan.num_examples:.2f} epochs of" in text
    with pytest.raises(UserError, match="none that fits"):
        plan_run(config, ds_config, world_size=2, available=TILE_BYTES["cuda"])
