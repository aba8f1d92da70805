"""How many tokens of one text a model has positions for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

# Families that look a position up in a table, and whether rows of it come before the first one.
_TABLES = {"gpt2": False, "bert": False, "roberta": True, "xlm-roberta": True}


def trained_positions(hf_config: Mapping[str, Any]) -> int | None:
    """Return the length that a model was made for; None where its config.json does not say."""
    size = hf_config.get("max_position_embeddings", hf_config.get("n_positions"))
    if not isinstance(size, int) or size < 1:
        return None
    if not _TABLES.get(hf_config.get("model_type", "")):
        return size
    # RoBERTa counts positions from the one after the padding token's id.
    padding = hf_config.get("pad_token_id")
    return size - (1 if padding is None else padding) - 1


def position_limit(hf_config: Mapping[str, Any]) -> int | None:
    """Return the longest text that a model can embed at all; None for rotary positions.

    Args:
        hf_config: keys of config.json; those left out there must be filled in.
    """
    return trained_positions(hf_config) if hf_config.get("model_type") in _TABLES else None


def check_position_limit(length: int, hf_config: Mapping[str, Any], *, key: str) -> None:
    """Refuse a length for which the model has no positions.

    Args:
        length: in tokens.
        hf_config: keys of config.json, whole.
        key: the config key or flag that asks for the length.

    Raises:
        UserError: the model's table of positions is shorter.
    """
    limit = position_limit(hf_config)
    if limit is not None and length > limit:
        raise UserError(
            f"{key}: {length} tokens, but this {hf_config['model_type']} has {limit} positions",
            allowed=f"at most {limit}",
        )
