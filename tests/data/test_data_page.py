"""docs/data.md: every example on it is prepared as it stands, and every key is named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from data_support import write_jsonl

from pipeline.config import PrepareConfig, SourceConfig, build_config, load_config
from pipeline.config.data import _COLUMNS
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.data.sources import FORMATS
from pipeline.data.sources.paths import _KINDS, _PACKED, _TABLES

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
# Examples of each block of YAML but the last two, in the page's order.
EXAMPLES = [2, 2, 1, 1, 1, 1, 1]
# Rows for these two: the page's own are too few to be divided.
MORE = [{"query": f"question {k}", "positives": [f"answer {k}"]} for k in range(40)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the page shows."""
    monkeypatch.chdir(tmp_path)
    for _, name, content in BLOCKS:
        if name:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                rows = [json.loads(line) for line in content.splitlines()]
                pq.write_table(pa.Table.from_pylist(rows), path)
            else:
                path.write_text(content)
    return tmp_path


def test_every_example_is_prepared_as_it_stands(files: Path, tokenizer_path: Path) -> None:
    found = []
    for language, _, text in BLOCKS:
        if language != "yaml":
            continue
        if "holdout:" in text:
            write_jsonl(files / "faq.jsonl", MORE)
        if "path: faq," in text:
            (files / "faq").mkdir()
            write_jsonl(files / "faq" / "train.jsonl", MORE[:30])
            write_jsonl(files / "faq" / "test.jsonl", MORE[30:])
        output, tokenizer = f"d{len(found)}", str(tokenizer_path)
        tree: Any = yaml.safe_load(text)
        if isinstance(tree, list):
            tree = {"output_dir": output, "tokenizer": tokenizer, "sources": tree}
            config = build_config(PrepareConfig, tree, origin="page")
        else:
            (files / "page.yaml").write_text(text)
            changes = (f"tokenizer={tokenizer}", f"output_dir={output}")
            config = load_config(PrepareConfig, "page.yaml", changes)
        found.append(Dataset.open(prepare(config, num_workers=1)).num_examples)
    (task,) = files.glob("d*/holdout/faq-holdout/queries.jsonl")
    held_out = task.read_text().count("\n")
    assert found == [*EXAMPLES, 40 - held_out, 30] and 0 < held_out < 12


def test_every_key_format_and_kind_of_file_is_on_the_page() -> None:
    named = set(re.findall(r"`([^`\n]+)`", PAGE))
    keys = {
        field.name for kind in (SourceConfig, PrepareConfig) for field in dataclasses.fields(kind)
    }
    assert keys | {*FORMATS, *_COLUMNS, *_KINDS, *_TABLES, *_PACKED} <= named
