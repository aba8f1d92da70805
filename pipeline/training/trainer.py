"""A training run from its config to its last checkpoint, resumable at every step boundary."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from pipeline import comm
from pipeline.config import TrainConfig, as_tree, dump_config
from pipeline.data.batch import GlobalBatch
from pipeline.data.loader import Loader
from pipeline.data.prepare import tokenizer_fingerprint
from pipeline.data.shards import Dataset
from pipeline.errors import DiffembedError, Stopped
from pipeline.model.encoder import build_encoder
from pipeline.run_dir import RunDir, describe_environment, write_json, write_text
from pipeline.tokenizer import load_tokenizer
from pipeline.training import checkpoint
from pipeline.training.metrics import JsonLines, Progress, Tracker, open_trackers
from pipeline.training.optim import build_optimizer, learning_rate
from pipeline.training.signals import StopRequest
from pipeline.training.step import (
    ChunkOutOfMemoryError,
    NonFiniteLossError,
    accumulate_gradients,
    seed_random,
)
from pipeline.training.temperature import Temperature
from pipeline.training.zero import ZeroEngine

# What may change when a run is resumed; everything else would make it another run.
_FREE_KEYS = (
    "output_dir",
    "num_steps",
    "checkpoint",
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
    stop = StopRequest(run.stop_request)
    dataset = open_dataset(config, verify=world.is_main)
    loader = Loader.of_run(dataset, config, rank=world.rank, world_size=world.world_size)
    newest = checkpoint.latest(run.checkpoints)
    comm.start(world)
    if newest and checkpoint.read_state(newest)["step"] >= config.num_steps:
        _say(f"{run.root}: finished, {newest.name} is its last checkpoint")
        return
    training = Training(config, ds_config, run, identity=run_identity(config, dataset))
    step = training.resume(newest) if newest else 0
    # After the checks of resuming: a refused run leaves the folder as it was.
    training.describe(ds_config)
    loader.load_state_dict({**loader.state_dict(), "step": step})
    training.loop(loader, stop, first_step=step)


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
    """What lives as long as the run: model, engine, temperature, and where they are saved."""

    def __init__(
        self, config: TrainConfig, ds_config: dict[str, Any], run: RunDir, identity: dict[str, Any]
    ) -> None:
        self.config, self.run, self._identity = config, run, identity
        seed_random(config.seed)  # a fresh adapter starts alike on every rank
        encoder = build_encoder(config.model).to(comm.device())
        self.engine = ZeroEngine(encoder, build_optimizer(encoder, config.optimizer), ds_config)
        self.temperature = Temperature(config.loss, config.optimizer)

    def resume(self, path: Path) -> int:
        """Load a checkpoint; returns the next step."""
        step, extra = checkpoint.load(path, self.engine, self._identity)
        self.temperature.load_state_dict(extra["temperature"])
        _say(f"resuming {self.run.root} at step {step} of {self.config.num_steps}")
        return step

    def save(self, step: int) -> Path:
        """Write a checkpoint, and see to what follows from it."""
        path = checkpoint.save(
            self.run.checkpoints,
            self.engine,
            step=step,
            identity=self._identity,
            extra={"temperature": self.temperature.state_dict()},
        )
        if comm.rank() == 0:
            self._after_checkpoint(path, step)
        return path

    def _after_checkpoint(self, path: Path, step: int) -> None:
        """What follows once a checkpoint is whole and `latest` names it; rank 0 only.

        Training waits for it: long work belongs in the background. Those who need the files of
        `path` for longer come before the pruning and keep links to them.

        Args:
            path: the checkpoint.
            step: finished optimizer steps.
        """
        checkpoint.prune(self.run.checkpoints, self.config.checkpoint.keep_last)

    def describe(self, ds_config: dict[str, Any]) -> None:
        """Write what the run is into its folder."""
        if comm.rank() == 0:
            write_text(self.run.config, dump_config(self.config))
            write_json(self.run.ds_config, ds_config)
            environment = {**describe_environment(), "world_size": comm.world_size()}
            write_json(self.run.environment, environment)

    def loop(self, loader: Loader, stop: StopRequest, *, first_step: int) -> None:
        """Run the steps that are left.

        Raises:
            Stopped: asked to stop; a checkpoint was written.
        """
        config, trackers = self.config, self._trackers(first_step)
        for batch in loader:
            values = self._fitting_step(batch, loader)
            done = batch.step + 1
            last = done == config.num_steps
            if done % config.log_every == 0 or last:
                for tracker in trackers:
                    tracker.log(batch.step, values)
            reason = stop.agreed()
            if done % config.checkpoint.every == 0 or last or reason:
                path = self.save(done)
            if last:
                _say(f"done: {path}")
                return
            if reason:
                stop.clear()
                raise Stopped(
                    f"{reason} after step {done} of {config.num_steps}; saved {path}, "
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
                    raise DiffembedError(
                        f"{error}: {tokens} tokens in {rows} texts; set schedule to cache or "
                        f"sweep, gradient_checkpointing, or a smaller max_document_length"
                    ) from error
                # A batch that was planned ahead may still have the size that failed before.
                loader.max_chunk_tokens = min(loader.max_chunk_tokens, tokens // 2)
                _say(f"{error}: {tokens} tokens; going on with {loader.max_chunk_tokens} a chunk")
                batch = loader.batch(batch.step)

    def step(self, batch: GlobalBatch) -> dict[str, float]:
        """One optimizer step; returns its numbers, the same on every rank but for times."""
        began = time.perf_counter()
        config, temperature = self.config, self.temperature.value
        try:
            output = accumulate_gradients(
                self.engine,
                batch,
                config,
                device=comm.device(),
                temperature=temperature if config.loss.learn_temperature else None,
            )
        except NonFiniteLossError as error:
            return self._non_finite(batch, str(error), {"texts": error.texts})
        lr = learning_rate(batch.step, config.optimizer, config.num_steps)
        grad_norm = self.engine.step(lr)
        if not math.isfinite(grad_norm):
            return self._non_finite(batch, f"gradient norm is {grad_norm}", {})
        self.temperature.step(output.temperature_grad, lr)
        seconds = time.perf_counter() - began
        return {
            "loss": float(output.loss),
            **output.metrics,
            "lr": lr,
            "temperature": temperature,
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
