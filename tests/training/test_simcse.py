"""SimCSE: a line is its own positive, and dropout is all that tells its two vectors apart."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.config import (
    ChunkConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    PrepareConfig,
    SourceConfig,
    TrainConfig,
)
from pipeline.data.batch import GlobalBatch
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import make_loader
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.engine import seed_random
from tests.benchmarks.bench_support import PlainEngine
from tests.tiny_models import tiny_starter
from tests.training.tiny_recipe import WORDS

LINES, TEMPERATURE = 12, 0.05


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """12 lines, of which the first occurs three times, and a model for them."""
    folder = tmp_path_factory.mktemp("simcse")
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(LINES - 2)]
    raw = folder / "lines.txt"
    raw.write_text("\n".join([*lines, lines[0], lines[0]]))
    model = str(tiny_starter(folder / "model", raw))
    source = SourceConfig(name="lines", format="lines", path=str(raw))
    config = PrepareConfig(output_dir=folder / "shards", tokenizer=model, sources=(source,))
    return Dataset.open(prepare(config, num_workers=1))


def make_config(shards: Dataset, max_tokens: int) -> TrainConfig:
    return TrainConfig(
        output_dir=Path("unused"),
        num_steps=1,
        schedule="cache",
        chunks=ChunkConfig(max_tokens=max_tokens),
        model=ModelConfig(path=shards.tokenizer.path, dtype="float32", attention_dropout=0.3),
        data=DataConfig(path=shards.folder, global_batch_size=LINES, homogeneous="none"),
        loss=LossConfig(temperature=TEMPERATURE),
    )


def embed(encoder: Encoder, batch: GlobalBatch, seed: int) -> torch.Tensor:
    """Vectors of all texts of the batch with the step's own chance."""
    found = torch.empty(batch.num_queries + batch.num_documents, 32)
    for number, chunk in enumerate(batch.chunks):
        seed_random(seed, batch.step, 0, number)
        vectors = encoder(torch.from_numpy(chunk.input_ids), torch.from_numpy(chunk.lengths))
        found[torch.from_numpy(chunk.texts)] = vectors.detach()
    return found


@pytest.mark.parametrize("max_tokens", [10_000, 60], ids=["one chunk", "several chunks"])
def test_the_two_vectors_of_a_line_differ_and_only_other_lines_are_negatives(
    shards: Dataset, max_tokens: int
) -> None:
    config = make_config(shards, max_tokens)
    batch = make_loader(shards, config, rank=0, world_size=1).batch(0)
    assert (len(batch.chunks) == 1) == (max_tokens == 10_000)
    torch.manual_seed(0)
    encoder = build_encoder(config.model)
    # Three of the queries share a document; both sides of a line are the same tokens.
    positives = torch.from_numpy(np.concatenate(list(batch.positives)))
    assert (batch.num_queries, batch.num_documents) == (LINES, LINES - 2)
    asleep = embed(encoder, batch, config.seed)
    queries, documents = asleep[:LINES], asleep[LINES:]
    torch.testing.assert_close(queries, documents[positives])

    awake = embed(encoder.train(), batch, config.seed)
    queries, documents = awake[:LINES], awake[LINES:]
    distance = (queries - documents[positives]).norm(dim=1)
    assert distance.min() > 1e-3
    wanted = F.cross_entropy(queries @ documents.T / TEMPERATURE, positives)
    output = accumulate_gradients(PlainEngine(encoder), batch, config, device=torch.device("cpu"))
    assert float(output.loss) == pytest.approx(float(wanted), rel=1e-5)
