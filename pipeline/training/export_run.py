"""Export a checkpoint of a run as a folder that other packages load.

checkpoint (or `init`) --same run? same shards?--> encoder with its weights --> export folder
dataset                --instructions, prefixes, sources--> prompts and model card
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import run_folder
from pipeline.config import TrainConfig, dump_config
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.model.encoder import Encoder, build_model
from pipeline.model.export import check_output, export_encoder
from pipeline.model.export_check import OutsideProcess
from pipeline.model.export_folder import TrainedTexts
from pipeline.run_folder import RunDir, checkpoint_digest
from pipeline.tokenizer import (
    instruction_characters,
    load_tokenizer,
    tokenizer_fingerprint,
    tokens_within,
)
from pipeline.training import checkpoints
from pipeline.training.engine import seed_random
from pipeline.training.run_identity import require_own_weights, require_same_model

# Documents of which the prompts are counted.
_SAMPLE = 1000


def export_run(
    config: TrainConfig,
    *,
    which: str,
    output: Path | None,
    adapter_only: bool = False,
    check: bool = True,
) -> Path:
    """Write a run's model as a Hugging Face and sentence-transformers folder.

    Args:
        config: the run's config.
        which: `latest`, a checkpoint's name, or `init` for the model the run starts from.
        output: the folder to write; the run's `export` by default.
        adapter_only: write the adapter without the weights it belongs to.
        check: load the folder by other libraries and compare vectors before it takes its place.

    Raises:
        UserError: there is no such checkpoint, it is damaged, the config describes another model
            than was trained, the output cannot be written, or the check fails.
    """
    run = RunDir(config.output_dir)
    output = output or run.export
    check_output(output)
    dataset = Dataset.open(config.data.path)
    own = dataset.tokenizer.path
    tokenizer = load_tokenizer(own, key=f"tokenizer of {config.data.path}")
    dataset.require_tokenizer(tokenizer_fingerprint(tokenizer), own)
    path = None if which == "init" else _find(run, which)
    changed: list[str] = []
    if path is not None:
        changed = require_same_model(path, run_folder.read_state(path), config, dataset)
    manifest = dataset.manifest
    # Imports of other libraries take long; they run while this process reads weights.
    with OutsideProcess() if check else nullcontext() as outside:
        seed_random(config.seed)  # gives a fresh adapter the weights that training started from
        encoder = build_model(config)
        # `init` keeps the weights that the run starts from.
        step, digest = 0, None
        if path is not None:
            require_own_weights(path, changed, encoder.names_from_base())
            step, digest = _load_weights(encoder, path), checkpoint_digest(path)
        return export_encoder(
            encoder,
            config=config.model,
            tokenizer=manifest.tokenizer,
            template=manifest.template,
            max_length=max(manifest.max_query_length, manifest.max_document_length),
            output_dir=output,
            card={
                "step": step,
                "checkpoint": digest,
                "recipe": dump_config(config),
                "data": _data_table(dataset),
            },
            texts=_trained_texts(dataset),
            similarity="cosine" if config.loss.similarity == "cosine" else "dot",
            adapter_only=adapter_only,
            outside=outside,
        )


def _trained_texts(dataset: Dataset) -> TrainedTexts:
    """Count the instructions of queries and, in a sample, the prefixes of documents."""
    manifest = dataset.manifest
    instructions: Counter[str] = Counter()
    for group in manifest.groups:
        instructions[group.instruction] += group.count
    # Documents hold their prefix as tokens; those made by our template are recognised.
    template = manifest.template
    prefixes = {template.document_prefix(), *map(template.document_prefix, instructions)}
    tokenizer = load_tokenizer(manifest.tokenizer.path, key="tokenizer of the dataset")
    known = {_leading_tokens(tokenizer, prefix): prefix for prefix in prefixes}
    size = manifest.num_documents
    # Spread over all documents, because each source is contiguous.
    numbers = np.linspace(0, size - 1, min(size, _SAMPLE)).astype(np.int64)
    lengths = dataset.documents.scalars("instruction_tokens", numbers).tolist()
    found: Counter[str] = Counter()
    for tokens, length in zip(dataset.documents.views("tokens", numbers), lengths, strict=True):
        head = tuple(tokens[:length].tolist())
        # A prefix from the data itself is decoded.
        found[known.get(head) or tokenizer.decode(head, skip_special_tokens=True)] += 1
    return TrainedTexts(instructions=instructions, document_prefixes=found)


def _leading_tokens(tokenizer: Any, prefix: str) -> tuple[int, ...]:
    """Return the tokens before a text that shards count as its prefix."""
    # With a text after it, because the last token of a prefix may merge with the text.
    row = tokenizer(prefix + "a", return_offsets_mapping=True)
    count = tokens_within(row["offset_mapping"], instruction_characters(prefix))
    return tuple(row["input_ids"][:count])


def _data_table(dataset: Dataset) -> str:
    """Describe the training data for the model card; local folders stay unnamed."""
    manifest = dataset.manifest
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
        newest = run_folder.latest_checkpoint(run.checkpoints)
        if newest is None:
            raise UserError(
                f"{run.checkpoints}: no checkpoint yet", fix="train first, or use --checkpoint init"
            )
        return newest
    path = run.checkpoints / name
    if not path.is_dir():
        known = [*run_folder.checkpoint_names(run.checkpoints), "latest", "init"]
        raise UserError(f"--checkpoint {name}", allowed=", ".join(known))
    return path


def _load_weights(encoder: Encoder, path: Path) -> int:
    """Put a checkpoint's trained weights into the encoder; return its step."""
    state = run_folder.verify_checkpoint(path)
    parameters = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, tensors in checkpoints.iterate_tensors(path):
            if name == checkpoints.PROJECTION:  # only training needs it
                continue
            if name not in parameters:
                raise UserError(
                    f"checkpoint {path} holds {name}, which the model does not have",
                    fix="export with the model section that the run started with",
                )
            parameters.pop(name).copy_(tensors["weight"])
    if parameters:
        raise UserError(f"checkpoint {path} lacks {next(iter(parameters))}")
    return int(state["step"])
