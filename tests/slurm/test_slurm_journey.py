"""The quickstart's shards, training and scores through the unmodified batch scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cluster import Cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch/recipes/quickstart"
FOREVER = 1_000_000
TASKS = ("LEMBPasskeyRetrieval", "BrightAopsRetrieval")
# The test machine has fewer cores than the virtual nodes claim, and mpirun may run as root there.
JOB_ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    **{"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
}

Submit = Callable[..., str]


@pytest.fixture
def submit(cluster: Cluster) -> Submit:
    """Submit a job of `slurm/` from the checkout with its log in a file; returns the job's id."""

    def submit(log: Path, *words: object) -> str:
        return cluster.attempt(
            *("sbatch", "--parsable", f"--output={log}", *words),
            cwd=ROOT,
            # The Python environment may have been made for another checkout.
            environment={**JOB_ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            check=True,
        ).stdout.strip()

    return submit


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training rows, a very small model, and the recipe of a short run of it."""
    folder = tmp_path_factory.mktemp("journey")
    python("ReasonAug", "templates", "--out", folder / "data", "--problems-per-concept", 8)
    rows = (folder / "data/train.jsonl").read_text().splitlines()[:200]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    python(
        *("pipeline.cli", "starter", RECIPE / "model.yaml", f"output_dir={folder}/model"),
        *(f"corpus=[{folder}/rows.jsonl]", "vocab_size=400", "hidden_size=32", "num_layers=1"),
        *("num_heads=2", "intermediate_size=64"),
    )
    recipe = yaml.safe_load((RECIPE / "train.yaml").read_text())
    recipe["output_dir"] = f"{folder}/run"
    recipe["model"]["path"] = f"{folder}/model"
    recipe["data"] |= {"path": f"{folder}/shards", "global_batch_size": 16}
    recipe["optimizer"]["warmup_steps"] = 0
    recipe["checkpoint"]["every"] = FOREVER
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe | {"num_steps": FOREVER}))
    return folder


@pytest.fixture
def shards(material: Path, cluster: Cluster, submit: Submit) -> Path:
    """The training rows as shards, made by a job of one MPI rank on each of two nodes."""
    folder, log = material / "shards", material / "prepare.log"
    if not folder.exists():
        source = {"name": "r", "format": "reasonaug", "path": f"{material}/rows.jsonl"}
        job = submit(
            log,
            *("--nodes=2", "--ntasks-per-node=1", "slurm/prepare.sbatch", RECIPE / "data.yaml"),
            *(f"output_dir={folder}", f"tokenizer={material}/model"),
            f"sources={json.dumps([source])}",
        )
        assert cluster.wait(job) == {job: "COMPLETED"}, log.read_text()
    return folder


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def python(module: str, *words: object) -> None:
    command = [sys.executable, "-m", module, *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)


def test_training_on_two_nodes_out_of_time_goes_on_where_it_stopped(
    material: Path, shards: Path, cluster: Cluster, submit: Submit
) -> None:
    config, log = material / "train.yaml", material / "train.log"
    job = submit(log, "--nodes=2", "slurm/train.sbatch", config)
    metrics = material / "run/metrics.jsonl"
    # Its end as well, so that a fault shows at once.
    ended = {"FAILED"}.issuperset
    cluster.poll(lambda: ended(cluster.states(job).values()) or count_lines(metrics) > 2)
    assert count_lines(metrics) > 2, log.read_text()

    cluster.command("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, {"PENDING"}.issuperset)
    # It asked for steps without end, so it cannot have finished before the signal; now it may.
    stopped = count_lines(metrics)
    config.write_text(config.read_text().replace(str(FOREVER), str(stopped + 3)))

    assert cluster.wait(job) == {job: "COMPLETED"}, log.read_text()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(stopped + 3))
    assert f"resuming {material}/run at step {stopped} of {stopped + 3}" in log.read_text()
    assert json.loads((material / "run/environment.json").read_text())["world_size"] == 2


def test_each_element_of_the_array_scores_one_task_and_a_report_follows(
    material: Path, shards: Path, cluster: Cluster, submit: Submit
) -> None:
    python("ReasonAug", "replicas", "--data", material / "data", "--out", material / "hub")
    export = ("export", material / "train.yaml", "--checkpoint", "init")
    python("pipeline.cli", *export, "--output", material / "export")
    config = yaml.safe_load((RECIPE / "evaluate.yaml").read_text())
    config |= {"output_dir": f"{material}/scores", "snapshots": f"{material}/hub"}
    config |= {"models": [{"name": "untrained", "path": f"{material}/export"}]}
    config |= {"tasks": list(TASKS), "training_run": None}
    (material / "evaluate.yaml").write_text(yaml.safe_dump(config))

    logs, log = material / "evaluate-%a.log", material / "report.log"
    array = submit(logs, "--array=0-1", "slurm/evaluate.sbatch", "run", material / "evaluate.yaml")
    report = submit(
        *(log, f"--dependency=afterok:{array}", "slurm/report.sbatch", material / "evaluate.yaml")
    )

    assert cluster.wait(array) == {f"{array}_{i}": "COMPLETED" for i in (0, 1)}, [
        path.read_text() for path in material.glob("evaluate-*.log")
    ]
    assert cluster.wait(report) == {report: "COMPLETED"}, log.read_text()
    for i, task in enumerate(TASKS):
        assert (
            f"element {i + 1}/2 untrained {task}: " in (material / f"evaluate-{i}.log").read_text()
        )
    table = json.loads((material / "scores/report/report.json").read_text())
    assert {row["name"] for row in table["tasks"]} == set(TASKS)
