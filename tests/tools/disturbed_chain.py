"""Disturb the training of a whole chain of `diffembed submit all` again and again.

    python -m tests.tools.disturbed_chain

starts a Slurm of two nodes, runs the chain twice, undisturbed and disturbed, and prints the events
of the jobs and of the training run, and a comparison of the two results.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests import forks
from tests.slurm.cluster import Cluster, why_unavailable
from tests.support import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch/recipes/quickstart"
TASKS = ("LEMBPasskeyRetrieval", "BrightAopsRetrieval")
EVERY = 5  # steps between checkpoints
# Between two disturbances: more than a checkpoint, and no multiple of one.
STRIDE = 8
_DISK = "4g"


def site_settings(prepare_nodes: int) -> str:
    """Return a cluster.env for two nodes of the tests' Slurm; shards are prepared on so many."""
    # The test machine has fewer cores than the nodes claim, and mpirun may run as root there.
    return f"""\
source {ROOT}/slurm/cluster.env
PREPARE_FLAGS=(--nodes={prepare_nodes} --ntasks-per-node=1)
TRAIN_FLAGS=(--nodes=2 --ntasks-per-node=1)
EVALUATE_FLAGS=(--ntasks=1)
CPU_FLAGS=(--ntasks=1)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONPATH={ROOT}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
"""


