"""Decide which stages of an experiment are left to do, and the jobs that each one waits for.

config, inputs ──> shards ──> run ──> export ──> scores ──> report
     recipe        identity   checkpoint's     fingerprints   results'
                              digest                          digest

    prepare [──> mine] ──> train ──> export ──> evaluate (array) ──────────────────────> report
                                └──> evaluate-plan ──> -embed (array) ──> -score ──┘

The upper picture shows how a finished stage is recognised: by hashes of its inputs, never by times
of files. Only configs and files are read here, not Slurm's queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline.config import (
    ChainConfig,
    EvaluateConfig,
    ExportStep,
    MineConfig,
    ModelConfig,
    PrepareConfig,
    TrainConfig,
    as_tree,
    load_config,
)
from pipeline.errors import UserError
from pipeline.evaluation.results import changed_inputs, read_result, results_digest
from pipeline.evaluation.tasks import list_elements
from pipeline.files import short_hash
from pipeline.model.export_folder import SETTINGS, is_export
from pipeline.run_folder import (
    RunDir,
    checkpoint_digest,
    frozen_config,
    is_checkpoint,
    latest_name,
    latest_step,
    read_state,
)
from pipeline.shipped_files import find_shipped
from pipeline.submission.jobs import Job
from pipeline.submission.serving import describe_synthesis


def is_prepared(config: PrepareConfig) -> bool:
    """Return True if the shards exist and were made from this config and these inputs.

    Raises:
        UserError: the folder holds other shards.
    """
    # Inside, because it imports pyarrow.
    from pipeline.data.prepare.recipe import prepare_status

    status = prepare_status(config)
    if status == "other":
        raise UserError(
            f"output_dir: {config.output_dir} holds shards that were made from another config or "
            f"other inputs",
            fix="`diffembed prepare` prints the difference; choose another output_dir, or delete "
            "this one",
        )
    return status == "whole"


def require_resumable(config: TrainConfig) -> None:
    """Refuse a config whose run folder holds checkpoints of another one, as training would.

    Raises:
        UserError: names the first key that differs, or the file of the model that changed.
    """
    from pipeline.data.shards import Dataset
    from pipeline.training.run_identity import require_same_run, run_identity

    checkpoints = RunDir(config.output_dir).checkpoints
    # Without a name this is the folder of checkpoints, which is none itself.
    newest = checkpoints / (latest_name(checkpoints) or "")
    if not is_checkpoint(newest):
        return
    try:
        state = read_state(newest)
    except UserError:
        return  # damaged: training names the cure
    # A finished run needs its shards no more; they may have been removed.
    path = config.data.path
    dataset = Dataset.open(path, verify=False) if Dataset.exists(path) else None
    require_same_run(newest, state, run_identity(config, dataset, _local_digests(config.model)))


def _local_digests(model: ModelConfig) -> dict[str, str] | None:
    """Digests of a model's files; None for a model of the hub, which jobs compare as they load."""
    folders = [model.path, *model.all_merged, *([model.adapter] if model.adapter else [])]
    if not all(Path(folder).is_dir() for folder in folders):
        return None
    # Inside, because it imports torch.
    from pipeline.model.weights import model_digests_here

    return model_digests_here(model)


def require_shards(config: TrainConfig) -> None:
    """Refuse missing shards, and shards made with another tokenizer than the model's.

    A model that only the compute nodes can load is checked by the job.

    Raises:
        UserError: training would refuse them.
    """
    from pipeline.data.shards import Dataset
    from pipeline.tokenizer import load_model_tokenizer, tokenizer_fingerprint

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
    """Return True if a folder is the export of this checkpoint with this config's settings."""
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
    name = latest_name(checkpoints) if checkpoint == "latest" else checkpoint
    path = checkpoints / (name or "")
    # The export of a pruned checkpoint is all that is left of it.
    return not is_checkpoint(path) or made.get("checkpoint") == checkpoint_digest(path)


def unscored_elements(config: EvaluateConfig) -> tuple[int, ...]:
    """Return the numbers of the elements without valid scores.

    Raises:
        UserError: an export is missing.
    """
    results = ((element, read_result(element)) for element in list_elements(config))
    # Of an element without a result every input counts as changed.
    return tuple(
        element.index
        for element, result in results
        if changed_inputs(config, element, result or {})
    )


def is_reported(config: EvaluateConfig) -> bool:
    """Return True if the report was made from the current scores."""
    report = RunDir(config.output_dir).report / "report.json"
    if not report.is_file():
        return False
    # Damaged, or JSON without keys: written again.
    with contextlib.suppress(ValueError, AttributeError):
        digest: object = json.loads(report.read_text()).get("results_digest")
        return digest == results_digest(config)
    return False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """Jobs in the order of their submission, and a line for each finished stage."""

    jobs: tuple[Job, ...] = ()
    finished: tuple[str, ...] = ()

    def then(self, other: Chain) -> Chain:
        """Return both chains, the first jobs of `other` waiting for the last of this one."""
        waited_for = {name for job in self.jobs for name in job.after}
        last = tuple(job.name for job in self.jobs if job.name not in waited_for)
        later = tuple(
            job if job.after else dataclasses.replace(job, after=last) for job in other.jobs
        )
        return Chain(jobs=self.jobs + later, finished=self.finished + other.finished)


