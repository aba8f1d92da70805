"""A run refuses a folder with files of another origin that it would overwrite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.run_folder import OWN_CONFIG, RunDir


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "metrics.jsonl", "environment.json", "ds_config.json"),
        *("checkpoints/best.pt", "checkpoints/step-000010/model.bin"),
    ],
)
def test_a_file_of_a_name_that_runs_write_is_refused_where_no_run_wrote_it(
    tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("a: 1\n")
    with pytest.raises(UserError, match=r"output_dir: .*rename or move it"):
        RunDir(tmp_path).require_own()
    assert file.read_text() == "a: 1\n"


@pytest.mark.parametrize(
    "name", ["manifest.json", "config.json", "adapter_config.json", "model.safetensors"]
)
def test_a_run_is_not_mixed_with_shards_or_a_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=rf"output_dir: .*{name}.*choose another output_dir"):
        RunDir(tmp_path).require_own()


def test_a_run_may_live_beside_other_files_and_come_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("train.yaml", "notes.md", "stop"):
        (tmp_path / name).write_text("mine")
    run.require_own()
    run.config.write_text(OWN_CONFIG + "num_steps: 3\n")
    run.metrics.write_text("")
    run.require_own()


def test_a_run_of_an_earlier_version_which_marked_nothing_comes_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("num_steps: 3\n")
    run.environment.write_text("{}")
    with pytest.raises(UserError):
        run.require_own()
    (tmp_path / "lock").write_text("")
    run.require_own()


def test_a_run_has_one_training_at_a_time_and_is_free_after_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pipeline.run_folder import RunDir\n"
        "run = RunDir(sys.argv[1]); run.claim(); print('claimed', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        try:
            with pytest.raises(UserError, match=rf"another training .*process {other.pid} on"):
                RunDir(tmp_path).claim(patience_seconds=0)
        finally:
            other.kill()
    RunDir(tmp_path).claim(patience_seconds=0)
