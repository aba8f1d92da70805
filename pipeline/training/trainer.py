"""A training run from its config to its last checkpoint, resumable at every step boundary."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NoReturn

from pipeline import comm
from pipeline.config import TrainConfig, as_tree, dump_config
from pipeline.data.batch import GlobalBatch
from pipeline.data.loader import Loader
from pipeline.data.prepare import tokenizer_fingerprint
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import make_loader
from pipeline.errors import DiffembedError, Stopped, UserError
from pipeline.loss.contrastive import check_loss
from pipeline.model.language import build_model
from pipeline.run_dir import RunDir, describe_environment, write_json, write_text
from pipeline.tokenizer import load_tokenizer
from pipeline.training import checkpoint
from pipeline.training.agreement import (
    Agreement,
    ChunkOutOfMemoryError,
    StepGivenUpError,
)
from pipeline.training.evaluations import Evaluations
from pipeline.training.metrics import JsonLines, Progress, Tracker, open_trackers
from pipeline.training.objective import Objective, make_objective
from pipeline.training.optim import build_optimizer, learning_rate
from pipeline.training.retention import Keeper
from pipeline.training.saving import Saver, remove_leftovers
from pipeline.training.signals import StopRequest
from pipeline.training.step import (
    NonFiniteLossError,
    seed_random,
)
from pipeline.training.zero import ZeroEngine, placement_of

# What may change when a run is resumed; everything else would make it another run.
_FREE_KEYS = (
    "output_dir",
    "num_steps",
    "checkpoint",
    "evaluate",
    "chunks",
    "schedule",
    "log_every",
    "non_finite",
    "trackers",
)


def train(config: TrainConfig, ds_config: dict[str, Any], world: comm.World) -> None:
    """Train until `num_steps`, from the newest checkpoint if there is one.

    Raises:
        UserError: data, checkpoint and config do not belong together.
        Stopped: asked to stop; a checkpoint was written.
    """
    run = RunDir(config.output_dir)
    stop = StopRequest(run.stop_request, launched=world.launched)
    evaluations = Evaluations(config, config.evaluate) if config.evaluate else None
    dataset = open_dataset(config, verify=world.is_main)
    loader = make_loader(dataset, config, rank=world.rank, world_size=world.world_size)
    objective = make_objective(config, dataset)
    comm.start(world)
    comm.on_main(lambda: _prepare(run, config.checkpoint.mirror))
    newest = _newest_checkpoint(run, config.checkpoint.mirror)
    if newest and checkpoint.read_state(newest)["step"] >= config.num_steps:
        _say(f"{run.root}: finished, {newest.name} is its last checkpoint")
        return
    identity = run_identity(config, dataset)
    training = Training(
        config,
        ds_config,
        run,
        stop,
        objective=objective,
        evaluations=evaluations,
        identity=identity,
    )
    check_loss(
        config.loss,
        width=training.engine.encoder.num_dimensions,
        has_scores=dataset.manifest.has_scores,
    )
    step = training.resume(newest) if newest else 0
    # After the checks of resuming: a refused run leaves the folder as it was.
    training.describe(ds_config)
    loader.load_state_dict({**loader.state_dict(), "step": step})
    training.loop(loader, first_step=step)


def _prepare(run: RunDir, mirror: Path | None) -> None:
    """Take the run's folder over from whoever worked in it before; rank 0 only."""
    run.claim()
    remove_leftovers(run.checkpoints)
    if mirror is None:
        return
    try:
        mirror.mkdir(parents=True, exist_ok=True)
        remove_leftovers(mirror)
    except OSError as error:
        raise UserError(
            f"checkpoint.mirror: {error}", allowed="a folder that this machine can write to"
        ) from error


def _newest_checkpoint(run: RunDir, mirror: Path | None) -> Path | None:
    """The run's own, or where its folder holds none the one on slower storage."""
    newest = checkpoint.latest(run.checkpoints)
    return newest or (checkpoint.latest(mirror) if mirror else None)


def open_dataset(config: TrainConfig, *, verify: bool) -> Dataset:
    """Open the shards and make sure that they are the model's.

    Args:
        config: where the shards and the model are.
        verify: read every shard again and compare its hash; a flipped bit may still be a token.

    Raises:
        UserError: a shard is damaged, or was made with another tokenizer than the model's.
    """
    dataset = Dataset.open(config.data.path, verify=verify)
    path = config.model.path
    dataset.require_tokenizer(tokenizer_fingerprint(load_tokenizer(path)), path)
    return dataset


