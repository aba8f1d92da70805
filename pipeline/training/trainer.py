"""A training run from its config to its last checkpoint, resumable at every step boundary."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from pipeline import comm
from pipeline.config import TrainConfig, as_tree, dump_config
from pipeline.data.batch import GlobalBatch
from pipeline.data.loader import Loader
from pipeline.data.shards import Dataset
from pipeline.errors import DiffembedError, Stopped
from pipeline.model.encoder import build_encoder
from pipeline.run_dir import RunDir, describe_environment, write_json, write_text
from pipeline.training import checkpoint
from pipeline.training.metrics import JsonLines, Progress, Tracker, open_trackers
from pipeline.training.optim import build_optimizer, learning_rate
from pipeline.training.signals import StopRequest
from pipeline.training.step import accumulate_gradients, seed_random
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
    dataset = Dataset.open(config.data.path)
    loader = build_loader(dataset, config, rank=world.rank, world_size=world.world_size)
    identity = run_identity(config, dataset)
    newest = checkpoint.latest(run.checkpoints)
    comm.start(world)
    if newest and checkpoint.read_state(newest)["step"] >= config.num_steps:
        _say(f"{run.root}: finished, step {config.num_steps} is saved in {newest}")
        return
    _write_description(run, config, ds_config)
    seed_random(config.seed)  # a fresh adapter starts alike on every rank
    encoder = build_encoder(config.model).to(comm.device())
    engine = ZeroEngine(encoder, build_optimizer(encoder, config.optimizer), ds_config)
    temperature = Temperature(config.loss, config.optimizer)
    step = 0
    if newest:
        step, extra = checkpoint.load(newest, engine, identity)
        temperature.load_state_dict(extra["temperature"])
        _say(f"resuming {run.root} at step {step} of {config.num_steps}")
    loader.load_state_dict({**loader.state_dict(), "step": step})
    trackers = _trackers(run, config, first_step=step)
    saved = step
    for batch in loader:
        if step == config.num_steps:
            break
        values = _one_step(engine, temperature, batch, config)
        step += 1
        if step % config.log_every == 0 or step == config.num_steps:
            for tracker in trackers:
                tracker.log(step - 1, values)
        reason = stop.agreed()
        if step % config.checkpoint.every == 0 or step == config.num_steps or reason:
            checkpoint.save(
                run.checkpoints,
                engine,
                step=step,
                identity=identity,
                extra={"temperature": temperature.state_dict()},
            )
            saved = step
            if world.is_main:
                checkpoint.prune(run.checkpoints, config.checkpoint.keep_last)
        if reason and step < config.num_steps:
            stop.clear()
            raise Stopped(
                f"{reason} after step {step} of {config.num_steps}; "
                f"saved {run.checkpoints}/step-{saved:06d}, run the same command to resume"
            )
    _say(f"done: {run.checkpoints}/step-{saved:06d}")


def build_loader(dataset: Dataset, config: TrainConfig, *, rank: int, world_size: int) -> Loader:
    """The loader of one rank."""
    return Loader(
        dataset,
        config.data,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        max_chunk_tokens=config.chunks.max_tokens,
        min_chunks=config.chunks.min_chunks,
    )


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


def _one_step(
    engine: ZeroEngine, temperature: Temperature, batch: GlobalBatch, config: TrainConfig
) -> dict[str, float]:
    began = time.perf_counter()
    loss_config = dataclasses.replace(config.loss, temperature=temperature.value)
    config = dataclasses.replace(config, loss=loss_config)
    output = accumulate_gradients(engine, batch, config, device=comm.device())
    loss = float(output.loss)
    # The loss is the same number on every rank, so all of them stop here together.
    if not abs(loss) < float("inf"):
        raise DiffembedError(
            f"loss is {loss} at step {batch.step}: nothing was updated; lower optimizer.lr, raise "
            f"loss.temperature, or resume from an earlier checkpoint"
        )
    lr = learning_rate(batch.step, config.optimizer, config.num_steps)
    grad_norm = engine.step(lr)
    temperature.step(output.temperature_grad, lr)
    seconds = time.perf_counter() - began
    return {
        "loss": loss,
        **output.metrics,
        "lr": lr,
        "temperature": loss_config.temperature,
        "grad_norm": grad_norm,
        "chunks": len(batch.chunks),
        "documents": batch.num_documents,
        "tokens": batch.tokens,
        "seconds": seconds,
        "tokens_per_second": batch.tokens / seconds,
    }


def _write_description(run: RunDir, config: TrainConfig, ds_config: dict[str, Any]) -> None:
    if comm.rank() != 0:
        return
    write_text(run.config, dump_config(config))
    write_json(run.ds_config, ds_config)
    write_json(run.environment, {**describe_environment(), "world_size": comm.world_size()})


def _trackers(run: RunDir, config: TrainConfig, *, first_step: int) -> list[Tracker]:
    if comm.rank() != 0:
        return []
    return [
        JsonLines(run.metrics, first_step),
        Progress(first_step, config.num_steps),
        *open_trackers(config.trackers, run_dir=Path(run.root), config=as_tree(config)),
    ]


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
