"""Checkpoints are scored during training, by other processes."""

from __future__ import annotations

import fcntl
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.config import EvaluateEveryConfig, TrainConfig, load_config
from pipeline.errors import UserError
from pipeline.train import scoring_commands
from pipeline.training import evaluations as scoring
from pipeline.training.evaluations import Evaluations
from tests.evaluation import benchmark_replicas
from tests.fake_slurm import FakeSlurm
from tests.training.trainer_command import ROOT, run_trainer

TASK = "BrightAopsRetrieval"


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """A config of one task on a replica."""
    benchmark_replicas.write_bright(tmp_path / "hub", "mteb/BRIGHT")
    tree = {
        "output_dir": "unused",
        "models": [{"name": "unused", "path": "unused", "instructions": {TASK: "Find it"}}],
        "tasks": [TASK],
        "snapshots": str(tmp_path / "hub"),
        "max_length": 64,
    }
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(recipe: Path, *overrides: str) -> None:
    done = run_trainer(recipe, "--deepspeed", "ds_configs/zero1.json", *overrides)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_is_scored_during_training_though_it_is_pruned_meanwhile(
    recipe: Path, evaluation: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    every = {"every": 2, "config": str(evaluation), "where": "local"}
    train(
        recipe,
        *("num_steps=3", "checkpoint.every=1", "checkpoint.keep_last=1"),
        *(f"output_dir={run}", f"evaluate={json.dumps(every)}"),
    )
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert not (run / "checkpoints/step-000002").exists()

    report = run / "evaluations/report/report.json"
    with (run / "evaluations/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held by what scores until its end
    assert report.exists(), (run / "evaluations/step-000002/log").read_text()
    ((name, points),) = json.loads(report.read_text())["by_step"].items()
    assert name == TASK
    assert [point["step"] for point in points] == [2]
    (path,) = run.glob("evaluations/results/*/*/*/result.json")
    result = json.loads(path.read_text())
    assert result["score"] == points[0]["score"] > 0
    assert result["instruction"] == "Find it"
    assert result["revision"].startswith("step-000002-")
    # The score names its checkpoint, through the export and in the folder of the step.
    digest = (run / "evaluations/step-000002/checkpoint.digest").read_text()
    assert result["checkpoint"] == digest
    assert sorted(p.name for p in (run / "evaluations").glob("step-*")) == ["step-000002"]


def test_a_run_that_ends_before_the_first_score_says_so(
    recipe: Path, evaluation: Path, tmp_path: Path
) -> None:
    every = json.dumps({"every": 100, "config": str(evaluation), "where": "local"})
    done = run_trainer(
        *(recipe, "--deepspeed", "ds_configs/zero1.json", f"output_dir={tmp_path / 'run'}"),
        *("num_steps=1", "optimizer.warmup_steps=0", "checkpoint.every=100", f"evaluate={every}"),
    )
    assert done.returncode == 0, done.stderr
    expected = "evaluate.every: 100, but the run ends at step 1: no checkpoint is scored"
    assert expected in done.stdout


def started(recipe: Path, evaluation: Path, run: Path, monkeypatch) -> tuple[Evaluations, list]:
    """Evaluations every second step, whose commands are only noted."""
    every = EvaluateEveryConfig(every=2, config=evaluation, where="local")
    config = load_config(TrainConfig, recipe, (f"output_dir={run}", "checkpoint.every=1"))
    commands: list = []
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: commands.append(how))
    return Evaluations(config, every, scoring_commands(every)), commands


def checkpoint_of(run: Path, step: int, weights: str = "") -> Path:
    path = run / f"checkpoints/step-{step:06d}"
    path.mkdir(parents=True, exist_ok=True)
    weights = weights or f"weights of {step}"
    # As whole checkpoints are written: files that other names may link to are never changed.
    (path / "weights.safetensors").unlink(missing_ok=True)
    (path / "weights.safetensors").write_text(weights)
    (path / "state.json").write_text(json.dumps({"files": weights}))
    return path


def test_only_its_turn_is_scored_and_only_once(recipe, evaluation, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    evaluations, commands = started(recipe, evaluation, run, monkeypatch)
    for step in (1, 2, 3):
        evaluations.start(checkpoint_of(run, step), step)
    evaluations.start(run / "checkpoints/step-000002", 2)  # as after a resume
    assert len(commands) == 1
    kept = run / "evaluations/step-000002/checkpoints/step-000002/weights.safetensors"
    (run / "checkpoints/step-000002/weights.safetensors").unlink()
    assert kept.read_text() == "weights of 2"
    assert kept.stat().st_nlink == 1


def test_a_run_that_was_rewound_has_its_new_checkpoints_scored_and_forgets_the_others(
    recipe, evaluation, tmp_path, monkeypatch, capsys
) -> None:
    run = tmp_path / "run"
    evaluations, commands = started(recipe, evaluation, run, monkeypatch)
    steps = {step: run / f"evaluations/step-{step:06d}" for step in (2, 4, 6)}
    for step, folder in steps.items():
        evaluations.start(checkpoint_of(run, step), step)
        (folder / "export").mkdir()
        (run / f"evaluations/store/{folder.name}-abc").mkdir(parents=True)
    capsys.readouterr()

    again, commands = started(recipe, evaluation, run, monkeypatch)
    again.start(run / "checkpoints/step-000002", 2)  # from which the run continues
    assert commands == []
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ["step-000004", "step-000006"]
    assert sorted(p.parts[-2] for p in run.glob("evaluations/*/evaluate.yaml")) == ["step-000002"]
    assert [p.name for p in run.glob("evaluations/step-*/checkpoint.digest")] == [
        "checkpoint.digest"
    ]
    assert [p.parts[-2] for p in run.glob("evaluations/step-*/export")] == ["step-000002"]
    assert [p.name for p in run.glob("evaluations/store/*")] == ["step-000002-abc"]

    again.start(checkpoint_of(run, 4, "other weights"), 4)
    assert len(commands) == 1
    kept = steps[4] / "checkpoints/step-000004/weights.safetensors"
    assert kept.read_text() == "other weights"
    # The same step of another future at once, as where all checkpoints before it are gone.
    again.start(checkpoint_of(run, 4, "third weights"), 4)
    again.start(run / "checkpoints/step-000004", 4)
    assert len(commands) == 2
    assert kept.read_text() == "third weights"


def test_a_scoring_process_is_no_rank_of_training_and_leaves_it_the_gpus(
    recipe, evaluation, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    evaluations, commands = started(recipe, evaluation, tmp_path, monkeypatch)
    evaluations.start(checkpoint_of(tmp_path, 2), 2)
    environ = commands[0]["env"]
    assert "RANK" not in environ
    assert environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_files_of_a_checkpoint_are_let_go_once_its_export_is_there(
    recipe, evaluation, tmp_path, monkeypatch
) -> None:
    run = tmp_path / "run"
    evaluations, _ = started(recipe, evaluation, run, monkeypatch)
    for step in (2, 4, 6):
        evaluations.start(checkpoint_of(run, step), step)
        if step == 2:
            (run / "evaluations/step-000002/export").mkdir()
    held = sorted(path.parts[-2] for path in run.glob("evaluations/step-*/checkpoints"))
    assert held == ["step-000004", "step-000006"]


def test_a_fault_of_scoring_does_not_end_training(
    recipe, evaluation, tmp_path, monkeypatch, capsys
) -> None:
    run = tmp_path / "run"
    evaluations, commands = started(recipe, evaluation, run, monkeypatch)
    run.mkdir()
    (run / "evaluations").write_text("in the way")
    evaluations.start(checkpoint_of(run, 2), 2)
    assert commands == []
    assert "step-000002 is not scored: " in capsys.readouterr().out


def evaluations_of(config: TrainConfig, evaluation: Path) -> Evaluations:
    every = EvaluateEveryConfig(every=2, config=evaluation)
    return Evaluations(config, every, scoring_commands(every))


def test_jobs_need_slurm_and_a_readable_config_before_the_run_starts(
    recipe, evaluation, tmp_path, monkeypatch
) -> None:
    config = load_config(TrainConfig, recipe)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"):
        evaluations_of(config, evaluation)
    with pytest.raises(UserError, match="nowhere"):
        evaluations_of(config, tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match=r"a multiple of checkpoint\.every \(4\)"):
        load_config(
            TrainConfig,
            recipe,
            ("checkpoint.every=4", f"evaluate={{every: 6, config: {evaluation}}}"),
        )


# Fails or hangs as the file `slurm-is` tells it; a real Slurm cannot be made to do so on time.
SBATCH = """\
case $(cat {folder}/slurm-is) in
  full) echo "sbatch: error: Job violates accounting policy" >&2; exit 1;;
  hung) exec sleep 600;;
esac
case $* in *--test-only*) exit;; esac
record "$@"; count
"""


@pytest.fixture
def slurm(recipe, evaluation, tmp_path, monkeypatch) -> tuple[Evaluations, Path]:
    """Evaluations every second step through a fake Slurm, and the file with its state."""
    FakeSlurm(tmp_path, monkeypatch).put("sbatch", SBATCH.format(folder=tmp_path))
    state = tmp_path / "slurm-is"
    state.write_text("well")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DIFFEMBED_CLUSTER_ENV", str(ROOT / "slurm/cluster.env"))
    monkeypatch.chdir(ROOT)
    every = EvaluateEveryConfig(every=2, config=evaluation, text_elements=64)
    overrides = (f"output_dir={tmp_path}/run", "checkpoint.every=1")
    config = load_config(TrainConfig, recipe, overrides)
    return Evaluations(config, every, scoring_commands(every)), state


def orders(state: Path) -> list[str]:
    path = state.with_name("orders")
    found = path.read_text().splitlines() if path.exists() else []
    return [Path(line.split()[-1]).name.rpartition("-")[0] for line in found]


CHAIN = ["evaluate-plan", "evaluate-embed", "evaluate-score", "report"]


def test_each_step_is_submitted_as_one_chain_before_training_ends(slurm, tmp_path) -> None:
    evaluations, state = slurm
    for step in (1, 2, 3, 4):
        evaluations.start(checkpoint_of(tmp_path / "run", step), step)
    evaluations.finish()
    assert orders(state) == [
        *("export-step-000002", *CHAIN),
        *("export-step-000004", *CHAIN),
    ]
    evaluations.start(tmp_path / "run/checkpoints/step-000004", 4)  # as after a resume
    evaluations.finish()
    assert len(orders(state)) == 2 * (1 + len(CHAIN))
    evaluations.start(checkpoint_of(tmp_path / "run", 2, "after a rewind"), 2)
    evaluations.finish()
    assert orders(state)[2 * (1 + len(CHAIN)) :] == ["export-step-000002", *CHAIN]


@pytest.mark.parametrize(
    ("fault", "patience", "said"),
    # A controller that does not answer is asked for a minute, and then refuses as a full one does.
    [("full", 120, "Job violates accounting policy"), ("hung", 1, "no answer within 1 s")],
)
def test_a_step_that_slurm_does_not_take_is_submitted_at_the_next_checkpoint(
    fault, patience, said, slurm, tmp_path, monkeypatch, capsys
) -> None:
    evaluations, state = slurm
    monkeypatch.setattr(scoring, "_SUBMIT_SECONDS", patience)
    state.write_text(fault)
    evaluations.start(checkpoint_of(tmp_path / "run", 2), 2)
    evaluations.finish()
    shown = capsys.readouterr().out
    assert said in shown
    assert "step-000002 is not scored; to submit it: " in shown
    assert orders(state) == []

    state.write_text("well")
    monkeypatch.setattr(scoring, "_SUBMIT_SECONDS", 120)
    evaluations.start(checkpoint_of(tmp_path / "run", 3), 3)
    evaluations.finish()
    assert orders(state) == ["export-step-000002", *CHAIN]
