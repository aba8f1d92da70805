"""An export is the model that was trained, even if the config has changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import TrainConfig, load_config
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.model.encoder import build_model
from pipeline.model.weights import model_digests_here
from pipeline.run_folder import RunDir, describe_file
from pipeline.training.checkpoints import KEYS
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


def trained(recipe: Path, folder: Path, *changes: str) -> tuple[list[str], Path]:
    """A run whose checkpoint holds weights: the command that exports it, and its base model."""
    base = folder / "base"
    shutil.copytree(load_config(TrainConfig, recipe).model.path, base)
    words = [str(recipe), f"output_dir={folder / 'run'}", f"model.path={base}", *changes]
    config = load_config(TrainConfig, recipe, tuple(words[1:]))
    path = RunDir(config.output_dir).checkpoints / "step-000002"
    path.mkdir(parents=True)
    path.with_name("latest").write_text(f"{path.name}\n")
    parameters = {n: p for n, p in build_model(config).named_parameters() if p.requires_grad}
    tensors = {
        f"{name}/{key}": (parameter + 0.01).detach().contiguous()
        for name, parameter in parameters.items()
        for key in KEYS
    }
    save_file(tensors, path / "part.safetensors")
    state = {
        "format_version": 1,
        "step": 2,
        "optimizer_steps": 2,
        "world_size": 1,
        "identity": run_identity(
            config, Dataset.open(config.data.path), model_digests_here(config.model)
        ),
        "parameters": list(parameters),
        "extra": {},
        "files": {"part.safetensors": describe_file(path / "part.safetensors")},
    }
    (path / "state.json").write_text(json.dumps(state))
    return ["export", *words, "--no-check"], base


def change_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})


def test_other_weights_of_the_base_do_not_matter_where_all_of_them_were_trained(
    recipe: Path, tmp_path: Path
) -> None:
    command, base = trained(recipe, tmp_path)
    exports = [tmp_path / "before", tmp_path / "after"]
    for output in exports:
        result = CliRunner().invoke(app, [*command, "--output", str(output)])
        assert result.exception is None, result.output
        said = "model.safetensors changed since the run started; not needed"
        assert (said in result.output) == (output == exports[1])
        change_weights(base)
    before, after = (load_file(output / "model.safetensors") for output in exports)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.1}))
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "other")])
    with pytest.raises(UserError, match=r"model.path: config.json, model.safetensors changed"):
        raise result.exception or AssertionError


def test_other_weights_of_the_base_are_refused_where_an_adapter_was_trained(
    recipe: Path, tmp_path: Path
) -> None:
    command, base = trained(recipe, tmp_path, "model.lora.rank=4")
    change_weights(base)
    result = CliRunner().invoke(app, command)
    with pytest.raises(UserError, match=r"model.path: model.safetensors changed since"):
        raise result.exception or AssertionError