def synthesize_chain(config: Path, overrides: tuple[str, ...] = ()) -> Chain:
    """Return the job that writes training rows with a language model.

    Raises:
        UserError: the config is wrong, here and in all functions below.
    """
    synthesis = describe_synthesis((str(config), *overrides))
    if synthesis.rows is not None:
        line = f"synthesize: {synthesis.output_dir} has all of its {synthesis.rows} rows"
        return Chain(finished=(line,))
    folder = RunDir(synthesis.output_dir).jobs
    path = folder / f"synthesize-{short_hash(synthesis.config)}.yaml"
    job = _exclusive_job("synthesize", folder, {path: synthesis.config}, str(path))
    return Chain(jobs=(job,))


def _exclusive_job(name: str, folder: Path, files: dict[Path, str], *arguments: str) -> Job:
    """Return the one job of a stage that reads frozen files; no other may write its folder."""
    return Job(
        name=name,
        script=f"{name}.sbatch",
        flags=f"{name.upper()}_FLAGS",
        folder=folder,
        arguments=arguments,
        files=files,
        exclusive=True,
    )


def prepare_chain(
    config: Path, overrides: tuple[str, ...] = (), *, rows_follow: bool = False
) -> Chain:
    """Return the job that builds the shards.

    Args:
        config: of the shards.
        overrides: changes to it.
        rows_follow: an earlier job writes the rows, so existing shards are of others.
    """
    tree = load_config(PrepareConfig, config, overrides)
    # Next to the shards: `prepare` refuses a folder that holds anything else.
    folder = tree.output_dir.with_name(f"{tree.output_dir.name}-jobs")
    path, files = frozen_config(folder, "prepare", tree)
    job = _exclusive_job("prepare", folder, files, str(path))
    # `prepare` would refuse other shards too, but only after waiting in the queue.
    if is_prepared(tree) and not rows_follow:
        return Chain(finished=(f"prepare: {tree.output_dir} is whole",))
    return Chain(jobs=(job,))


def mine_chain(
    config: Path, overrides: tuple[str, ...] = (), *, shards_follow: bool = False
) -> Chain:
    """Return the job that mines hard negatives.

    Args:
        config: of the mining.
        overrides: changes to it.
        shards_follow: an earlier job makes the shards; if not, they must exist.
    """
    tree = load_config(MineConfig, config, overrides)
    # Next to the shards, as for `prepare`.
    folder = tree.output.with_name(f"{tree.output.name}-jobs")
    path, files = frozen_config(folder, "mine", tree)
    if not shards_follow:
        # Inside, because it imports torch.
        from pipeline.mining.plan import is_mined

        if is_mined(tree):
            return Chain(finished=(f"mine: {tree.output} is whole",))
    job = _exclusive_job("mine", folder, files, str(path))
    return Chain(jobs=(job,))


def train_chain(
    config: Path, overrides: tuple[str, ...], deepspeed: Path, *, shards_follow: bool = False
) -> Chain:
    """Return the job that trains, restarted as often as needed.

    Args:
        config: of the training run.
        overrides: changes to it.
        deepspeed: its DeepSpeed JSON.
        shards_follow: an earlier job makes the shards; if not, they must exist.

    Raises:
        UserError: the run has checkpoints of another config, or the shards are missing or made
            with another tokenizer.
    """
    tree = load_config(TrainConfig, config, overrides)
    done = latest_step(RunDir(tree.output_dir).checkpoints)
    require_resumable(tree)
    if done >= tree.num_steps:
        return Chain(finished=(f"train: {tree.output_dir} has all of its {done} steps",))
    if not shards_follow:
        require_shards(tree)
    folder = RunDir(tree.output_dir).jobs
    path, files = frozen_config(folder, "train", tree)
    engine = _read_deepspeed(deepspeed)
    engine_path = folder / f"deepspeed-{short_hash(engine)}.json"
    files[engine_path] = engine
    job = _exclusive_job("train", folder, files, str(path), "--deepspeed", str(engine_path))
    return Chain(jobs=(job,))


