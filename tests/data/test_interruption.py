"""A build that is killed anywhere continues to the same bytes; a half-built one cannot be read."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from data_support import ConfigMaker, reasonaug_rows, write_jsonl

from pipeline import files
from pipeline.config import PrepareConfig, SourceConfig, dump_config
from pipeline.data.prepare import STEPS, Step, prepare
from pipeline.data.shards import Dataset
from pipeline.errors import DiffembedError, UserError
from tests import forks
from tests.support import PATIENCE

# Kills itself with SIGKILL at the n-th atomic rename of the whole build.
KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.config import PrepareConfig, load_config
from pipeline.data.prepare import prepare

left = [int(sys.argv[2])]
for name in ("replace", "rename"):
    def counted(self, target, original=getattr(Path, name)):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, target)
    setattr(Path, name, counted)
prepare(load_config(PrepareConfig, sys.argv[1]), num_workers=1)
"""

STEP = """
import sys
from pipeline.config import PrepareConfig, load_config
from pipeline.data.prepare import prepare
from pipeline.errors import DiffembedError
try:
    prepare(load_config(PrepareConfig, sys.argv[1]))
except DiffembedError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def config(make_config: ConfigMaker, tmp_path: Path) -> PrepareConfig:
    path = write_jsonl(tmp_path / "rows.jsonl", reasonaug_rows(150))
    source = SourceConfig(name="reasonaug", format="reasonaug", path=str(path))
    return make_config(source, near_duplicates=0.9)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def crash(*build: object) -> None:
    raise CrashError


class CrashError(Exception):
    """Raised where a process would end at a rename."""


def test_stopping_at_any_rename_and_continuing_gives_the_same_bytes(
    config: PrepareConfig, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = contents(prepare(config, num_workers=1))
    interrupted = make_config(*config.sources, name="interrupted", near_duplicates=0.9)
    replace = Path.replace
    allowed, crashes = 0, 0

    def crashing(self: Path, target: Path) -> Path:
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise CrashError
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crashing)
    while not interrupted.output_dir.exists():
        with pytest.raises(UserError):
            Dataset.open(interrupted.output_dir)
        allowed = 7
        try:
            prepare(interrupted, num_workers=1)
        except CrashError:
            crashes += 1
    assert crashes > 5
    assert contents(interrupted.output_dir) == reference


@pytest.mark.parametrize("renames", [9, 40])
def test_a_killed_process_leaves_nothing_readable_and_is_continued(
    config: PrepareConfig, make_config: ConfigMaker, tmp_path: Path, renames: int
) -> None:
    reference = contents(prepare(config, num_workers=1))
    killed = make_config(*config.sources, name="killed", near_duplicates=0.9)
    path, script = tmp_path / "config.yaml", tmp_path / "killed.py"
    path.write_text(dump_config(killed))
    script.write_text(KILLED)
    done = forks.run([script, path, str(renames)], folder=tmp_path, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(UserError):
        Dataset.open(killed.output_dir)
    assert contents(prepare(killed, num_workers=1)) == reference
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_build_of_another_config_is_not_continued(
    config: PrepareConfig, make_config: ConfigMaker
) -> None:
    first = make_config(*config.sources, max_document_length=32)
    with pytest.raises(CrashError):
        prepare(first, num_workers=1, steps=(*STEPS, Step("crash", crash, lambda build: 1)))
    dataset = Dataset.open(prepare(config, num_workers=1))
    assert dataset.max_document_length == 64


def test_tasks_of_srun_without_mpi_share_the_work(
    config: PrepareConfig, make_config: ConfigMaker, tmp_path: Path
) -> None:
    reference = contents(prepare(config, num_workers=1))
    shared = make_config(*config.sources, name="shared", near_duplicates=0.9)
    assert run_step(shared, tmp_path) == [0, 0]
    assert contents(shared.output_dir) == reference
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_failing_task_of_srun_ends_the_others(make_config: ConfigMaker, tmp_path: Path) -> None:
    rows = reasonaug_rows(150)
    rows[140]["user_query"] = 5
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(name="broken", format="reasonaug", path=str(path))
    assert run_step(make_config(source), tmp_path) == [1, 1]
    assert not (tmp_path / "dataset").exists()


def run_step(config: PrepareConfig, folder: Path) -> list[int]:
    """Exit codes of two processes with the variables that srun gives its tasks."""
    path, script = folder / "config.yaml", folder / "step.py"
    path.write_text(dump_config(config))
    script.write_text(STEP)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    with (folder / "log").open("w") as log:
        tasks = [
            forks.Process(
                [script, path],
                folder=folder,
                environment={**step, "SLURM_PROCID": str(rank)},
                stdout=log,
            )
            for rank in range(2)
        ]
    try:
        return [task.wait(timeout=PATIENCE) for task in tasks]
    finally:
        for task in tasks:
            task.kill()


def test_a_killed_worker_is_reported_and_the_rest_continues(config: PrepareConfig) -> None:
    with pytest.raises(DiffembedError, match="run the same command again"):
        prepare(config, num_workers=2, steps=[Step("collect", kill_self, lambda build: 2)])
    assert Dataset.open(prepare(config, num_workers=1)).num_examples == 150


def kill_self(build: object, task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_temporary_files_never_carry_the_final_name(tmp_path: Path) -> None:
    with pytest.raises(CrashError), files.atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise CrashError
    assert list(tmp_path.iterdir()) == []
