"""A checkpoint of a run turned into a folder that other packages load; needs no engine."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config import TrainConfig, dump_config
from pipeline.data.manifest import Manifest
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.model.encoder import Encoder
from pipeline.model.export import export_encoder
from pipeline.model.language import build_model
from pipeline.run_dir import RunDir, checkpoint_digest
from pipeline.training import checkpoint
from pipeline.training.engine import seed_random


def export_run(
    config: TrainConfig, *, which: str, output: Path | None, adapter_only: bool = False
) -> Path:
    """Write a run's model as a Hugging Face and sentence-transformers folder.

    Args:
        config: the run's config.
        which: `latest`, a checkpoint's name, or `init` for the model the run starts from.
        output: the folder to write; the run's `export` by default.
        adapter_only: write the adapter without the weights it belongs to.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    run = RunDir(config.output_dir)
    dataset = Dataset.open(config.data.path)
    seed_random(config.seed)  # the adapter that training began with
    encoder = build_model(config)
    step, digest = 0, None
    if which != "init":
        path = _find(run, which)
        step, digest = _load_weights(encoder, path), checkpoint_digest(path)
    manifest = dataset.manifest
    return export_encoder(
        encoder,
        config=config.model,
        tokenizer=manifest.tokenizer,
        template=manifest.template,
        max_length=max(manifest.max_query_length, manifest.max_document_length),
        output_dir=output or run.export,
        card={
            "step": step,
            "checkpoint": digest,
            "recipe": dump_config(config),
            "data": _data_table(manifest),
        },
        adapter_only=adapter_only,
    )


def _data_table(manifest: Manifest) -> str:
    """What the model was trained on, for its card; local folders stay unnamed."""
    lines = [
        "| source | format | from | rows read | examples | weight |",
        "|---|---|---|---|---|---|",
    ]
    for source in manifest.sources:
        origin = source.path if source.path.startswith("hub:") else "files"
        counts = f"{source.rows:,} | {source.examples:,} | {source.weight:g}"
        lines.append(f"| {source.name} | {source.format} | {origin} | {counts} |")
    lines.append(f"\n{manifest.num_examples:,} examples, {manifest.num_documents:,} documents.")
    warnings = [f"{source.name}: {w}." for source in manifest.sources for w in source.warnings]
    return "\n".join(lines + [f"\n{warning}" for warning in warnings])


def _find(run: RunDir, name: str) -> Path:
    if name == "latest":
        newest = checkpoint.latest(run.checkpoints)
        if newest is None:
            raise UserError(
                f"{run.checkpoints}: no checkpoint yet", fix="train first, or use --checkpoint init"
            )
        return newest
    path = run.checkpoints / name
    if not path.is_dir():
        known = [*checkpoint.names(run.checkpoints), "latest", "init"]
        raise UserError(f"--checkpoint {name}", allowed=", ".join(known))
    return path


def _load_weights(encoder: Encoder, path: Path) -> int:
    """Put a checkpoint's trained weights into the encoder; returns its step."""
    state = checkpoint.verify(path)
    parameters = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, tensors in checkpoint.iterate_tensors(path):
            if name not in parameters:
                raise UserError(
                    f"checkpoint {path} holds {name}, which the model does not have",
                    fix="export with the model section that the run began with",
                )
            parameters.pop(name).copy_(tensors["weight"])
    if parameters:
        raise UserError(f"checkpoint {path} lacks {next(iter(parameters))}")
    return int(state["step"])