class Training:
    """What lives as long as the run: model, engine, objective, and where they are saved."""

    def __init__(
        self,
        config: TrainConfig,
        ds_config: dict[str, Any],
        run: RunDir,
        stop: StopRequest,
        *,
        objective: Objective,
        evaluations: Evaluations | None,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.run, self._identity = config, run, identity
        self.objective = objective
        self._stop_request, self._agreement = stop, Agreement(lambda: bool(stop.reason()))
        seed_random(config.seed)  # a fresh adapter starts alike on every rank
        model = build_model(config, placement=placement_of(ds_config))
        self.engine = ZeroEngine(model, build_optimizer(model, config.optimizer), ds_config)
        self._evaluations = evaluations
        self._saver = Saver(run.checkpoints)
        self._keeper = Keeper(run.checkpoints, config.checkpoint)
        self._saved_step = 0  # of the newest checkpoint, whole or on its way

    def resume(self, path: Path) -> int:
        """Load a checkpoint; returns the next step."""
        step, extra = checkpoint.load(path, self.engine, self._identity)
        self.objective.load_state_dict(extra)
        self._saved_step = step
        if comm.rank() == 0 and path.parent == self.run.checkpoints:
            self._after_checkpoint(path, step)  # what follows may be what was interrupted
        _say(f"resuming {self.run.root} at step {step} of {self.config.num_steps}, from {path}")
        return step

    def save(self, step: int) -> Path:
        """Make sure that the state after `step` steps is on disk, the mirror's included."""
        if self._saved_step != step:
            self._begin_save(step)
        if self._saver.is_pending:
            self._finish_save()
        if comm.rank() == 0:
            self._keeper.wait()
        return self.run.checkpoints / checkpoint.name_of(step)

    def _begin_save(self, step: int) -> None:
        """Start a checkpoint; training goes on while it is written."""
        if self._saver.is_pending:  # one at a time, or host memory would hold several
            self._finish_save()
        self._saver.begin(
            self.engine,
            step=step,
            identity=self._identity,
            extra=self.objective.state_dict(),
        )
        self._saved_step = step

    def _finish_save(self) -> None:
        """Let the checkpoint on its way appear, and see to what follows from it."""
        path = self._saver.finish()
        if comm.rank() == 0:
            self._after_checkpoint(path, self._saved_step)

    def _after_checkpoint(self, path: Path, step: int) -> None:
        """What follows once a checkpoint is whole and `latest` names it; rank 0 only.

        Training waits for it: long work belongs in the background. Those who need the files of
        `path` for longer come first and keep links to them, because the keeper deletes.

        Args:
            path: the checkpoint.
            step: finished optimizer steps.
        """
        if self._evaluations:
            self._evaluations.start(path, step)
        self._keeper.keep(path, step)

    def describe(self, ds_config: dict[str, Any]) -> None:
        """Write what the run is into its folder."""
        if comm.rank() == 0:
            write_text(self.run.config, dump_config(self.config))
            write_json(self.run.ds_config, ds_config)
            environment = {**describe_environment(), "world_size": comm.world_size()}
            write_json(self.run.environment, environment)

    def loop(self, loader: Loader, *, first_step: int) -> None:
        """Run the steps that are left.

        Raises:
            Stopped: asked to stop; a checkpoint was written.
        """
        config, trackers = self.config, self._trackers(first_step)
        for batch in loader:
            began = time.perf_counter()
            try:
                values = self._fitting_step(batch, loader)
            except StepGivenUpError:
                self._stop(batch.step)
            done = batch.step + 1
            last = done == config.num_steps
            if done % config.log_every == 0 or last:
                for tracker in trackers:
                    tracker.log(batch.step, values)
            if last:
                _say(f"done: {self.save(done)}")
                return
            # One collective call for all that a step's end decides.
            wanted, writing, seconds = comm.max_over_ranks(
                bool(self._stop_request.reason()),
                self._saver.is_writing,
                time.perf_counter() - began,
            )
            if wanted:
                self._stop(done)
            if self._saver.is_pending and not writing:
                self._finish_save()
            if done % config.checkpoint.every == 0:
                self._begin_save(done)
            self._agreement.end_step(seconds)

    def _stop(self, done: int) -> NoReturn:
        """Save and leave, after `done` finished steps; on all ranks alike."""
        reason = self._stop_request.agreed_reason()
        path = self.save(done)
        self._stop_request.clear()
        raise Stopped(
            f"{reason} after step {done} of {self.config.num_steps}; saved {path}, "
            f"run the same command to resume"
        )

    def _fitting_step(self, batch: GlobalBatch, loader: Loader) -> dict[str, float]:
        """One step, cut into smaller chunks on all ranks as often as one rank lacks memory.

        Raises:
            DiffembedError: a single text does not fit, or the schedule keeps all graphs.
        """
        while True:
            try:
                return self.step(batch)
            except ChunkOutOfMemoryError as error:
                largest = max(batch.chunks, key=lambda chunk: len(chunk.input_ids))
                sizes = comm.all_gather_object((len(largest.input_ids), len(largest.lengths)))
                tokens, rows = max(sizes)
                if rows == 1 or self.config.schedule == "plain":
                    cure = "schedule to cache or sweep, " if self.config.objective is None else ""
                    raise DiffembedError(
                        f"{error}: {tokens} tokens in {rows} texts; set {cure}"
                        f"gradient_checkpointing, or a smaller max_document_length"
                    ) from error
                # A batch that was planned ahead may still have the size that failed before.
                loader.max_chunk_tokens = min(loader.max_chunk_tokens, tokens // 2)
                _say(f"{error}: {tokens} tokens; going on with {loader.max_chunk_tokens} a chunk")
                batch = loader.batch(batch.step)

    def step(self, batch: GlobalBatch) -> dict[str, float]:
        """One optimizer step; returns its numbers, the same on every rank but for times."""
        began = time.perf_counter()
        config = self.config
        try:
            values = self.objective.accumulate(self.engine, batch, self._agreement)
        except NonFiniteLossError as error:
            return self._non_finite(batch, str(error), {"texts": error.texts})
        lr = learning_rate(batch.step, config.optimizer, config.num_steps)
        grad_norm = self.engine.step(lr)
        if not math.isfinite(grad_norm):
            return self._non_finite(batch, f"gradient norm is {grad_norm}", {})
        self.objective.update(lr)
        seconds = time.perf_counter() - began
        return {
            **values,
            "lr": lr,
            "grad_norm": grad_norm,
            "chunks": len(batch.chunks),
            "documents": batch.num_documents,
            "tokens": batch.tokens,
            "seconds": seconds,
            "tokens_per_second": batch.tokens / seconds,
        }

    def _non_finite(
        self, batch: GlobalBatch, what: str, details: dict[str, Any]
    ) -> dict[str, float]:
        """Leave the step out, or end the run; loss and norm are global, so all ranks do the same.

        Raises:
            DiffembedError: the policy is to stop; a dump names the batch and the broken texts.
        """
        if self.config.non_finite == "skip":
            _say(f"step {batch.step}: {what}; left out")
            return {"loss": math.nan, "lr": 0.0, "skipped": 1, "tokens_per_second": 0.0}
        dump = self.run.root / f"non-finite-step-{batch.step}-rank-{comm.rank()}.json"
        examples = batch.example_ids.tolist()
        write_json(dump, {"what": what, **details, "example_ids": examples})
        comm.barrier()  # the first rank to leave ends the others; all dumps come before
        raise DiffembedError(
            f"{what} at step {batch.step}; the weights are as before it, the batch is in {dump}; "
            f"lower optimizer.lr, raise loss.temperature, or set non_finite: skip"
        )

    def _trackers(self, first_step: int) -> list[Tracker]:
        if comm.rank() != 0:
            return []
        run, config = self.run, self.config
        return [
            JsonLines(run.metrics, first_step),
            Progress(first_step, config.num_steps),
            *open_trackers(config.trackers, run_dir=run.root, config=as_tree(config)),
        ]


def run_identity(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """What a run and its checkpoints must agree on, as flat `key.sub: value`."""
    tree = as_tree(config)
    for key in _FREE_KEYS:
        tree.pop(key)
    for key in ("path", "prefetch"):
        tree["data"].pop(key)
    # The same shards in another folder are the same data.
    tree["data"]["fingerprint"] = dataset.fingerprint
    return _flatten(tree)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _say(text: str) -> None:
    if comm.rank() == 0:
        print(text, flush=True)
