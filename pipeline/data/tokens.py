"""Text to token ids: the tokenizer's own special tokens, one truncation rule, one fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline import tokenizer as tokenizer_files
from pipeline.errors import UserError
from pipeline.tokenizer import cut_before, tokens_within

# Texts on which tokenizers that share a vocabulary still differ: case, spaces, digits, scripts.
_PROBES = (
    "The Quick brown fox.",
    "  two  spaces,\ttab\nnewline\r\n",
    "3.14159 1,000,000 x_1 = -b±√(b²-4ac)",
    "def f(x):\n    return {'a': [x, None]}",
    "naïve Ångström ﬁne 你好，世界 こんにちは Привет 😀",
    "Instruct: Given a problem\nQuery: can't won't I'll",
    "<s></s> [CLS] [SEP] <|endoftext|> <unk>",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """What a dataset records about its tokenizer; compared by fingerprint only.

    All its ids are below `vocab_size`.
    """

    path: str
    fingerprint: str
    vocab_size: int
    eos_id: int | None
    append_eos: bool


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what a tokenizer does: its vocabulary and the ids it gives to probe texts.

    Saving and loading a tokenizer may rewrite its files; it does not change this.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    # Else a probe longer than the model's length is warned of.
    probes = [list(tokenizer(text, verbose=False)["input_ids"]) for text in _PROBES]
    return hashlib.sha256(json.dumps([vocabulary, probes]).encode()).hexdigest()


def load_tokenizer(path: str, *, append_eos: bool) -> tuple[str, TokenizerInfo]:
    """Load a Hugging Face tokenizer folder or name.

    Returns:
        The fast tokenizer as JSON, which `TextEncoder` takes, and what a manifest records.

    Raises:
        UserError: nothing is there, it has no fast form, or it has no EOS to append.
    """
    tokenizer = tokenizer_files.load_tokenizer(path)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer: {path!r} has no fast form",
            fix="convert it to tokenizer.json, which transformers writes with save_pretrained",
        )
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError(
            f"append_eos: true, but the tokenizer {path!r} has no EOS token",
            fix="set append_eos to false or give the tokenizer an eos_token",
        )
    _check_eos_flag(tokenizer, path, append_eos)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    info = TokenizerInfo(
        path=path,
        fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eos_id=tokenizer.eos_token_id,
        append_eos=append_eos,
    )
    return backend.to_str(), info


def _check_eos_flag(tokenizer: Any, path: str, append_eos: bool) -> None:
    """Refuse a tokenizer whose EOS the libraries drop without a word.

    Since version 5 transformers goes by tokenizer.json alone; the flag of tokenizer_config.json, by
    which some published embedders got their EOS, does nothing.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    ends = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    if not ends and not append_eos and get_tokenizer_config(path).get("add_eos_token"):
        raise UserError(
            f"tokenizer: {path!r} says add_eos_token, but its tokenizer.json adds no EOS",
            fix="set append_eos: true, or remove add_eos_token from its tokenizer_config.json",
        )


class TextEncoder:
    """Tokenises whole strings, truncating so that special tokens and EOS stay.

    Args:
        tokenizer_json: from `load_tokenizer`.
        eos_id: the tokenizer's EOS, if it has one.
        append_eos: end every text with EOS, also where the tokenizer's own rule does not.
    """

    def __init__(self, tokenizer_json: str, *, eos_id: int | None, append_eos: bool) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._append = eos_id if append_eos else None
        # Stands for a text of which the tokenizer's normaliser leaves nothing.
        self._nothing = [eos_id or 0]
        # Without room for the appended EOS, truncation would drop it from exactly the long texts.
        ids = self._tokenizer.encode("a").ids
        self._missing = int(append_eos and (not ids or ids[-1] != eos_id))

    def encode(self, texts: Sequence[str], max_length: int) -> list[NDArray[np.int32]]:
        """Token ids of each text, at most `max_length` long, at least one.

        A text that yields `max_length` tokens may have been cut; a shorter one was not.
        """
        nothing = [0] * len(texts)
        return self.encode_framed(texts, max_length, prefixes=nothing, suffixes=nothing)[0]

    def encode_framed(
        self,
        texts: Sequence[str],
        max_length: int,
        *,
        prefixes: Sequence[int],
        suffixes: Sequence[int],
    ) -> tuple[list[NDArray[np.int32]], NDArray[np.int32]]:
        """`encode`, and how many tokens at the front of each row are its instruction's.

        Args:
            texts: whole strings, as their template writes them.
            max_length: tokens after which a text is cut.
            prefixes: characters of each text's instruction.
            suffixes: characters at the end of each text that a cut leaves there.

        Returns:
            (R,) rows of ids, and (R,) tokens of each row's instruction, fewer than the row has.
        """
        room = max_length - self._missing
        backend = self._tokenizer
        ends = any(suffixes)
        if ends:
            backend.no_truncation()
        else:
            backend.enable_truncation(room)
        # The fast form knows no offsets.
        encode = backend.encode_batch if ends or any(prefixes) else backend.encode_batch_fast
        rows, skipped = [], np.zeros(len(texts), dtype=np.int32)
        encodings = zip(encode(list(texts)), texts, prefixes, suffixes, strict=True)
        for number, (encoding, text, prefix, suffix) in enumerate(encodings):
            ids = encoding.ids
            if ends:
                before = len(text) - suffix
                ids = cut_before(ids, encoding.offsets, num_characters=before, max_length=room)
            if self._append is not None and (not ids or ids[-1] != self._append):
                ids = [*ids, self._append]
            rows.append(np.array(ids or self._nothing, dtype=np.int32))
            if prefix:
                skipped[number] = min(tokens_within(encoding.offsets, prefix), len(rows[-1]) - 1)
        return rows, skipped
