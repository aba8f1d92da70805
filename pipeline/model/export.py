"""An encoder as a folder that transformers and sentence-transformers load without this package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from pipeline.config import ModelConfig, Pooling, Template, as_tree
from pipeline.errors import UserError
from pipeline.model.backbones import read_config
from pipeline.model.card import write_card
from pipeline.model.encoder import Encoder
from pipeline.model.eos import append_eos
from pipeline.model.parts import SETTINGS, is_export
from pipeline.run_dir import sync_dir, write_json
from pipeline.tokenizer import load_tokenizer

# sentence-transformers' names of our poolings.
POOLING_NAMES: dict[Pooling, str] = {
    "mean": "mean",
    "weighted_mean": "weightedmean",
    "last_token": "lasttoken",
    "first_token": "cls",
}
_TRUNCATION = "2_Truncation"


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
    adapter_only: bool = False,
) -> Path:
    """Write weights, tokenizer, pooling, prompts and model card.

    The attention is written as `is_causal` into config.json, which decoders of transformers honour,
    so a bidirectional model needs no remote code. An adapter alone has no config.json to say so:
    its folder is for peft and for `load_export`, and its card shows how to take the mask off.

    Args:
        encoder: whole weights on one process; unless `adapter_only`, adapters are merged in place.
        config: the model section that the encoder was built from.
        tokenizer: the tokenizer of the training data.
        template: how instructions and texts become strings.
        max_length: tokens after which a text is cut.
        output_dir: the folder to write; an earlier export there is replaced.
        card: facts for the model card: `recipe` (YAML), `step`, `checkpoint` (its digest), `data`
            (a table).
        adapter_only: write the adapter without the weights it belongs to.

    Raises:
        UserError: `output_dir` holds something that is not an export, the tokenizer is gone, the
            model needs code of its own, or there is no adapter to write.
    """
    _check_form(config, adapter_only)
    loaded = _tokenizer_to_write(tokenizer, max_length)
    settings = {
        "version": 1,
        "template": as_tree(template),
        "max_length": max_length,
        "step": card.get("step"),
        "checkpoint": card.get("checkpoint"),
        "model": as_tree(config),
    }
    with _replaced(output_dir) as folder:
        if adapter_only:
            encoder.save_adapter(folder)
        else:
            encoder.save_backbone(folder)
            width = encoder.model.config.hidden_size
            _write_sentence_transformers(folder, width, config, template, max_length)
        loaded.save_pretrained(folder)
        write_json(folder / SETTINGS, settings)
        write_card(
            folder,
            config=config,
            template=template,
            max_length=max_length,
            adapter_only=adapter_only,
            facts={
                **card,
                "decoder": encoder.family.decoder,
                "plain_base": _is_plain(encoder, config),
            },
        )
    return output_dir


def _is_plain(encoder: Encoder, config: ModelConfig) -> bool:
    """Whether transformers alone loads the base model as the one that was trained."""
    return (
        read_config(config)["model_type"] == encoder.model.config.model_type
        and not config.trust_remote_code
        and config.rope_scaling is None
        and not config.all_merged
    )


def _check_form(config: ModelConfig, adapter_only: bool) -> None:
    """Refuse an adapter that is not there, and a merged model that nobody else could load."""
    if adapter_only:
        if config.lora is None and config.adapter_use != "continue":
            raise UserError("adapter-only export of a run without adapter", fix="export it merged")
    elif config.trust_remote_code:
        raise UserError(
            f"merged export of {config.path}, whose code is not part of transformers",
            fix="train with model.lora and export the adapter alone",
        )


def _tokenizer_to_write(source: TokenizerSource, max_length: int) -> Any:
    """The tokenizer of the training data, made to cut and to end texts by itself as they were."""
    tokenizer = load_tokenizer(source.path)
    if source.append_eos:
        append_eos(tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = max_length
    return tokenizer


@contextmanager
def _replaced(output_dir: Path) -> Iterator[Path]:
    """A folder to write that takes the place of `output_dir` at the end, or leaves no trace."""
    if output_dir.exists() and any(output_dir.iterdir()) and not is_export(output_dir):
        raise UserError(
            f"{output_dir}: not empty and not an export", fix="choose another output folder"
        )
    work = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    try:
        yield work
        if output_dir.exists():
            shutil.rmtree(output_dir)
        work.rename(output_dir)
        sync_dir(output_dir.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # renamed where all went well


def _write_truncation(folder: Path, width: int, dimensions: int) -> None:
    """A linear layer that keeps the first numbers of a vector.

    Their `truncate_dim` comes after normalising and leaves vectors shorter than 1.
    """
    write_json(
        folder / "config.json",
        {
            "in_features": width,
            "out_features": dimensions,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    save_file({"linear.weight": torch.eye(dimensions, width)}, folder / "model.safetensors")


def _write_sentence_transformers(
    folder: Path, width: int, config: ModelConfig, template: Template, max_length: int
) -> None:
    """The files by which sentence-transformers finds pooling, normalisation and prompts."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if config.dimensions is not None:
        modules.append((_TRUNCATION, "Dense"))
    if config.normalize:
        modules.append(("3_Normalize", "Normalize"))
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
    if config.dimensions is not None:
        _write_truncation(folder / _TRUNCATION, width, config.dimensions)
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode": POOLING_NAMES[config.pooling],
            "include_prompt": config.pool_instruction,
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
