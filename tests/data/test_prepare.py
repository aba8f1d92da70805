"""Preparing a dataset: the same bytes however it is run, and nothing half-done to read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_support import ConfigMaker, reasonaug_rows, write_jsonl

import pipeline
from pipeline.config import SourceConfig, dump_config
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from tests.support import PATIENCE

RUN = """
import sys
from pipeline.config import PrepareConfig, load_config
from pipeline.data.prepare import prepare
if __name__ == "__main__":
    prepare(load_config(PrepareConfig, sys.argv[1]), num_workers=2)
"""


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    path = write_jsonl(tmp_path / "rows.jsonl", reasonaug_rows(400))
    return SourceConfig(name="reasonaug", format="reasonaug", path=str(path))


def run_prepare(script: Path, config: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    script.write_text(RUN)
    command = [sys.executable, str(script), str(config)]
    if ranks > 1:
        mpirun = Path(sys.executable).with_name("mpirun")
        options = ["-n", str(ranks), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        command = [str(mpirun), *options, *command]
    # The checkout under test, wherever the package is installed from.
    environment = {**os.environ, "PYTHONPATH": str(Path(pipeline.__file__).parents[1])}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=environment
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(
    source: SourceConfig, make_config: ConfigMaker, tmp_path: Path, ranks: int
) -> None:
    alone = prepare(make_config(source), num_workers=1)
    config = make_config(source, name="parallel")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    done = run_prepare(tmp_path / "run.py", path, ranks)
    assert done.returncode == 0, done.stderr
    names = sorted(file.name for file in alone.iterdir())
    assert names == sorted(file.name for file in config.output_dir.iterdir())
    for name in names:
        assert (alone / name).read_bytes() == (config.output_dir / name).read_bytes()
    assert not list(tmp_path.glob(".*building"))


def test_an_error_of_one_rank_ends_all_with_its_exit_code(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", reasonaug_rows(400))
    lines = path.read_text().splitlines()
    lines[300] = '{"user_query": 5}'
    path.write_text("\n".join(lines))
    config = tmp_path / "config.yaml"
    broken = SourceConfig(name="broken", format="reasonaug", path=str(path))
    config.write_text(dump_config(make_config(broken)))
    done = run_prepare(tmp_path / "run.py", config, 2)
    assert done.returncode == 2, done.stderr
    assert f"{path}:301: 'user_query' is a int" in done.stderr
    assert not (tmp_path / "dataset").exists()


def test_a_complete_dataset_is_left_as_it_is(
    source: SourceConfig, make_config: ConfigMaker
) -> None:
    config = make_config(source)
    before = (prepare(config, num_workers=1) / "manifest.json").stat().st_mtime_ns
    assert (prepare(config, num_workers=1) / "manifest.json").stat().st_mtime_ns == before


def test_a_dataset_of_another_config_is_not_overwritten(
    source: SourceConfig, make_config: ConfigMaker
) -> None:
    prepare(make_config(source), num_workers=1)
    with pytest.raises(UserError, match="another config"):
        prepare(make_config(source, max_query_length=20), num_workers=1)


def test_block_and_shard_sizes_do_not_change_the_content(
    source: SourceConfig, make_config: ConfigMaker
) -> None:
    many = Dataset.open(prepare(make_config(source), num_workers=1))
    few = Dataset.open(
        prepare(
            make_config(source, name="few", block_bytes=10**8, shard_bytes=10**8), num_workers=1
        )
    )
    assert len(many.manifest.document_shards) > 1 == len(few.manifest.document_shards)
    assert many.manifest.groups == few.manifest.groups
    every = np.arange(many.num_examples)
    for name in ("query", "positives", "negatives"):
        left, right = many.examples.ragged(name, every), few.examples.ragged(name, every)
        assert np.array_equal(left.values, right.values)
        assert np.array_equal(left.offsets, right.offsets)


def test_the_manifest_counts_what_was_read(source: SourceConfig, make_config: ConfigMaker) -> None:
    folder = prepare(make_config(source), num_workers=1)
    tree = json.loads((folder / "manifest.json").read_text())
    assert tree["num_examples"] == 400
    documents = {row["positive_document"] for row in reasonaug_rows(400)}
    documents |= {row["hard_negative_document"] for row in reasonaug_rows(400)} - {None}
    assert tree["num_documents"] == len(documents)
    assert [group["count"] for group in tree["groups"]] == [134, 133, 133]
