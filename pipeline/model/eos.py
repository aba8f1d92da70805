"""The end-of-sequence token of an exported tokenizer, where training appended one."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import processors

from pipeline.errors import UserError


def append_eos(tokenizer: Any) -> None:
    """Make a tokenizer end every text with its EOS, within the length it truncates to.

    Does nothing to one that already does.

    Raises:
        UserError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token is None:
        raise UserError("tokenizer: it has no EOS token", fix="prepare with append_eos: false")
    ids, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    if ids[-1] == tokenizer.eos_token_id:
        return
    # One template for all of them: of two in a row the library applies only the first.
    start = next(k for k in range(len(ids)) if ids[k : k + len(bare)] == bare)
    before, after = ids[:start], [*ids[start + len(bare) :], tokenizer.eos_token_id]
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in (*before, *after)}
    template = processors.TemplateProcessing(
        single=[*(names[token] for token in before), "$A", *(names[token] for token in after)],
        special_tokens=[(name, token) for token, name in names.items()],
    )
    backend = tokenizer.backend_tokenizer
    kept = [processors.ByteLevel(**options) for options in _byte_levels(backend)]
    backend.post_processor = processors.Sequence([*kept, template])


def _byte_levels(backend: Any) -> list[dict[str, Any]]:
    """Options of the post-processors that change offsets and add no token."""
    tree = json.loads(backend.to_str())["post_processor"] or {}
    parts = tree.get("processors", [tree])
    return [
        {key: value for key, value in part.items() if key != "type"}
        for part in parts
        if part.get("type") == "ByteLevel"
    ]
