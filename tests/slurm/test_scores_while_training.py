"""Checkpoints of a training job are scored by jobs that it submits while it continues."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests import forks
from tests.evaluation import benchmark_replicas
from tests.slurm.cluster import Cluster
from tests.training.tiny_recipe import make_recipe

# Real jobs, most of whose time is the start of Python.
pytestmark = pytest.mark.slurm

TASK = "BrightAopsRetrieval"
STEPS = [2, 4]
# Exports wait for this file.
SITE = """\
source {checkout}/slurm/cluster.env
TRAIN_FLAGS=(--nodes=1 --ntasks-per-node=1)
EVALUATE_FLAGS=(--ntasks=1)
CPU_FLAGS=(--ntasks=1)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH={checkout} PATH={path}
activate() {{
  [[ $SLURM_JOB_NAME != diffembed-export-* ]] || until [[ -e {gate} ]]; do sleep 0.1; done
}}
"""


def ids_of(folder: Path, name: str) -> list[str]:
    """Jobs of that name which were submitted for a folder."""
    path = folder / "jobs/jobs.json"
    entries = json.loads(path.read_text()).values() if path.exists() else []
    return [entry["id"] for entry in entries if entry["name"] == name]


def test_training_continues_while_its_checkpoints_are_scored_to_the_last(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path)
    benchmark_replicas.write_bright(tmp_path / "hub", "mteb/BRIGHT")
    evaluation = {
        "output_dir": "unused",
        "models": [{"name": "unused", "path": "unused"}],
        "tasks": [TASK],
        "snapshots": f"{tmp_path}/hub",
        "max_length": 64,
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(evaluation))
    site, gate, run = tmp_path / "cluster.env", tmp_path / "gate", tmp_path / "run"
    path = forks.program_path(tmp_path / "bin")
    site.write_text(SITE.format(checkout=checkout, gate=gate, path=path))
    every = {"every": 2, "config": f"{tmp_path}/evaluate.yaml"}
    submitted = cluster.attempt(
        *(sys.executable, "-m", "pipeline.cli", "submit", "train", recipe),
        *(f"evaluate={json.dumps(every)}", "num_steps=4", "checkpoint.keep_last=1"),
        cwd=checkout,
        environment={"DIFFEMBED_CLUSTER_ENV": str(site), "PYTHONPATH": str(checkout)},
        check=True,
    ).stdout
    (job,) = re.findall(r"^train (\d+) submitted", submitted, re.MULTILINE)

    # Training ends well although no score of its checkpoints can have been made.
    evaluations = run / "evaluations"
    state = cluster.wait(job)
    (log,) = run.glob("jobs/diffembed-train-*.out")
    assert state == {job: "COMPLETED"}, log.read_text()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [0, 1, 2, 3]
    exports = [
        ids_of(evaluations / f"step-{step:06d}", f"export-step-{step:06d}") for step in STEPS
    ]
    assert [len(ids) for ids in exports] == [1, 1]
    assert not list(evaluations.glob("step-*/export"))

    gate.touch()
    arrays, reports = ids_of(evaluations, "evaluate"), ids_of(evaluations, "report")
    assert len(arrays) == len(reports) == len(STEPS)
    logs = list(run.glob("evaluations/**/*.out"))
    for each in (*arrays, *reports):
        states = cluster.wait(each)
        assert set(states.values()) == {"COMPLETED"}, [path.read_text() for path in logs]

    curves = json.loads((evaluations / "report/report.json").read_text())["by_step"]
    ((task, points),) = curves.items()
    assert task == TASK
    assert [point["step"] for point in points] == STEPS
    for point in points:
        (result,) = evaluations.glob(f"results/step-{point['step']:06d}/{TASK}/*/result.json")
        assert json.loads(result.read_text())["score"] == point["score"]
    assert (evaluations / "report/steps.png").exists()
    header = "| task | metric | step 2 | step 4 |"
    assert header in (evaluations / "report/report.md").read_text()
    # The sources of the scores are deleted, except for the exports of the newest and the best.
    first, last = (point["score"] for point in points)
    kept = {STEPS[-1], STEPS[0] if first > last else STEPS[-1]}
    assert sorted(kept) == [
        step for step in STEPS if (evaluations / f"step-{step:06d}/export").exists()
    ]
    assert not list(evaluations.glob("step-*/checkpoints"))
