"""Small sources and a real BPE tokenizer, built once for all workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_support import WORDS, ConfigMaker, reasonaug_rows, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.config import PrepareConfig, SourceConfig
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from tests.mined_data import mine_by_hand
from tests.support import share_folder


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with an EOS it does not add by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    return share_folder(tmp_path_factory, "tokenizer", whole.save_pretrained)


@pytest.fixture
def make_config(tokenizer_path: Path, tmp_path: Path) -> ConfigMaker:
    """PrepareConfig of given sources, with blocks and shards small enough to have many."""

    def make(*sources: SourceConfig, name: str = "dataset", **changes: Any) -> PrepareConfig:
        settings: dict[str, Any] = {
            "output_dir": tmp_path / name,
            "tokenizer": str(tokenizer_path),
            "sources": sources,
            "max_query_length": 48,
            "max_document_length": 64,
            "block_bytes": 40_000,
            "shard_bytes": 30_000,
        }
        return PrepareConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def dataset(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """600 ReasonAug rows, prepared."""

    def make(folder: Path) -> None:
        source = write_jsonl(folder / "rows.jsonl", reasonaug_rows(600))
        config = PrepareConfig(
            output_dir=folder / "dataset",
            tokenizer=str(tokenizer_path),
            sources=(SourceConfig(name="reasonaug", format="reasonaug", path=str(source)),),
            max_query_length=48,
            max_document_length=64,
            block_bytes=40_000,
            shard_bytes=30_000,
        )
        prepare(config, num_workers=1)

    return Dataset.open(share_folder(tmp_path_factory, "shared", make) / "dataset", verify=True)


@pytest.fixture(scope="session")
def mined(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same examples with ten candidates in three bands, and a teacher's vectors."""

    def make(folder: Path) -> None:
        mine_by_hand(dataset, folder / "dataset")

    return share_folder(tmp_path_factory, "mined", make) / "dataset"
