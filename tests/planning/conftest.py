from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import prepare_tiny


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training config whose model and shards exist."""
    folder = tmp_path_factory.mktemp("plan")
    shards = prepare_tiny(folder)
    path = folder / "train.yaml"
    path.write_text(
        f"output_dir: {folder / 'run'}\nnum_steps: 4\nmodel: {{path: {shards.tokenizer}}}\n"
        f"data: {{path: {shards.output_dir}, global_batch_size: 8}}\nchunks: {{max_tokens: 64}}\n"
    )
    return path
