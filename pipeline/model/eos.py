"""The end-of-sequence token of an exported tokenizer, where training appended one."""

from __future__ import annotations

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
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        return
    backend = tokenizer.backend_tokenizer
    eos = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}",
        special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)],
    )
    before = [backend.post_processor] if backend.post_processor else []
    backend.post_processor = processors.Sequence([*before, eos])
