"""The tokens that a model knows and the longest text that it takes, by its files; no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import POOLINGS, ModelConfig, Template, local_file, read_declared
from pipeline.errors import UserError, say_warning

# By model_type, the key of absolute positions: a text beyond them has no embedding. All other
# models turn by rotary positions, which go on as far as memory does, only less well.
_ABSOLUTE = {
    "bert": "max_position_embeddings",
    "roberta": "max_position_embeddings",
    "xlm-roberta": "max_position_embeddings",
    "gpt2": "n_positions",
}
# These count positions from the one after the padding token's id.
_AFTER_PADDING = ("roberta", "xlm-roberta")
_ROTARY = ("max_position_embeddings", "max_sequence_length")
# The last part of the embedding's name in published weights.
_EMBEDDING = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """What a model's files say about the texts that it can take; None where they do not.

    Attributes:
        path: the model.
        tokens: rows of its embedding.
        positions: tokens of the longest text that it has positions for.
        trained: tokens of the longest text that it was trained on, in models without such a bound.
    """

    path: str
    tokens: int | None = None
    positions: int | None = None
    trained: int | None = None

    def require_length(self, lengths: Mapping[str, int], *, fix: str = "") -> None:
        """Refuse texts that are longer than the model has positions.

        Args:
            lengths: tokens of the longest text, by the key that decides about it.

        Raises:
            UserError: one is longer.
        """
        for key, length in lengths.items():
            if self.positions is not None and length > self.positions:
                raise UserError(
                    f"{key}: {length} tokens, but {self.path} has {self.positions} positions",
                    allowed=f"at most {self.positions}",
                    fix=fix,
                )

    def warn_of_length(self, lengths: Mapping[str, int]) -> None:
        """Tell of texts that are longer than a model with rotary positions was trained on."""
        for key, length in lengths.items():
            if self.trained is not None and length > self.trained:
                say_warning(
                    f"{key}: {length} tokens, but {self.path} was trained on at most "
                    f"{self.trained}; model.rope_scaling is for longer ones"
                )

    def require_token(self, token: int, *, where: str) -> None:
        """Refuse a token that the embedding has no row for.

        Raises:
            UserError: there is none.
        """
        if self.tokens is not None and token >= self.tokens:
            raise UserError(
                f"{where}: token {token}, but the embedding of {self.path} has {self.tokens} rows",
                allowed=f"tokens below {self.tokens}",
                fix="remove the added tokens from the tokenizer, or give the model rows for them "
                "with resize_token_embeddings of transformers, and prepare the data with that",
            )


def read_limits(path: str, revision: str | None = None, *, factor: float = 1.0) -> ModelLimits:
    """Read a model's limits from its folder, or from the local cache where it is a hub name.

    Args:
        factor: of rope_scaling, which stretches rotary positions.
    """
    config = local_file(path, "config.json", revision)
    try:
        tree = json.loads(config.read_text()) if config else {}
    except (OSError, ValueError):
        tree = {}  # whoever needs the model will say so
    limits = limits_of(tree if isinstance(tree, dict) else {}, path)
    rows = embedding_rows(path, revision)
    trained = None if limits.trained is None else int(limits.trained * factor)
    return dataclasses.replace(limits, tokens=rows or limits.tokens, trained=trained)


def warn_of_declared(model: ModelConfig, template: Template) -> None:
    """Tell where a run treats texts unlike the embedder that it starts from."""
    declared = read_declared(model.path, model.revision)
    pooling = declared.pooling
    if pooling is not None and POOLINGS.get(pooling) != model.pooling:
        say_warning(f"model.pooling: {model.pooling}, but {model.path} was made with {pooling!r}")
    if declared.normalize is not None and declared.normalize != model.normalize:
        made = "with" if declared.normalize else "without"
        say_warning(
            f"model.normalize: {model.normalize}, but {model.path} was made {made} normalisation"
        )
    written = f"{template.query}\n{template.document}"
    for name, prompt in declared.prompts.items():
        if prompt.strip() not in written:
            say_warning(
                f"{model.path} was made with the prompt {prompt!r} ({name}), which the template of "
                "the shards does not write"
            )


def limits_of(tree: Mapping[str, Any], path: str = "the model") -> ModelLimits:
    """Derive the limits from the contents of a config.json."""
    inner = tree.get("text_config")
    if isinstance(inner, dict):
        tree = {**tree, **inner}
    kind = str(tree.get("model_type"))
    tokens = _positive(tree.get("embedding_size")) or _positive(tree.get("vocab_size"))
    if kind not in _ABSOLUTE:
        trained = next((n for key in _ROTARY if (n := _positive(tree.get(key)))), None)
        return ModelLimits(path=path, tokens=tokens, trained=trained)
    positions = _positive(tree.get(_ABSOLUTE[kind]))
    if positions is not None and kind in _AFTER_PADDING:
        padding = tree.get("pad_token_id")
        positions -= (padding if isinstance(padding, int) else 1) + 1
    return ModelLimits(path=path, tokens=tokens, positions=positions)


def embedding_rows(path: str, revision: str | None = None) -> int | None:
    """Rows of the published token embedding by the headers of the weights; None if not here."""
    names: Iterable[str] = ("model.safetensors",)
    index = local_file(path, "model.safetensors.index.json", revision)
    try:
        if index is not None:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            file = local_file(path, name, revision)
            if file is None:
                continue
            for tensor, entry in _header(file).items():
                if tensor.endswith(_EMBEDDING) and not tensor.startswith("vision"):
                    return int(entry["shape"][0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None  # damaged: reading the weights will say so
    return None


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > file.stat().st_size:
            raise ValueError("damaged")
        header: dict[str, Any] = json.loads(opened.read(size))
    return header


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
