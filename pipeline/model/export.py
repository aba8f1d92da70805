"""An encoder as a folder that transformers and sentence-transformers load without this package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import ModelConfig, Pooling, Template, as_tree
from pipeline.errors import UserError
from pipeline.model.card import write_card
from pipeline.model.encoder import Encoder
from pipeline.model.tokenizer import append_eos, load_tokenizer
from pipeline.run_dir import sync_dir, write_json

# sentence-transformers' names of our poolings.
POOLING_NAMES: dict[Pooling, str] = {
    "mean": "mean",
    "weighted_mean": "weightedmean",
    "last_token": "lasttoken",
    "first_token": "cls",
}
SETTINGS = "diffembed.json"


class TokenizerSource(Protocol):
    """What a dataset's manifest knows about its tokenizer."""

    @property
    def path(self) -> str:
        """Folder or hub name."""

    @property
    def append_eos(self) -> bool:
        """Whether texts got an end-of-sequence token."""


def export_encoder(
    encoder: Encoder,
    *,
    config: ModelConfig,
    tokenizer: TokenizerSource,
    template: Template,
    max_length: int,
    output_dir: Path,
    card: Mapping[str, Any],
) -> Path:
    """Write weights, tokenizer, pooling, prompts and model card; adapters are merged.

    The attention is written as `is_causal` into config.json, which decoders of transformers honour,
    so a bidirectional model needs no remote code.

    Args:
        encoder: whole weights on one process; its adapters are merged in place.
        config: the model section that the encoder was built from.
        tokenizer: the tokenizer of the training data.
        template: how instructions and texts become strings.
        max_length: tokens after which a text is cut.
        output_dir: the folder to write; an earlier export there is replaced.
        card: facts for the model card: `recipe` (YAML), `step`, `evaluation` (a table).

    Raises:
        UserError: `output_dir` holds something that is not an export, or the tokenizer is gone.
    """
    if output_dir.exists() and any(output_dir.iterdir()) and not is_export(output_dir):
        raise UserError(
            f"{output_dir}: not empty and not an export", fix="choose another output folder"
        )
    loaded = load_tokenizer(tokenizer.path)
    if tokenizer.append_eos:
        append_eos(loaded)
    loaded.padding_side = "right"
    loaded.model_max_length = max_length
    work = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    try:
        encoder.save_backbone(work)
        loaded.save_pretrained(work)
        _write_sentence_transformers(
            work, encoder.model.config.hidden_size, config, template, max_length
        )
        write_json(work / SETTINGS, {"version": 1, "template": as_tree(template)})
        write_card(work, config=config, template=template, max_length=max_length, facts=card)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        work.rename(output_dir)
        sync_dir(output_dir.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return output_dir


def is_export(path: Path) -> bool:
    """Whether a folder was written by `export_encoder`."""
    return (path / SETTINGS).is_file()


def _write_sentence_transformers(
    folder: Path, width: int, config: ModelConfig, template: Template, max_length: int
) -> None:
    """The files by which sentence-transformers finds pooling, normalisation and prompts."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if config.normalize:
        modules.append(("2_Normalize", "Normalize"))
    write_json(
        folder / "modules.json",
        [
            {
                "idx": index,
                "name": str(index),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, (path, kind) in enumerate(modules)
        ],
    )
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode": POOLING_NAMES[config.pooling],
            "include_prompt": True,
        },
    )
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False}
    )
    # Queries differ by instruction, so the stored prompt is the one without any.
    prompts = {"query": template.query_prefix(""), "document": template.document_prefix()}
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
