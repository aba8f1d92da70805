"""A very small model, its shards, and the config of a run of a few seconds."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import PrepareConfig, SourceConfig
from pipeline.data.prepare import prepare
from tests.tiny_models import tiny_starter

WORDS = ("river", "stone", "cloud", "amber", "forest", "signal", "copper", "meadow", "reed", "bay")


def make_recipe(folder: Path) -> Path:
    """A config of 6 steps over 24 examples, with dropout and a learned temperature."""
    rows = []
    for i in range(24):
        first, second = WORDS[i % 10], WORDS[(3 * i + 1) % 10]
        rows.append(
            {
                "query": f"where is the {first} {second} number {i}",
                "positive": f"the {first} {second} lies at place {i} " * (1 + i % 4),
                "negative": f"the {second} {first} of number {i} lies elsewhere",
            }
        )
    raw = folder / "rows.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_starter(folder / "model", raw)
    prepare(
        PrepareConfig(
            output_dir=folder / "shards",
            tokenizer=str(folder / "model"),
            sources=(
                SourceConfig(name="rows", format="e5", path=str(raw), instruction="Find the place"),
            ),
        ),
        num_workers=1,
    )
    config = folder / "train.yaml"
    config.write_text(
        f"""
num_steps: 6
output_dir: {folder / "run"}
model: {{path: {folder / "model"}, dtype: float32, attention_dropout: 0.1}}
data: {{path: {folder / "shards"}, global_batch_size: 8, homogeneous: none}}
chunks: {{max_tokens: 200, min_chunks: 2}}
loss: {{temperature: 0.1, learn_temperature: true}}
optimizer: {{lr: 1.0e-3, warmup_steps: 2}}
checkpoint: {{every: 2, keep_last: 2}}
"""
    )
    return config
