"""Batches of plain texts, whole and in blocks, compared with the lines they were made of."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import ConfigMaker, words, write_jsonl
from transformers import AutoTokenizer

from pipeline.config import DataConfig, SourceConfig
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import TextLoader
from pipeline.errors import UserError

LENGTH, BATCH = 16, 8


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    """300 lines, some of which occur many times."""
    rng = random.Random(0)
    found = [words(rng, rng.randint(1, 20)) if k % 5 else "a heading" for k in range(300)]
    (tmp_path / "lines.txt").write_text("".join(line + "\n\n" for line in found))
    return found


@pytest.fixture
def texts(lines: list[str], tmp_path: Path, make_config: ConfigMaker) -> Dataset:
    source = SourceConfig(name="lines", format="lines", path=str(tmp_path / "lines.txt"))
    config = make_config(source, max_document_length=512, append_eos=True)
    return Dataset.open(prepare(config, num_workers=1))


def rows_of(dataset: Dataset, step: int, world_size: int = 1, **data: Any) -> dict[int, list[int]]:
    """The tokens of every text of a batch, by its id, from all ranks."""
    config = DataConfig(path=dataset.folder, global_batch_size=BATCH, **data)
    found: dict[int, list[int]] = {}
    for rank in range(world_size):
        loader = TextLoader(
            dataset, config, rank=rank, world_size=world_size, max_chunk_tokens=60, seed=1
        )
        batch = loader.batch(step)
        assert batch.num_queries == 0
        own = [len(chunk.input_ids) for chunk in batch.chunks]
        assert loader.chunk_tokens(step)[rank] == own
        for chunk in batch.chunks:
            if not chunk.is_dummy:
                pieces = np.split(chunk.input_ids, np.cumsum(chunk.lengths)[:-1])
                for text, piece in zip(chunk.texts, pieces, strict=True):
                    name = int(batch.example_ids[text])
                    assert name not in found  # one rank alone has it
                    found[name] = piece.tolist()
    return found


def tokenised(lines: list[str], tokenizer_path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    return [[*tokenizer(line)["input_ids"], tokenizer.eos_token_id] for line in lines]


def test_blocks_are_the_lines_joined_in_their_order_and_cut(
    texts: Dataset, lines: list[str], tokenizer_path: Path
) -> None:
    joined = [token for row in tokenised(lines, tokenizer_path) for token in row]
    whole = len(joined) // LENGTH
    found: dict[int, list[int]] = {}
    for step in range(whole // BATCH):
        rows = rows_of(texts, step, block_length=LENGTH)
        assert not rows.keys() & found.keys()
        found |= rows
    assert len(found) == whole // BATCH * BATCH
    for block, tokens in found.items():
        assert tokens == joined[block * LENGTH : (block + 1) * LENGTH]


def test_whole_texts_are_the_lines(texts: Dataset, lines: list[str], tokenizer_path: Path) -> None:
    wanted = tokenised(lines, tokenizer_path)
    found: dict[int, list[int]] = {}
    for step in range(300 // BATCH):
        found |= rows_of(texts, step)
    assert len(found) == 300 // BATCH * BATCH
    for line, tokens in found.items():
        assert tokens == wanted[line]


def test_of_several_positives_the_first_is_the_text(
    tmp_path: Path, make_config: ConfigMaker, tokenizer_path: Path
) -> None:
    rows = [
        {"query": f"query {k}", "positives": [f"first of {k}", f"other of {k}"]}
        for k in range(BATCH)
    ]
    source = SourceConfig(
        name="pairs", format="columns", path=str(write_jsonl(tmp_path / "rows.jsonl", rows))
    )
    found = rows_of(Dataset.open(prepare(make_config(source), num_workers=1)), 0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    texts = sorted(tokenizer.decode(row) for row in found.values())
    assert texts == [f"first of {k}" for k in range(BATCH)]


@pytest.mark.parametrize("data", [{}, {"block_length": LENGTH}])
def test_a_batch_is_the_same_on_any_number_of_ranks(texts: Dataset, data: dict[str, Any]) -> None:
    for step in (0, 40):
        one = rows_of(texts, step, **data)
        assert len(one) == BATCH
        assert rows_of(texts, step, 3, **data) == one


def test_blocks_longer_than_all_texts_are_refused(texts: Dataset) -> None:
    with pytest.raises(UserError, match="block_length: 100000"):
        rows_of(texts, 0, block_length=100_000)
