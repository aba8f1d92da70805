"""Read from a model's files which texts it takes, and how its vectors were made; no torch.

read_limits           path -> ModelLimits: rows of the embedding, positions, trained length
limits_of             the contents of a config.json -> ModelLimits
embedding_rows        path -> rows of the embedding, from the headers of the weights
warn_if_unlike_base   a training config against the embedder that it starts from
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.config import POOLINGS, ModelConfig, Template, local_file, read_declared
from pipeline.errors import UserError, say_warning

# The key of learned absolute positions, by model_type: beyond them a text has no embedding. All
# other models have rotary positions, which work at any length, only less well.
_ABSOLUTE = {
    "bert": "max_position_embeddings",
    "roberta": "max_position_embeddings",
    "xlm-roberta": "max_position_embeddings",
    "gpt2": "n_positions",
}
# These number their positions from the one after the padding token's id.
_AFTER_PADDING = ("roberta", "xlm-roberta")
_ROTARY = ("max_position_embeddings", "max_sequence_length")
# The last part of the embedding's name in published weights.
_EMBEDDING = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """The texts that a model can take, read from its files; None where they do not tell.

    Attributes:
        path: the model.
        num_tokens: rows of its embedding.
        positions: length of the longest text that it has positions for.
        trained_length: length of the longest text that it was trained on, for rotary positions.
    """

    path: str
    num_tokens: int | None = None
    positions: int | None = None
    trained_length: int | None = None

    def require_length(self, lengths: Mapping[str, int], *, fix: str = "") -> None:
        """Refuse texts that are longer than the model's positions.

        Args:
            lengths: tokens of the longest text, by the config key that sets it.
            fix: advice for the message.

        Raises:
            UserError: a length exceeds the positions.
        """
        for key, length in lengths.items():
            if self.positions is not None and length > self.positions:
                raise UserError(
                    f"{key}: {length} tokens, but {self.path} has {self.positions} positions",
                    allowed=f"at most {self.positions}",
                    fix=fix,
                    docs="trouble.md#positions",
                )

    def cut_length(self, length: int, *, where: str) -> int:
        """Return a length, reduced with a warning to the model's positions if they are fewer."""
        if self.positions is None or length <= self.positions:
            return length
        say_warning(
            f"{where}: {length} tokens, but the model has {self.positions} positions; texts are "
            f"cut at {self.positions} tokens"
        )
        return self.positions

    def warn_of_length(self, lengths: Mapping[str, int]) -> None:
        """Warn of texts that are longer than any that a rotary model was trained on."""
        for key, length in lengths.items():
            if self.trained_length is not None and length > self.trained_length:
                say_warning(
                    f"{key}: {length} tokens, but {self.path} was trained on at most "
                    f"{self.trained_length}; model.rope_scaling is for longer texts"
                )

    def require_token(self, token: int, *, where: str) -> None:
        """Refuse a token without a row in the embedding.

        Args:
            token: the largest id.
            where: its source, for the message.

        Raises:
            UserError: the embedding has fewer rows.
        """
        if self.num_tokens is not None and token >= self.num_tokens:
            raise UserError(
                f"{where}: token {token}, but the embedding of {self.path} has "
                f"{self.num_tokens} rows",
                allowed=f"tokens below {self.num_tokens}",
                fix="remove the added tokens from the tokenizer, or give the model rows for them "
                "with resize_token_embeddings of transformers, and prepare the data with that",
            )


def read_limits(path: str, revision: str | None = None, *, factor: float = 1.0) -> ModelLimits:
    """Read a model's limits from its folder, or from the local cache of a hub name.

    `rope_scaling` stretches rotary positions by `factor`.
    """
    config = local_file(path, "config.json", revision)
    try:
        tree = json.loads(config.read_text()) if config else {}
    except (OSError, ValueError):
        tree = {}  # loading the model will report it
    limits = limits_of(tree if isinstance(tree, dict) else {}, path)
    # The weights know better: DiffuGPT's config.json counts one token fewer than they have rows.
    rows = embedding_rows(path, revision)
    trained = limits.trained_length
    return dataclasses.replace(
        limits,
        num_tokens=rows or limits.num_tokens,
        trained_length=None if trained is None else int(trained * factor),
    )


def limits_of(tree: Mapping[str, Any], path: str = "the model") -> ModelLimits:
    """Derive the limits from the contents of a config.json."""
    # A model that also reads images keeps the keys of its text model in `text_config`.
    inner = tree.get("text_config")
    if isinstance(inner, dict):
        tree = {**tree, **inner}
    kind = str(tree.get("model_type"))
    # LLaDA pads its embedding beyond the vocabulary.
    tokens = _positive(tree.get("embedding_size")) or _positive(tree.get("vocab_size"))
    if kind not in _ABSOLUTE:
        trained = next((n for key in _ROTARY if (n := _positive(tree.get(key)))), None)
        return ModelLimits(path=path, num_tokens=tokens, trained_length=trained)
    positions = _positive(tree.get(_ABSOLUTE[kind]))
    if positions is not None and kind in _AFTER_PADDING:
        padding = tree.get("pad_token_id")  # 1 by default in both families
        positions -= (padding if isinstance(padding, int) else 1) + 1
    return ModelLimits(path=path, num_tokens=tokens, positions=positions)


def embedding_rows(path: str, revision: str | None = None) -> int | None:
    """Read the rows of the token embedding from the headers of the weights.

    None where the weights are not on this machine, or cannot be read: loading them will report it.
    """
    names: Iterable[str] = ("model.safetensors",)
    index = local_file(path, "model.safetensors.index.json", revision)
    try:
        if index is not None:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            file = local_file(path, name, revision)
            if file is None:
                continue  # not fetched; another file may hold the embedding
            with safe_open(file, framework="numpy") as tensors:
                for tensor in tensors.keys():  # noqa: SIM118 -- not a dict
                    if tensor.endswith(_EMBEDDING) and not tensor.startswith("vision"):
                        return int(tensors.get_slice(tensor).get_shape()[0])
    # The last four come from an index or a header of another shape.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def warn_if_unlike_base(model: ModelConfig, template: Template) -> None:
    """Warn if a run pools, normalises or prompts unlike the embedder that it starts from."""
    declared = read_declared(model.path, model.revision)
    pooling = declared.pooling
    if pooling is not None and POOLINGS.get(pooling) != model.pooling:
        say_warning(f"model.pooling: {model.pooling}, but {model.path} was made with {pooling!r}")
    if declared.normalize is not None and declared.normalize != model.normalize:
        made = "with" if declared.normalize else "without"
        say_warning(
            f"model.normalize: {model.normalize}, but {model.path} was made {made} normalisation"
        )
    if declared.others:
        say_warning(
            f"{model.path} was made with {', '.join(declared.others)} after its pooling, which "
            "this run neither uses nor exports"
        )
    if declared.dimensions is not None and declared.dimensions != model.dimensions:
        kept = "all numbers" if model.dimensions is None else model.dimensions
        say_warning(
            f"model.dimensions: {kept}, but {model.path} was made to keep the first "
            f"{declared.dimensions} of a vector"
        )
    if model.pool_instruction and not declared.pool_prompt:
        say_warning(
            f"model.pool_instruction: true, but {model.path} was made without the prompt's tokens "
            "in its pooling"
        )
    written = f"{template.query}\n{template.document}"
    for name, prompt in declared.prompts.items():
        if prompt.strip() not in written:
            say_warning(
                f"{model.path} was made with the prompt {prompt!r} ({name}), which the template of "
                "the shards does not write"
            )
