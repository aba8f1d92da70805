"""Checkpoints are whole or absent, and a resumed run is the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import run_folder
from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.training import checkpoints
from tests.support import launch_ranks
from tests.training.memory_engine import Memory, save

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def _lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, _lines(launch_ranks(2, WORKER, str(folder), "save"))


def test_resuming_at_the_same_stage_and_world_size_is_bit_equal(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    wanted = {
        (r["dtype"], r["stage"]): r["norms"] for r in trained[1] if r["kind"] == "uninterrupted"
    }
    resumed = [r for r in trained[1] if r["kind"] == "resumed" and r["saved"] == r["stage"]]
    assert len(wanted) == len(resumed) == 6
    for result in resumed:
        assert result["norms"] == wanted[result["dtype"], result["stage"]], result


def test_resuming_at_another_stage_or_world_size_keeps_the_optimizer(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, saved = trained
    one_rank = _lines(launch_ranks(1, WORKER, str(folder), "load"))
    wanted = {(r["dtype"], r["stage"]): r["norms"] for r in saved if r["kind"] == "uninterrupted"}
    resumed = [r for r in saved if r["kind"] == "resumed"] + one_rank
    assert len(resumed) == 2 * 18
    for result in resumed:
        # bf16 rounds every rank's gradient before the reduction, so the rank count shows.
        tolerance = 1e-6 if result["dtype"] == "float32" else 2e-3
        expected = wanted[result["dtype"], result["saved"]]
        assert result["norms"] == pytest.approx(expected, rel=tolerance), result


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "half a state", "shortened"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, Memory(a=1.0), step=1, identity={})
    path = save(folder, Memory(a=1.0), step=2, identity={})
    (file,) = path.glob("*.safetensors")
    if damage == "flipped byte":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing file":
        file.unlink()
    elif damage == "half a state":
        text = (path / "state.json").read_text()
        (path / "state.json").write_text(text[: len(text) // 2])
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="step-000002") as error:
        checkpoints.load(path, Memory(a=0.0), {})
    assert f"diffembed rewind {tmp_path} step-000001" in str(error.value)


def test_a_run_with_another_setting_is_not_resumed(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "checkpoints", Memory(a=1.0), step=1, identity={"seed": 1})
    with pytest.raises(UserError, match=r"seed is 2 \| allowed: 1, which the run .* started with"):
        checkpoints.load(path, Memory(a=0.0), {"seed": 2})


def test_a_model_with_other_parameters_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, Memory(a=1.0, b=1.0), step=1, identity={})
    with pytest.raises(UserError, match="differ in 1 parameters, first b"):
        checkpoints.load(path, Memory(a=0.0), {})


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, Memory(a=1.0), step=1, identity={})
    text = (path / "state.json").read_text()
    write_text(path / "state.json", text.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="format 9"):
        checkpoints.load(path, Memory(a=0.0), {})


def test_a_run_continues_from_an_older_checkpoint_only_where_the_user_says_so(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(folder, Memory(a=float(step)), step=step, identity={})
    (folder / "step-000003" / "state.json").unlink()
    newest = run_folder.latest_checkpoint(folder)
    assert newest is not None
    with pytest.raises(UserError, match=r"step-000003.*diffembed rewind .* step-000002"):
        checkpoints.load(newest, Memory(a=0.0), {})
    done = CliRunner().invoke(app, ["rewind", str(tmp_path), "step-000002"])
    assert done.exit_code == 0, done.output
    older, engine = run_folder.latest_checkpoint(folder), Memory(a=0.0)
    assert older == folder / "step-000002"
    assert checkpoints.load(older, engine, {}) == (2, {})
    assert engine.state["a"]["weight"].tolist() == [2.0, 2.0]
    assert run_folder.checkpoint_names(folder) == ["step-000001", "step-000002", "step-000003"]
