"""Tokenizers as an encoder needs them: loaded without remote code, ending in EOS if trained so."""

from __future__ import annotations

from typing import Any

from tokenizers import processors
from transformers import AutoTokenizer

from pipeline.errors import UserError


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer folder or hub name.

    Raises:
        UserError: nothing there that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer: cannot load {path!r} ({str(error).splitlines()[0]})",
            fix="give a folder with tokenizer.json, or a model name in the local cache",
        ) from error


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
