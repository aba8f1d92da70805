"""The files by which sentence-transformers and servers find pooling, normalisation and prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.config import POOLING_FLAGS, POOLINGS, ModelConfig, Pooling
from pipeline.run_dir import write_json

# sentence-transformers' names of our poolings.
POOLING_NAMES: dict[Pooling, str] = {ours: theirs for theirs, ours in POOLINGS.items()}
_TRUNCATION = "2_Truncation"


def write_sentence_files(
    folder: Path,
    *,
    width: int,
    config: ModelConfig,
    max_length: int,
    prompts: Mapping[str, str],
    similarity: str,
) -> None:
    """Write what sentence-transformers reads in addition to weights and tokenizer.

    Args:
        folder: the export.
        width: of hidden states.
        config: pooling, dimensions and normalisation.
        max_length: tokens after which a text is cut.
        prompts: what stands before a text, by `query` and `document`.
        similarity: `cosine` or `dot`.
    """
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
    write_json(folder / "1_Pooling" / "config.json", _pooling_settings(width, config))
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False}
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": similarity},
    )


def _pooling_settings(width: int, config: ModelConfig) -> dict[str, Any]:
    """Both forms of the pooling, the flags first: old servers take the first key that is true."""
    name = POOLING_NAMES[config.pooling]
    return {
        "word_embedding_dimension": width,
        **{flag: kind == name for flag, kind in POOLING_FLAGS.items()},
        "pooling_mode": name,
        "include_prompt": config.pool_instruction,
    }


def _write_truncation(folder: Path, width: int, dimensions: int) -> None:
    """Write a linear layer that keeps the first numbers of a vector.

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
