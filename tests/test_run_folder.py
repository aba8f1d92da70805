"""A run refuses a folder of another origin; its newest checkpoint is whole, the right ones stay."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import run_folder
from pipeline.cli import app
from pipeline.config import CheckpointConfig
from pipeline.errors import UserError
from pipeline.run_folder import OWN_CONFIG, RunDir
from tests.training.memory_engine import Memory, save, tree


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


# --- checkpoints -----------------------------------------------------------------------------


def test_a_stop_says_whether_a_training_hears_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config.write_text(OWN_CONFIG)
    idle = CliRunner().invoke(app, ["stop", str(tmp_path)])
    assert "sees no training work on it" in idle.stdout
    assert f"rm {tmp_path / 'stop'} takes the request back" in idle.stdout
    run.claim()
    assert (
        "will stop after the current step"
        in CliRunner().invoke(app, ["stop", str(tmp_path)]).stdout
    )
    assert run.stop_request.exists()


def test_latest_that_is_a_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(UserError, match=r"latest is not a file .*\| fix: remove it"):
        run_folder.latest_checkpoint(tmp_path)


def test_latest_that_names_nothing_is_explained(tmp_path: Path) -> None:
    save(tmp_path, Memory(a=1.0), step=1, identity={})
    (tmp_path / "latest").write_text("step-000007\n")
    with pytest.raises(UserError, match=r"step-000007.*allowed: step-000001"):
        run_folder.latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"), [("step-000003", "state.json"), ("step-9", "allowed: step-000001")]
)
def test_a_run_is_not_taken_back_to_what_is_not_whole(
    tmp_path: Path, name: str, reason: str
) -> None:
    for step in (1, 3, 4):
        save(tmp_path, Memory(a=1.0), step=step, identity={})
    (tmp_path / "step-000003" / "state.json").write_text("{")
    with pytest.raises(UserError, match=reason):
        run_folder.rewind(tmp_path, name)
    assert run_folder.latest_checkpoint(tmp_path) == tmp_path / "step-000004"


def test_pruning_keeps_the_newest_and_every_multiple(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10, 12):
        save(tmp_path, Memory(a=1.0), step=step, identity={})
    run_folder.prune_checkpoints(
        tmp_path, CheckpointConfig(every=2, keep_last=2, keep_every=4), step=10
    )
    # Checkpoints from before a rewind are not deleted.
    kept = ["step-000004", "step-000008", "step-000010", "step-000012"]
    assert run_folder.checkpoint_names(tmp_path) == kept


def test_checkpoints_beyond_a_million_steps_are_the_newest(tmp_path: Path) -> None:
    """Their names have a digit more, and come first in alphabetical order."""
    folder, steps = tmp_path / "checkpoints", (999_998, 999_999, 1_000_000)
    for step in steps:
        save(folder, Memory(a=1.0), step=step, identity={})
    run_folder.prune_checkpoints(folder, CheckpointConfig(every=1, keep_last=2), step=steps[-1])
    assert run_folder.checkpoint_names(folder) == ["step-999999", "step-1000000"]
    newest = folder / "step-1000000"
    assert run_folder.latest_checkpoint(folder) == newest
    error = run_folder.damaged_checkpoint(newest, "damaged")
    assert f"`diffembed rewind {tmp_path} step-999999`" in error.fix


def test_the_way_out_of_a_damaged_checkpoint_in_a_mirror_works(tmp_path: Path) -> None:
    """`diffembed rewind` takes a run, and a mirror is none."""
    mirror = tmp_path / "mirror"
    for step in (1, 2):
        save(mirror, Memory(a=1.0), step=step, identity={})
    error = run_folder.damaged_checkpoint(mirror / "step-000002", "damaged")
    # What a shell does with the command.
    echo, name, into, file = error.fix.split("`")[1].split()
    assert (echo, into) == ("echo", ">")
    Path(file).write_text(f"{name}\n")
    assert run_folder.latest_checkpoint(mirror) == mirror / "step-000001"


def keep(run: Path, config: CheckpointConfig, steps: range) -> None:
    keeper = run_folder.Keeper(run, config)
    for step in steps:
        path = save(run, Memory(a=float(step)), step=step, identity={})
        keeper.keep(path, step)
        keeper.wait()


def test_a_mirror_holds_the_same_checkpoints_and_is_pruned_by_the_same_rules(
    tmp_path: Path,
) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    mirror.mkdir()
    config = CheckpointConfig(every=1, keep_last=2, keep_every=3, mirror=mirror)
    keep(run, config, range(1, 8))
    assert run_folder.checkpoint_names(run) == ["step-000003", "step-000006", "step-000007"]
    assert tree(mirror) == tree(run)


def test_a_mirror_that_is_gone_ends_no_run_and_is_caught_up_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    config = CheckpointConfig(every=1, keep_last=1, mirror=mirror)
    mirror.write_text("a file where a disk was mounted")
    keep(run, config, range(1, 3))
    assert "step-000002 could not be copied to" in capsys.readouterr().out
    assert run_folder.checkpoint_names(run) == ["step-000002"]
    mirror.unlink()
    mirror.mkdir()
    keep(run, config, range(3, 4))
    assert tree(mirror) == tree(run)


def test_a_mirror_slower_than_the_run_leaves_out_what_is_neither_newest_nor_lasting(
    tmp_path: Path,
) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    mirror.mkdir()
    config = CheckpointConfig(every=1, keep_last=9, keep_every=2, mirror=mirror)
    paths = [save(run, Memory(a=1.0), step=step, identity={}) for step in range(1, 6)]
    keeper = run_folder.Keeper(run, config)
    for step, path in enumerate(paths, 1):
        keeper.keep(path, step)
    keeper.wait()
    assert run_folder.checkpoint_names(mirror) == ["step-000002", "step-000004", "step-000005"]


def test_a_copy_that_arrives_otherwise_than_it_was_sent_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_copy = shutil.copytree

    def lossy_copy(source: Path, target: Path) -> None:  # stands in for a network that loses bytes
        really_copy(source, target)
        (file,) = target.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-1] + b"x")

    path = save(tmp_path / "run", Memory(a=1.0), step=1, identity={})
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    monkeypatch.setattr(run_folder.shutil, "copytree", lossy_copy)
    with pytest.raises(UserError, match=r"differs from its recorded size or SHA-256"):
        run_folder.copy_checkpoint(path, mirror)
    assert run_folder.checkpoint_names(mirror) == []
    assert run_folder.latest_checkpoint(mirror) is None


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    save(tmp_path, Memory(a=1.0), step=1, identity={})
    before = tree(tmp_path)
    for name in (".step-000002.partial", ".step-000001.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors").write_text("half")
    run_folder.remove_leftovers(tmp_path)
    assert tree(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 2