def export_chain(
    config: Path, overrides: tuple[str, ...], steps: tuple[ExportStep, ...], *, ready: bool = True
) -> Chain:
    """Return the jobs that make exports of a run.

    Args:
        config: of the training run.
        overrides: changes to it.
        steps: checkpoint and folder of each export.
        ready: no earlier job trains; otherwise, existing exports will be stale.
    """
    tree = load_config(TrainConfig, config, overrides)
    path, files = frozen_config(RunDir(tree.output_dir).jobs, "train", tree)
    jobs, finished = [], []
    for step in steps:
        name, run = f"export-{step.checkpoint}", RunDir(tree.output_dir)
        output = step.output or run.export
        # No training changes the export of the untrained model.
        if (ready or step.checkpoint == "init") and is_exported(tree, step.checkpoint, output):
            finished.append(f"{name}: {output} exists")
            continue
        jobs.append(
            Job(
                name=name,
                script="export.sbatch",
                flags="CPU_FLAGS",
                folder=path.parent,
                arguments=(str(path), "--checkpoint", step.checkpoint, "--output", str(output)),
                files=files,
            )
        )
    return Chain(jobs=tuple(jobs), finished=tuple(finished))


def evaluate_chain(
    config: Path,
    overrides: tuple[str, ...] = (),
    *,
    text_elements: int | None = None,
    ready: bool = True,
) -> Chain:
    """Return the jobs that score exports and report.

    Args:
        config: of the evaluation.
        overrides: changes to it.
        text_elements: share the texts of all tasks among this many elements of an array; None: one
            element for each model, task and length.
        ready: the exports exist; if not, existing scores may be stale.

    Raises:
        UserError: the config is wrong, or an export is missing although `ready`.
    """
    tree = load_config(EvaluateConfig, config, overrides)
    folder = RunDir(tree.output_dir).jobs
    path, files = frozen_config(folder, "evaluate", tree)
    left = unscored_elements(tree) if ready else tuple(range(len(list_elements(tree))))
    # Waits for nothing yet: it is the whole chain where only the report is stale.
    report = _report(tree)
    if not left:
        line = f"evaluate: all {len(list_elements(tree))} elements of {tree.output_dir} are scored"
        return Chain(jobs=() if is_reported(tree) else (report,), finished=(line,))
    common: dict[str, Any] = {"script": "evaluate.sbatch", "folder": folder, "files": files}
    gpu = {**common, "flags": "EVALUATE_FLAGS"}
    if text_elements is None:
        run = Job(name="evaluate", arguments=("run", str(path)), array=left, **gpu)
        report = dataclasses.replace(report, after=(run.name,), reports_failure=True)
        return Chain(jobs=(run, report))
    cpu = {**common, "flags": "CPU_FLAGS"}
    plan = Job(name="evaluate-plan", arguments=("plan", str(path)), **cpu)
    embed = Job(
        name="evaluate-embed",
        arguments=("embed", str(path), "--of", str(text_elements)),
        array=tuple(range(text_elements)),
        after=(plan.name,),
        **gpu,
    )
    score = Job(
        name="evaluate-score",
        arguments=("score", str(path)),
        after=(embed.name,),
        reports_failure=True,
        **cpu,
    )
    return Chain(jobs=(plan, embed, score, dataclasses.replace(report, after=(score.name,))))


def report_chain(config: Path, overrides: tuple[str, ...] = ()) -> Chain:
    """Return the job that reports the existing scores."""
    return Chain(jobs=(_report(load_config(EvaluateConfig, config, overrides)),))


def whole_chain(config: Path, overrides: tuple[str, ...] = ()) -> Chain:
    """Return all jobs of an experiment."""
    tree = load_config(ChainConfig, config, overrides)
    # Whether shards exist is then a question for the job that makes them.
    made = bool(tree.prepare or tree.mine)
    training = train_chain(tree.train, (), tree.deepspeed, shards_follow=made)
    chain = Chain()
    # A finished run does not need its shards any more.
    if tree.prepare and training.jobs:
        chain = synthesize_chain(tree.synthesize) if tree.synthesize else chain
        # A stage without jobs is finished, so the next one checks its files now.
        chain = chain.then(prepare_chain(tree.prepare, rows_follow=bool(chain.jobs)))
    if tree.mine and training.jobs:
        chain = chain.then(mine_chain(tree.mine, shards_follow=bool(chain.jobs)))
    exports = export_chain(tree.train, (), tree.exports, ready=not training.jobs)
    chain = chain.then(training).then(exports)
    if tree.evaluate:
        scores = evaluate_chain(
            tree.evaluate, text_elements=tree.text_elements, ready=not exports.jobs
        )
        chain = chain.then(scores)
    return chain


def _read_deepspeed(path: Path) -> str:
    found = find_shipped(path)
    if not found.is_file():
        raise UserError(f"{path}: no such file", fix="give the path of a DeepSpeed JSON")
    return found.read_text()


def _report(config: EvaluateConfig) -> Job:
    folder = RunDir(config.output_dir).jobs
    path, files = frozen_config(folder, "evaluate", config)
    return Job(
        name="report",
        script="report.sbatch",
        flags="CPU_FLAGS",
        folder=folder,
        arguments=(str(path),),
        files=files,
    )