def run_python(module: str, *words: object) -> None:
    done = forks.run(["-m", module, *map(str, words)], folder=ROOT, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def make_material(folder: Path) -> None:
    """Training rows, replicas of two tasks, a very small model, and the site's file."""
    run_python("ReasonAug", "templates", "--out", folder / "data", "--problems-per-concept", 8)
    run_python("ReasonAug", "replicas", "--data", folder / "data", "--out", folder / "hub")
    rows = (folder / "data/train.jsonl").read_text().splitlines()[:200]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    run_python(
        *("pipeline.cli", "starter", RECIPE / "model.yaml", f"output_dir={folder}/model"),
        *(f"corpus=[{folder}/rows.jsonl]", "vocab_size=400", "hidden_size=32", "num_layers=1"),
        *("num_heads=2", "intermediate_size=64"),
    )
    (folder / "cluster.env").write_text(site_settings(prepare_nodes=2))


def write_chain(material: Path, folder: Path, num_steps: int) -> None:
    """The configs of one experiment; all share the shards."""
    prepare, train, evaluate = (
        yaml.safe_load((RECIPE / f"{name}.yaml").read_text())
        for name in ("data", "train", "evaluate")
    )
    source = {"name": "r", "format": "reasonaug", "path": f"{material}/rows.jsonl"}
    prepare |= {"output_dir": f"{material}/shards", "tokenizer": f"{material}/model"}
    prepare |= {"sources": [source]}
    train |= {"output_dir": f"{folder}/run", "num_steps": num_steps}
    train["model"]["path"] = f"{material}/model"
    train["data"] |= {"path": f"{material}/shards", "global_batch_size": 16}
    train["checkpoint"]["every"] = EVERY
    evaluate |= {"output_dir": str(folder), "snapshots": f"{material}/hub", "tasks": list(TASKS)}
    evaluate |= {"training_run": f"{folder}/run"}
    evaluate |= {"models": [{"name": "trained", "path": f"{folder}/run/export"}]}
    parts = {"prepare": prepare, "train": train, "evaluate": evaluate}
    folder.mkdir()
    for name, tree in parts.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    chain = {name: f"{folder}/{name}.yaml" for name in parts}
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve_of(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm, to the last bit."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics_of(run)]


def weights_of(run: Path) -> Any:
    """Hashes of the last checkpoint's tensors, the optimizer's among them."""
    checkpoints = run / "checkpoints"
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    return json.loads((newest / "state.json").read_text())["files"]


class ChainRun:
    """One experiment on the cluster, from its submission to its last job."""

    def __init__(
        self,
        cluster: Cluster,
        material: Path,
        name: str,
        *,
        num_steps: int,
        say: Callable[[str], None],
    ) -> None:
        self.cluster, self.folder, self._say = cluster, material / name, say
        self._site = material / "cluster.env"
        write_chain(material, self.folder, num_steps)
        self._words = ("submit", "all", str(self.folder / "chain.yaml"))
        self.ids = self.submit()

    def submit(self) -> dict[str, str]:
        """`diffembed submit`; the ids that it printed, by job."""
        done = self.cluster.attempt(
            *(sys.executable, "-m", "pipeline.cli", *self._words),
            cwd=ROOT,
            environment={"DIFFEMBED_CLUSTER_ENV": str(self._site), "PYTHONPATH": str(ROOT)},
            check=True,
        )
        self._say(f"$ diffembed {' '.join(self._words)}\n{done.stdout.strip()}")
        return dict(re.findall(r"^([\w-]+) (\d+) ", done.stdout, re.MULTILINE))

    def finish(self) -> None:
        """Wait until the last job has ended, and insist on a good end of all."""
        try:
            self.cluster.wait(list(self.ids.values())[-1], seconds=1700)
        finally:
            ends = {name: self.cluster.states(job) for name, job in self.ids.items()}
            self._say(f"ended: {ends}")
        states = {state for end in ends.values() for state in end.values()}
        assert states == {"COMPLETED"}, self.logs()

    def metrics(self) -> list[dict[str, Any]]:
        return metrics_of(self.folder / "run")

    def scores(self) -> dict[str, Any]:
        """The report, without how long things took."""
        tree = json.loads((self.folder / "report/report.json").read_text())
        assert isinstance(tree, dict)
        return _without_times(tree)

    def logs(self) -> str:
        logs = sorted(
            [*self.folder.glob("**/*.out"), *self.folder.parent.glob("shards-jobs/*.out")]
        )
        return "\n".join(f"{path.name}\n{path.read_text()[-3000:]}" for path in logs)

    def train_log(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("run/jobs/*train-*.out"))

    def disturb(self, disturbance: Callable[[ChainRun], None]) -> int:
        """Let training continue for a while, disturb it, and wait until it starts again.

        Returns:
            Steps that were finished when the disturbance came.
        """
        began = len(self.metrics())
        job = self.ids["train"]
        self.cluster.poll(lambda: len(self.metrics()) >= began + STRIDE or self._is_over())
        assert not self._is_over(), self.logs()
        reached = len(self.metrics())
        self._say(f"-- {disturbance.__name__.replace('_', ' ')}, at step {reached}")
        restarts = self._restarts()
        disturbance(self)
        self.cluster.poll(lambda: self._restarts() > restarts)
        self.cluster.wait(job, {"RUNNING"}.issuperset)
        return reached

    def is_training(self) -> bool:
        """True while a rank is there."""
        try:
            return self.cluster.find_rank("pipeline/train.py", 0) > 0
        except AssertionError:
            return False

    def _restarts(self) -> int:
        shown = self.cluster.command("scontrol", "show", "job", self.ids["train"])
        return int(shown.partition("Restarts=")[2].split()[0])

    def _is_over(self) -> bool:
        states = self.cluster.states(self.ids["train"]).values()
        return bool({"COMPLETED", "FAILED", "CANCELLED"} & set(states))


def preemption(run: ChainRun) -> None:
    run.cluster.command(
        *("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 2"),
    )


def scontrol_requeue(run: ChainRun) -> None:
    run.cluster.command("scontrol", "requeue", run.ids["train"])


def a_node_without_power(run: ChainRun) -> None:
    run.cluster.cut_power("node2")
    run.cluster.restore_power("node2")


def the_time_limit(run: ChainRun) -> None:
    # As `--signal=B:USR1@120` two minutes before it.
    run.cluster.command("scancel", "--batch", "--signal=USR1", run.ids["train"])


def the_crash_of_a_rank(run: ChainRun) -> None:
    os.kill(run.cluster.find_rank("pipeline/train.py", 1), signal.SIGKILL)


def a_crash_without_the_controller(run: ChainRun) -> None:
    with run.cluster.without_controller():
        the_crash_of_a_rank(run)
        time.sleep(20)


def a_full_disk(run: ChainRun) -> None:
    used = shutil.disk_usage(run.folder).used
    # Room for neither a checkpoint nor a line of the log.
    _resize(run.folder, str(used + 4096))
    try:
        run.cluster.poll(lambda: not run.is_training())
        time.sleep(20)
    finally:
        _resize(run.folder, _DISK)


def _resize(folder: Path, size: str) -> None:
    place = next(path for path in (folder, *folder.parents) if path.is_mount())
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


@contextlib.contextmanager
def own_disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system on a folder; yields False where this user may not."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    yield mounted
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            key: _without_times(value)
            for key, value in tree.items()
            if "second" not in key and key not in ("revision", "results_digest")
        }
    return [_without_times(value) for value in tree] if isinstance(tree, list) else tree


def main() -> None:
    if reason := why_unavailable():
        sys.exit(reason)
    began = time.monotonic()
    # Also when it is ended from outside, the cluster goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    def say(text: str) -> None:
        for line in text.splitlines():
            print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    disturbances = [preemption, scontrol_requeue, a_node_without_power]
    disturbances += [the_time_limit, the_crash_of_a_rank, a_crash_without_the_controller]
    with (
        tempfile.TemporaryDirectory() as folder,
        own_disk(Path(folder)) as is_mounted,
        Cluster().running() as cluster,
    ):
        material = Path(folder)
        disturbances += [a_full_disk] if is_mounted else []
        num_steps = (len(disturbances) + 2) * STRIDE
        make_material(material)
        say("== undisturbed")
        calm = ChainRun(cluster, material, "calm", num_steps=num_steps, say=say)
        calm.finish()
        say("== disturbed")
        rough = ChainRun(cluster, material, "rough", num_steps=num_steps, say=say)
        for disturbance in disturbances:
            rough.disturb(disturbance)
        rough.finish()
        say("== submitted once more")
        rough.submit()
        print(f"\nlog of the disturbed training job:\n{_essence(rough.train_log())}")
        print(f"report of the disturbed chain:\n{(rough.folder / 'report/report.md').read_text()}")
        same = curve_of(calm.folder / "run") == curve_of(rough.folder / "run")
        print(f"loss and gradient norm of all {num_steps} steps bit-equal: {same}")
        print(f"reports equal: {calm.scores() == rough.scores()}")


def _essence(log: str) -> str:
    pattern = r"start|resuming|Stopped|requeued|end: exit|CANCELLED|error|done:"
    return "\n".join(line for line in log.splitlines() if re.search(pattern, line))


if __name__ == "__main__":
    main()
