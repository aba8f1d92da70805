"""The tokenizer of an export: cuts, ends and pads texts by itself as they were in training."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import processors

from pipeline.errors import UserError
from pipeline.tokenizer import load_tokenizer

# Tokens that vocabularies reserve for padding, for models that declare none.
_PAD_NAMES = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",  # Llama 3.1 and later
    "<|endoftext|>",  # Qwen
)


def tokenizer_to_write(
    path: str, *, appends_eos: bool, max_length: int, num_embeddings: int
) -> Any:
    """Return the tokenizer of the training data, ready to be saved with a model.

    Args:
        path: folder or hub name.
        appends_eos: whether texts got an end-of-sequence token.
        max_length: tokens after which a text is cut.
        num_embeddings: rows of the model's embedding.

    Raises:
        UserError: it has no EOS token although texts got one, or no token to pad with.
    """
    tokenizer = load_tokenizer(path)
    if appends_eos:
        append_eos(tokenizer)
    _give_pad_token(tokenizer, num_embeddings)
    # The folder has no code of the published model, and needs none.
    tokenizer.init_kwargs.pop("auto_map", None)
    # As the training data were made, whatever the published tokenizer says.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = max_length
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


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


def _give_pad_token(tokenizer: Any, num_embeddings: int) -> None:
    """Give a tokenizer that cannot pad a token to pad with, as users of such models do.

    A token made for padding if the vocabulary has one, else EOS, BOS or the unknown token. It is
    one that is special already, or texts that contain it would get other ids; and one that has a
    row in the embedding, which is looked up before padding is masked.

    Raises:
        UserError: there is no such token.
    """
    special = {
        str(token)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number < num_embeddings
    }
    if str(tokenizer.pad_token) in special:
        return
    named = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    reserved = [name for name in _PAD_NAMES if name in special]
    for name in (*reserved, *named, *sorted(special)):
        if name in special:
            tokenizer.pad_token = name
            return
    raise UserError(
        f"tokenizer: {tokenizer.name_or_path} has no special token to pad a batch with",
        fix="give it an eos_token or a pad_token with a row in the model's embedding",
    )
