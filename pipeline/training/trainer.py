"""Run a training from its config to its last checkpoint, resumable at every step.

    train     checks without other ranks -> join -> claim the folder -> engine -> resume
    step      Objective.accumulate -> Engine.step -> Objective.update -> numbers
    boundary  agree over ranks: stop? checkpoint written? -> log, checkpoint, next step

Everything that one rank may find (a signal, a lack of memory, a loss that is not finite) is agreed
on before any rank acts on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NoReturn

import torch

from pipeline import comm, run_folder
from pipeline.config import TrainConfig, as_tree, dump_config, load_config
from pipeline.data.batch import GlobalBatch
from pipeline.data.loader import Loader
from pipeline.data.text_loader import data_warnings, make_loader, open_dataset
from pipeline.errors import DiffembedError, Stopped, UserError, say_line
from pipeline.files import write_json, write_text
from pipeline.launch import World
from pipeline.model.encoder import build_model, compile_layers, num_graphs, require_compiler
from pipeline.model.weights import model_digests
from pipeline.run_folder import OWN_CONFIG, RunDir, describe_environment
from pipeline.training.contrastive_step import Contrastive
from pipeline.training.engine import (
    Agreement,
    ChunkOutOfMemoryError,
    NonFiniteLossError,
    Objective,
    StepGivenUpError,
    build_optimizer,
    learning_rate,
    release_memory,
    seed_random,
)
from pipeline.training.evaluations import Evaluations, ScoringCommands
from pipeline.training.metrics import (
    Comparison,
    JsonLines,
    Progress,
    Tracker,
    open_trackers,
    require_trackers,
)
from pipeline.training.run_checkpoints import (
    RunCheckpoints,
    StopRequest,
    newest_checkpoint,
    take_over,
)
from pipeline.training.run_identity import require_same_run, run_identity
from pipeline.training.token_step import TokenPrediction
from pipeline.training.zero import ZeroEngine, placement_of

# Steps skipped in a row after which the run ends: the batches are not at fault.
_MOST_SKIPPED = 20


def train(
    config: TrainConfig,
    ds_config: dict[str, Any],
    world: World,
    *,
    scoring: ScoringCommands | None = None,
    predicted: Mapping[str, float] | None = None,
) -> None:
    """Train until `num_steps`, from the newest checkpoint if there is one.

    Args:
        config: the run.
        ds_config: a DeepSpeed config with every `auto` resolved.
        world: this rank among the others, which it joins here.
        scoring: command lines that score checkpoints; given where the config has `evaluate`.
        predicted: numbers of a step by key of its metrics, to be logged next to them.

    Raises:
        UserError: data, checkpoint and config do not belong together.
        Stopped: asked to stop; a checkpoint was written.
    """
    run = RunDir(config.output_dir)
    # First: a signal during the long start is a request too, and does not kill the process.
    stop = StopRequest(run.stop_request, launchers=world.launchers)
    evaluations = None
    if config.evaluate is not None:
        assert scoring is not None, "evaluate: no commands were given"
        evaluations = Evaluations(config, config.evaluate, scoring)
    # Checks that need no other rank come before joining: a faulty rank then ends at once.
    dataset = open_dataset(config, verify=world.is_main)
    loader = make_loader(dataset, config, rank=world.rank, world_size=world.world_size)
    warnings = data_warnings(loader, config)
    if config.evaluate is not None and config.num_steps < config.evaluate.every:
        warnings.append(
            f"evaluate.every: {config.evaluate.every}, but the run ends at step "
            f"{config.num_steps}: no checkpoint is scored"
        )
    objective = make_objective(config, loader)
    if config.compile:
        require_compiler(on_gpu=torch.cuda.is_available())
    comm.start(world)
    set_determinism(config.deterministic)
    # From here on, a check on one rank must raise on all (see comm.on_main).
    comm.on_main(lambda: require_trackers(config.trackers))
    comm.on_main(lambda: take_over(run, config.checkpoint.mirror))
    newest = comm.on_main(lambda: newest_checkpoint(run, config.checkpoint.mirror))
    identity = run_identity(config, dataset, model_digests(config.model))
    # Before the model is loaded: a finished run, or another run's checkpoint, is known in seconds.
    if newest and _is_finished(newest, run, config, identity):
        return
    for warning in warnings:
        _say(warning)
    training = Training(
        config,
        ds_config,
        run,
        stop,
        objective=objective,
        evaluations=evaluations,
        identity=identity,
        predicted=predicted or {},
    )
    config.loss.require_fit(
        width=training.engine.encoder.num_dimensions,
        has_scores=dataset.manifest.has_scores,
        has_vectors=dataset.manifest.teacher is not None,
    )
    _say(training.engine.encoder.describe_attention(comm.device()))
    if config.compile:
        _say(compile_layers(training.engine.encoder))
    step = training.checkpoints.resume(newest) if newest else 0
    if newest:
        _say(f"resuming {run.root} at step {step} of {config.num_steps}, from {newest}")
    # After the checks of resuming: a refused run leaves the folder as it was.
    comm.on_main(lambda: training.describe(ds_config, loader))
    # The order of data is a function of seed and step: the step is all of its state.
    loader.load_state_dict({**loader.state_dict(), "step": step})
    training.loop(loader, first_step=step)


def _is_finished(newest: Path, run: RunDir, config: TrainConfig, identity: dict[str, Any]) -> bool:
    """Return whether the run has made its last step, and print it.

    Raises:
        UserError: the checkpoint belongs to another run than the config, on all ranks.
    """

    def check() -> int:
        state = run_folder.read_state(newest)
        require_same_run(newest, state, identity)
        return state["step"]

    step = comm.on_main(check)
    if step > config.num_steps:
        raise UserError(
            f"num_steps: {config.num_steps}, but the run in {run.root} has made {step} steps",
            allowed=f"at least {step}",
            fix=f"set num_steps: {step}, `diffembed rewind {run.root} NAME` to an earlier "
            "checkpoint, or choose another output_dir",
        )
    if step == config.num_steps:
        _say(f"{run.root}: finished, {newest.name} is its last checkpoint")
    return step == config.num_steps


class Training:
    """The state of a run: model, engine and objective, its checkpoints and its logs."""

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
        predicted: Mapping[str, float],
    ) -> None:
        self.config, self.run, self.objective = config, run, objective
        self._predicted = predicted
        self._num_skipped = 0  # steps in a row
        self._stop_request, self._agreement = stop, Agreement(lambda: bool(stop.reason()))
        # Before the model is built: a new adapter or head must be the same on every rank.
        seed_random(config.seed)
        model = build_model(config, placement=placement_of(ds_config))
        self.engine = ZeroEngine(model, build_optimizer(model, config.optimizer), ds_config)
        self.checkpoints = RunCheckpoints(
            run,
            config.checkpoint,
            engine=objective.join_state(self.engine),
            objective=objective,
            identity=identity,
            evaluations=evaluations,
            in_a_hurry=stop.is_pending,
        )

    def describe(self, ds_config: dict[str, Any], loader: Loader) -> None:
        """Write config, DeepSpeed config, environment and kinds of batches into the folder.

        Rank 0 only.
        """
        if not _holds(self.run.config, self.config):  # a user may have added comments
            write_text(self.run.config, OWN_CONFIG + dump_config(self.config))
        write_json(self.run.ds_config, ds_config)
        environment = {**describe_environment(), "world_size": comm.world_size()}
        write_json(self.run.environment, environment)
        if kinds := loader.order.kinds:
            write_json(self.run.kinds, {name: unit.describe() for name, unit in kinds.items()})

    def loop(self, loader: Loader, *, first_step: int) -> None:
        """Run the remaining steps.

        Raises:
            Stopped: asked to stop; a checkpoint was written.
        """
        with ExitStack() as stack:
            trackers = [stack.enter_context(closing(t)) for t in self._trackers(first_step)]
            self._steps(loader, trackers)

    def _steps(self, loader: Loader, trackers: list[Tracker]) -> None:
        config = self.config
        for batch in loader:
            start = time.perf_counter()
            try:
                values = self._fitting_step(batch, loader)
            except StepGivenUpError:
                # The step left no gradient: a resumed run computes it again from its start.
                self._stop(batch.step)
            done = batch.step + 1
            last = done == config.num_steps
            if done % config.log_every == 0 or last:
                planned = {f"predicted_{key}": value for key, value in self._predicted.items()}
                for tracker in trackers:
                    tracker.log(batch.step, {**values, **planned}, batch.kind)
            if last:
                _say(f"done: {self.checkpoints.complete(done)}")
                # A request of the last seconds is met; it would stop a run that trains longer.
                self._stop_request.clear()
                return
            # One collective call for all decisions at a step's end.
            wanted, writing, seconds = comm.max_over_ranks(
                bool(self._stop_request.reason()),
                self.checkpoints.is_writing,
                time.perf_counter() - start,
            )
            if wanted:
                self._stop(done)
            # On all ranks or on none, because `finish` is a collective call.
            if not writing:
                self.checkpoints.finish()
            if done % config.checkpoint.every == 0:
                self.checkpoints.begin(done)
            self._agreement.end_step(seconds)

    def _stop(self, done: int) -> NoReturn:
        """Save and leave, after `done` finished steps; called on all ranks."""
        reason = self._stop_request.agreed_reason()
        path = self.checkpoints.save(done)
        self._stop_request.clear()  # after the save: a request that failed stays
        raise Stopped(
            f"{reason} after step {done} of {self.config.num_steps}; saved {path}, "
            f"run the same command to resume"
        )

    def _fitting_step(self, batch: GlobalBatch, loader: Loader) -> dict[str, float]:
        """Run one step; while a rank runs out of memory, repeat it in smaller chunks on all ranks.

        Raises:
            DiffembedError: a single text does not fit, or the schedule keeps all graphs.
        """
        while True:
            try:
                return self.step(batch)
            except ChunkOutOfMemoryError as error:
                largest = max(batch.chunks, key=lambda chunk: len(chunk.input_ids))
                # All ranks must choose the same new size, or their numbers of chunks would differ.
                sizes = comm.all_gather_object((len(largest.input_ids), len(largest.lengths)))
                tokens, rows = max(sizes)
                # Schedule plain keeps the graphs of all chunks, which smaller chunks do not shrink.
                if rows == 1 or self.config.schedule == "plain":
                    other = "schedule to cache or sweep, "
                    if self.config.schedule == "sweep":
                        other = "chunks.boundaries: host, "
                    elif self.config.objective is not None:
                        other = "schedule to sweep, "  # tokens have no cache
                    raise DiffembedError(
                        f"{error}: {tokens} tokens in {rows} texts; set {other}"
                        f"gradient_checkpointing, or a smaller max_document_length"
                    ) from error
                # A batch that was planned ahead may still have the size that failed before.
                loader.max_chunk_tokens = min(loader.max_chunk_tokens, tokens // 2)
                _say(f"{error}: {tokens} tokens; continuing with {loader.max_chunk_tokens} a chunk")
            # On every rank: those that did not fail hold the tensors of the step they gave up.
            release_memory()
            batch = loader.batch(batch.step)

    def step(self, batch: GlobalBatch) -> dict[str, float]:
        """Run one optimizer step; return its numbers, the same on every rank except times."""
        start = time.perf_counter()
        config = self.config
        try:
            values = self.objective.accumulate(self.engine, batch, self._agreement)
        except NonFiniteLossError as error:
            return self._non_finite(batch, str(error), {"texts": error.texts})
        lr = learning_rate(batch.step, config.optimizer, config.num_steps)
        # A norm that is not finite means that the engine has updated nothing.
        grad_norm = self.engine.step(lr)
        if not math.isfinite(grad_norm):
            return self._non_finite(batch, f"gradient norm is {grad_norm}", {})
        self._num_skipped = 0
        self.objective.update(lr)
        seconds = time.perf_counter() - start
        # Counts are the global batch's; times and memory are this rank's.
        return {
            **values,
            "lr": lr,
            "grad_norm": grad_norm,
            "chunks": len(batch.chunks),
            "documents": batch.num_documents,
            "tokens": batch.tokens,
            "seconds": seconds,
            "tokens_per_second": batch.tokens / seconds,
            "peak_memory_gib": comm.peak_memory() / 2**30,
            **({"compiled_graphs": num_graphs()} if config.compile else {}),
        }

    def _non_finite(
        self, batch: GlobalBatch, fault: str, details: dict[str, Any]
    ) -> dict[str, float]:
        """Skip the step, or end the run; loss and norm are global, so all ranks do the same.

        Raises:
            DiffembedError: the policy is to stop, or skipping steps does not help; a dump names
                the batch and the broken texts.
        """
        intact = self.engine.weights_are_finite()
        self._num_skipped += 1
        if self.config.non_finite == "skip" and intact and self._num_skipped < _MOST_SKIPPED:
            _say(f"step {batch.step + 1}: {fault}; skipped")
            return {"loss": math.nan, "lr": 0.0, "skipped": 1, "tokens_per_second": 0.0}
        dump = self.run.root / f"non-finite-step-{batch.step + 1}-rank-{comm.rank()}.json"
        examples = batch.example_ids.tolist()
        write_json(dump, {"what": fault, **details, "example_ids": examples})
        comm.barrier()  # the first rank to leave ends the others: all dumps must be written
        raise DiffembedError(
            f"{fault} at step {batch.step + 1}, which was not applied"
            + (f", as in {self._num_skipped - 1} steps before" if self._num_skipped > 1 else "")
            + f"; the batch is in {dump}; {self._describe_weights(intact)}"
        )

    def _describe_weights(self, intact: bool) -> str:
        """Describe the weights after a step that was not finite, and the remedies."""
        names = run_folder.checkpoint_names(self.run.checkpoints)
        back = f"`diffembed rewind {self.run.root} NAME` continues from an older checkpoint"
        resume = "the same command starts again from step 1"
        # Not the last name: after a rewind there may be later ones.
        if latest := run_folder.latest_name(self.run.checkpoints):
            resume = f"the same command resumes from {latest} (there are {', '.join(names)})"
        if not intact:
            return (
                "the weights are not finite either: an earlier step ruined them, so that no later "
                f"step can succeed; {resume}; lower optimizer.lr in a new output_dir, or, where "
                f"that checkpoint is ruined too, {back}"
            )
        helps = "lower optimizer.lr or raise loss.temperature in a new output_dir"
        if self.config.non_finite == "stop":
            helps += ", or set non_finite: skip, which may change on resuming"
        return (
            "the weights are finite, though an update too large may have spoilt them before: look "
            f"at loss and grad_norm in {self.run.metrics}; {resume} and gets this batch again; "
            f"{helps}; where the weights were spoilt, {back}"
        )

    def _trackers(self, first_step: int) -> list[Tracker]:
        if comm.rank() != 0:
            return []
        run, config = self.run, self.config
        return [
            JsonLines(run.metrics, first_step),
            Progress(first_step, config.num_steps),
            Comparison(self._predicted),
            *open_trackers(
                config.trackers, run_dir=run.root, config=as_tree(config), first_step=first_step
            ),
        ]


def _holds(path: Path, config: TrainConfig) -> bool:
    """Compare a file, which may be missing, with a config."""
    try:
        return path.is_file() and load_config(TrainConfig, path) == config
    except UserError:
        return False


def _say(text: str) -> None:
    if comm.rank() == 0:
        say_line(text)


def set_determinism(wanted: bool) -> None:
    """Choose whether GPUs compute the same bits in every run; attention kernels ask torch for it.

    Without it, the backward of attention and sums by index add up in the order in which a GPU's
    blocks happen to finish. An operation that has no fixed order ends the run and is named.
    """
    torch.use_deterministic_algorithms(wanted)
    # torch would also write to every new tensor, which only helps to find reads of unset memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def make_objective(config: TrainConfig, loader: Loader) -> Objective:
    """Build the objective of a run.

    Raises:
        UserError: the objective hides tokens, but no mask token is known.
    """
    if config.objective is None:
        teacher = loader.dataset.manifest.teacher
        return Contrastive(config, teacher_width=teacher.width if teacher else None)
    return TokenPrediction(config, loader.dataset)
