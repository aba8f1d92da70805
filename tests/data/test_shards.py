"""Datasets verified, and described for people."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from data_support import reasonaug_rows

from pipeline.data.shards import Dataset, inspect_dataset, verify_dataset
from pipeline.errors import UserError
from pipeline.tokenizer import load_tokenizer, tokenizer_fingerprint


@pytest.fixture
def copied(dataset: Dataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.folder, tmp_path / "copied"))


def name_tokenizer(dataset: Path, tokenizer: Path, **changes: str) -> None:
    """Make a dataset say that its tokenizer lies elsewhere."""
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest.pop("sha256")  # as in a manifest of an earlier version
    manifest["tokenizer"] |= {"path": str(tokenizer), **changes}
    (dataset / "manifest.json").write_text(json.dumps(manifest))


def test_inspect_shows_counts_lengths_and_decoded_samples(copied: Path) -> None:
    text = inspect_dataset(copied, num_samples=3)
    assert "600 examples" in text
    assert "200 x 'Find a solution of kind 1'" in text
    assert f"limit 64, {Dataset.open(copied).manifest.document_lengths.cut} at the limit" in text
    shown = [line for line in text.splitlines() if line.startswith("example ")]
    queries = [row["user_query"] for row in reasonaug_rows(600)]
    assert len(shown) == 3
    for line in shown:
        query = line.split("Query: ")[1].rstrip("'")
        assert any(full.startswith(query) for full in queries)


def test_inspect_draws_the_length_histogram(copied: Path) -> None:
    inspect_dataset(copied, num_samples=0)
    assert (copied / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_works_where_the_tokenizer_is_gone(copied: Path) -> None:
    name_tokenizer(copied, copied / "gone")
    assert "no samples: the tokenizer" in inspect_dataset(copied, plot=False)


def test_inspect_decodes_with_a_tokenizer_that_publishes_code_of_its_own(
    copied: Path, tmp_path: Path
) -> None:
    dream = Path(shutil.copytree(Dataset.open(copied).tokenizer.path, tmp_path / "dream"))
    (dream / "config.json").write_text('{"model_type": "Dream"}')
    settings = json.loads((dream / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    (dream / "tokenizer_config.json").write_text(json.dumps(settings))
    name_tokenizer(copied, dream, fingerprint=tokenizer_fingerprint(load_tokenizer(str(dream))))
    assert "example " in inspect_dataset(copied, num_samples=1, plot=False)


def test_verify_counts_the_bytes_and_finds_damage(copied: Path) -> None:
    shards = sorted(copied.glob("*.arrow"))
    total = sum(shard.stat().st_size for shard in shards)
    assert f"{len(shards)} shards, {total} bytes" in verify_dataset(copied)
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 3] ^= 4
    shards[0].write_bytes(data)
    with pytest.raises(UserError, match=shards[0].name):
        verify_dataset(copied)
