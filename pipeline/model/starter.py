"""Make a small model of Dream's layout with random weights, and train its tokenizer on a corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, trainers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from pipeline.config import StarterConfig
from pipeline.errors import UserError
from pipeline.files import parse_json, write_json
from pipeline.model.export_folder import check_replaceable, replace_folder

_END, _MASK = "<|endoftext|>", "<|mask|>"
_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def build_starter(config: StarterConfig) -> Path:
    """Write a Hugging Face folder with Dream's config, Dream's weight names and a tokenizer.

    A starter of the same sizes is replaced.

    Raises:
        UserError: a corpus file is missing or empty, the sizes do not fit together, or the folder
            holds something else.
    """
    _check(config)
    check_replaceable(
        config.output_dir,
        key="output_dir",
        is_own=lambda folder: _is_starter(folder, config),
        kind="a starter of these sizes",
    )
    tokenizer = _train_tokenizer(config)
    with replace_folder(config.output_dir) as folder:
        tokenizer.save_pretrained(folder)
        _write_model(folder, config, tokenizer)
    return config.output_dir


def _is_starter(folder: Path, config: StarterConfig) -> bool:
    """Check that a folder holds a starter of the same sizes and nothing else."""
    try:
        found = json.loads((folder / "config.json").read_text())
        files = {path.name for path in folder.iterdir()}
        # A published Dream of these sizes would name its code in auto_map.
        return found.items() >= {"architectures": ["DreamModel"], **_sizes(config)}.items() and (
            files <= _FILES and "auto_map" not in found
        )
    except (OSError, ValueError, AttributeError):
        return False


def _write_model(folder: Path, config: StarterConfig, tokenizer: Any) -> None:
    """Write random weights under Dream's names, and Dream's config.json."""
    torch.manual_seed(config.seed)
    # Dream's weights are Qwen2's, names included, so transformers' class draws them.
    native = Qwen2ForCausalLM(Qwen2Config(**_sizes(config)))
    weights = {k: v.contiguous() for k, v in native.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    published = {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        **_sizes(config),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", published)


def _check(config: StarterConfig) -> None:
    for path in config.corpus:
        if not path.is_file():
            raise UserError(f"corpus: {path}: no such file", fix="generate or download it first")
    if config.hidden_size % config.num_heads or config.num_heads % config.num_kv_heads:
        raise UserError(
            f"hidden_size {config.hidden_size}, num_heads {config.num_heads}, "
            f"num_kv_heads {config.num_kv_heads}",
            allowed="hidden_size divisible by num_heads, num_heads by num_kv_heads",
        )


def _sizes(config: StarterConfig) -> dict[str, Any]:
    """Return the keys that Dream's and Qwen2's configs share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }


def _train_tokenizer(config: StarterConfig) -> Any:
    """Train a byte-level BPE with Qwen2's splitting rules.

    transformers rebuilds these rules from the class name when it loads a tokenizer, so any others
    would be lost on the first reload.
    """
    rules = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - 2,  # the end and mask tokens are added last
        # In a fixed order, which the library's is not: it numbers the tokens of single bytes.
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(config.corpus), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    if not model["merges"]:
        raise UserError(
            f"corpus: no text in {', '.join(map(str, config.corpus))}",
            fix="give a file that holds some words",
        )
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token=_END,
        pad_token=_END,
        mask_token=_MASK,
        model_max_length=config.max_position_embeddings,
    )


def _texts(paths: tuple[Path, ...]) -> Iterator[str]:
    """Yield every string value of JSONL rows, and every line of other files."""
    for path in paths:
        fix = "give JSON lines (*.jsonl), or plain text in UTF-8"
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"corpus: {path}:{number}"
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8", fix=fix) from error
                if path.suffix == ".jsonl":
                    if text.strip():
                        yield from _strings(parse_json(text, where=where, fix=fix))
                else:
                    yield text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
