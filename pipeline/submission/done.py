"""Decide which stages of an experiment are done: by their inputs, never by times of files.

config, inputs ──> shards ──> run ──> export ──> scores ──> report
     recipe        identity   checkpoint's     fingerprints   results'
                              digest                          digest
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig, PrepareConfig, TrainConfig, as_tree
from pipeline.errors import UserError
from pipeline.evaluation.score.results import changed_inputs, read_result, results_digest
from pipeline.evaluation.tasks.elements import list_elements
from pipeline.model.parts import SETTINGS, is_export
from pipeline.run_dir import RunDir, checkpoint_digest, read_latest


def is_prepared(config: PrepareConfig) -> bool:
    """True when the shards are there, made from this very config and these inputs.

    Raises:
        UserError: other shards are there.
    """
    # Inside, because it imports pyarrow.
    from pipeline.data.building.recipe import prepare_status

    status = prepare_status(config)
    if status == "other":
        raise UserError(
            f"output_dir: {config.output_dir} holds shards that were made from another config or "
            f"other inputs",
            fix="`diffembed prepare` says what differs; choose another output_dir, or remove it",
        )
    return status == "whole"


def require_resumable(config: TrainConfig) -> None:
    """Refuse a config whose run folder holds checkpoints of another one.

    Raises:
        UserError: names the first key that differs.
    """
    from pipeline.data.manifest import FILE_NAME
    from pipeline.data.shards import Dataset
    from pipeline.training.run_identity import require_same_run, run_identity

    checkpoints = RunDir(config.output_dir).checkpoints
    newest = checkpoints / (read_latest(checkpoints) or "")
    # Without its shards a finished run is compared by its config alone.
    if not (newest / "state.json").is_file() or not (config.data.path / FILE_NAME).is_file():
        return
    with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: training says what to do
        state = json.loads((newest / "state.json").read_text())
        found = {"step": state.get("step", 0), "identity": dict(state["identity"])}
        # The weights are compared where they are loaded.
        wanted = run_identity(config, Dataset.open(config.data.path, verify=False))
        require_same_run(newest, found, wanted)


def require_shards(config: TrainConfig) -> None:
    """Refuse shards that are missing or of another tokenizer than the model's.

    A model that only the compute nodes can load is checked there.

    Raises:
        UserError: training would refuse them.
    """
    from pipeline.data.shards import Dataset
    from pipeline.data.tokens import tokenizer_fingerprint
    from pipeline.tokenizer import load_model_tokenizer

    dataset = Dataset.open(config.data.path, verify=False)
    path = config.model.path
    try:
        tokenizer = load_model_tokenizer(path)
    except UserError:
        if Path(path).is_dir():
            raise
        return
    dataset.require_tokenizer(tokenizer_fingerprint(tokenizer), path)


def is_exported(config: TrainConfig, checkpoint: str, output: Path) -> bool:
    """True when a folder is the export of this checkpoint with the settings of this config."""
    weights = any(output.glob("*.safetensors"))
    if not weights or not is_export(output):
        return False
    made: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        made = json.loads((output / SETTINGS).read_text())
    if not isinstance(made, dict) or made.get("model") != as_tree(config.model):
        return False
    if checkpoint == "init":
        return made.get("checkpoint") is None
    checkpoints = RunDir(config.output_dir).checkpoints
    name = read_latest(checkpoints) if checkpoint == "latest" else checkpoint
    path = checkpoints / (name or "")
    # Of a checkpoint that was pruned, the export is what is left.
    return not (path / "state.json").is_file() or made.get("checkpoint") == checkpoint_digest(path)


def unscored(config: EvaluateConfig) -> tuple[int, ...]:
    """Numbers of the elements without valid scores.

    Raises:
        UserError: an export is missing.
    """
    results = ((element, read_result(element)) for element in list_elements(config))
    return tuple(
        element.index
        for element, result in results
        if changed_inputs(config, element, result or {})
    )


def is_reported(config: EvaluateConfig) -> bool:
    """True when the report is made of the very scores that are there."""
    report = RunDir(config.output_dir).report / "report.json"
    if not report.is_file():
        return False
    with contextlib.suppress(ValueError, AttributeError):
        digest: object = json.loads(report.read_text()).get("results_digest")
        return digest == results_digest(config)
    return False
