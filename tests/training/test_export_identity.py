"""An export is the model that was trained, whatever the config says by now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import TrainConfig, load_config
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.run_folder import RunDir
from pipeline.training.run_identity import run_identity


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Path:
    """A run with one checkpoint, of which only the state is read."""
    config = load_config(TrainConfig, recipe, (f"output_dir={tmp_path / 'run'}",))
    checkpoints = RunDir(config.output_dir).checkpoints
    (checkpoints / "step-000002").mkdir(parents=True)
    (checkpoints / "latest").write_text("step-000002\n")
    state = {
        "format_version": 1,
        "step": 2,
        "optimizer_steps": 2,
        "world_size": 1,
        "identity": run_identity(config, Dataset.open(config.data.path)),
        "parameters": [],
        "extra": {},
        "files": {},
    }
    (checkpoints / "step-000002" / "state.json").write_text(json.dumps(state))
    return Path(config.output_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.pooling=last_token", "model.pooling is 'last_token'.*allowed: 'mean'"),
        ("model.normalize=false", "model.normalize is False"),
        ("model.attention=causal", "model.attention is 'causal'"),
        ("model.dimensions=8", "model.dimensions is 8.*allowed: None"),
        ("model.pool_instruction=false", "model.pool_instruction is False"),
        ("loss.similarity=dot", "loss.similarity is 'dot'"),
    ],
)
def test_an_export_of_another_model_than_was_trained_is_refused(
    recipe: Path, run: Path, change: str, message: str
) -> None:
    command = ["export", str(recipe), f"output_dir={run}", change, "--no-check"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError), result.output
    assert result.exception.exit_code == 2
    with pytest.raises(UserError, match=message):
        raise result.exception
    assert not (run / "export").exists()


def test_what_decides_no_vector_may_change(recipe: Path, run: Path) -> None:
    changes = ["model.dtype=float32", "model.gradient_checkpointing=true", "seed=7"]
    command = ["export", str(recipe), f"output_dir={run}", *changes, "--no-check"]
    result = CliRunner().invoke(app, command)
    # It goes as far as the weights, of which this checkpoint has none.
    assert "lacks" in str(result.exception)
