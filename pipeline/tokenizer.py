"""Load tokenizers and turn texts into token ids; no torch.

    load_tokenizer        path -> a Hugging Face tokenizer, which also does what a folder of
                          sentence-transformers does to texts; code in its folder is never run
    load_fast_tokenizer   path -> its JSON form, and the TokenizerInfo that a manifest records
    TextTokenizer         texts -> at most `max_length` ids each, special tokens and EOS kept

A template puts a prefix before each text and a suffix after it. The prefix is measured in
characters, and only tokens that lie wholly within it count as the prefix's (`tokens_within`); a
text that is too long loses its own last tokens, never what follows it (`cut_before`):

    tokens    Query|:| how| many| rows|?| [/|Q]|</s>
    kept      Query|:| how|             [/|Q]|</s>        max_length = 6
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers

from pipeline.config import (
    MODEL_PATHS,
    SENTENCE_CONFIGS,
    local_file,
    model_fix,
    require_model_path,
)
from pipeline.errors import UserError, blame

_CODE_FIX = (
    "its own code is never run; copy the folder, remove auto_map from its tokenizer_config.json, "
    "and keep a tokenizer.json in it"
)


def load_tokenizer(path: str, *, key: str = "tokenizer") -> Any:
    """Load a tokenizer from a folder or hub name, without running code from that folder.

    Messages call it by `key`, the config key that names it.

    Raises:
        UserError: there is no tokenizer, it is damaged, or it needs code from that folder.
    """
    # Inside, because importing transformers takes seconds.
    from transformers import AutoTokenizer, Qwen2Tokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    allowed = "a folder with tokenizer.json, or a model name in the local cache"
    # Dream publishes a tokenizer class, but the files are Qwen2's.
    native = {"Dream": Qwen2Tokenizer}
    require_model_path(path, key=key)
    folder, model_type = Path(path), ""
    # Passed on as `local_files_only`, with which transformers does not ask the hub.
    local = folder.is_dir() or not _can_reach_hub()
    # A folder without a model is fine; one with a damaged config.json might be Dream's.
    if not folder.is_dir() or (folder / "config.json").exists():
        found = f"{key}: {path}/config.json cannot be read"
        with blame(found, allowed=allowed, fix=model_fix(path)):
            model_type = _model_type(path, local_only=local)
    kind = native.get(model_type, AutoTokenizer)
    found, fix = f"{key}: cannot load the tokenizer {path!r}", model_fix(path)
    with blame(found, allowed=allowed, fix=fix):
        has_code = "auto_map" in get_tokenizer_config(path, local_files_only=local)
    with blame(found, allowed=allowed, fix=_CODE_FIX if has_code else fix):
        tokenizer = kind.from_pretrained(path, trust_remote_code=False, local_files_only=local)
        if not local:
            _fetch_text_settings(path)
    files = sorted(getattr(tokenizer, "vocab_files_names", {}).values())
    known = [*files, "*.model", "*.tiktoken", "tekken.json", "vocab.*"]
    if folder.is_dir() and not any(p.is_file() for name in known for p in folder.glob(name)):
        # Without any of these files transformers would make a tokenizer with an empty vocabulary.
        raise UserError(f"{key}: no vocabulary in {path!r}", allowed=", ".join(files))
    length = tokenizer.model_max_length
    # transformers takes any value that JSON has, and would fail when it tokenises the first text.
    if isinstance(length, bool) or not isinstance(length, int | float) or not length > 0:
        raise UserError(
            f"{key}: tokenizer_config.json in {path}: model_max_length is {length!r}",
            allowed="a number above 0",
            fix=fix,
        )
    if lower_casing_file(path, key=key) is not None and tokenizer.is_fast:
        _lower_case(tokenizer)
    return tokenizer


def lower_casing_file(path: str, *, key: str = "tokenizer") -> Path | None:
    """Find the file that has a sentence-transformers folder, or an export, lower-case its texts.

    None where texts keep their capitals, as far as the tokenizer's own files leave them. Reads a
    folder, or the local cache of a hub name.

    Raises:
        UserError: the file is damaged.
    """
    # Without modules.json sentence-transformers reads no settings.
    names = SENTENCE_CONFIGS if local_file(path, "modules.json") else ("diffembed.json",)
    file = next((found for name in names if (found := local_file(path, name))), None)
    if file is None:
        return None
    with blame(f"{key}: {file} cannot be read", fix=model_fix(path)):
        tree = json.loads(file.read_text())
    return file if isinstance(tree, dict) and tree.get("do_lower_case") else None


def _fetch_text_settings(path: str) -> None:
    """Have the hub's cache hold what `lower_casing_file` reads."""
    from transformers.utils import cached_file

    for name in ("modules.json", *SENTENCE_CONFIGS):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if (name == "modules.json") != bool(found):  # no such folder, or the settings are here
            return


def _lower_case(tokenizer: Any) -> None:
    """Make a tokenizer lower-case texts before anything else, as sentence-transformers does."""
    backend = tokenizer.backend_tokenizer
    own: Any = backend.normalizer
    # Unchanged where its own rules do it, so that shards made by them stay what they are.
    if own is None or "A" in own.normalize_str("A"):
        several = isinstance(own, normalizers.Sequence)
        steps = list(own) if several else [own] if own else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def load_model_tokenizer(path: str) -> Any:
    """Load the tokenizer of the model that `model.path` names.

    Raises:
        UserError: the folder holds no whole model, or its tokenizer cannot be loaded.
    """
    # Without config.json transformers would make another tokenizer from the same files.
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise UserError(
            f"model.path: no config.json in {path}",
            allowed=MODEL_PATHS,
            fix="it holds an adapter: name its base here, and this folder as model.adapter"
            if adapter
            else "name the folder that holds the whole model",
        )
    return load_tokenizer(path, key="model.path")


def _model_type(path: str, *, local_only: bool) -> str:
    from transformers import PretrainedConfig

    try:
        found, _ = PretrainedConfig.get_config_dict(path, local_files_only=local_only)
        # A JSON text or list has no keys; loading the model will report it.
        return str(found.get("model_type", "")) if isinstance(found, dict) else ""
    except OSError:
        if Path(path).is_dir():
            raise
        return ""  # a tokenizer on the hub without a model


def _can_reach_hub() -> bool:
    """Try the hub once; without a network its client would retry 15 times over several minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # only the client knows how to go through the proxy
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


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
    """The record of a tokenizer in a dataset's manifest; only fingerprints are compared.

    All its ids are below `vocab_size`.
    """

    path: str
    fingerprint: str
    vocab_size: int
    eos_id: int | None
    append_eos: bool


def load_fast_tokenizer(path: str, *, append_eos: bool) -> tuple[str, TokenizerInfo]:
    """Load the fast form of a tokenizer, the one that worker processes can share.

    Returns:
        The tokenizer as JSON, for `TextTokenizer`, and its record for a manifest.

    Raises:
        UserError: it cannot be loaded, has no fast form, or has no EOS to append.
    """
    tokenizer = load_tokenizer(path)
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
    # In a copy: the files may set truncation and padding, and both are decided per text here.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    info = TokenizerInfo(
        path=path,
        fingerprint=tokenizer_fingerprint(tokenizer),
        # Not `len(tokenizer)`: ids may have gaps, so the largest may be beyond their number.
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eos_id=tokenizer.eos_token_id,
        append_eos=append_eos,
    )
    return backend.to_str(), info


def _check_eos_flag(tokenizer: Any, path: str, append_eos: bool) -> None:
    """Refuse a tokenizer whose EOS the libraries drop silently.

    Some published embedders get their EOS through a flag in tokenizer_config.json, which
    transformers has ignored since version 5: it reads tokenizer.json alone.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    ends = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    if not ends and not append_eos and get_tokenizer_config(path).get("add_eos_token"):
        raise UserError(
            f"tokenizer: {path!r} sets add_eos_token, but its tokenizer.json adds no EOS",
            fix="set append_eos: true, or remove add_eos_token from its tokenizer_config.json",
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash a tokenizer's behaviour: its vocabulary and the ids that it gives to probe texts.

    Loading and saving a tokenizer may rewrite its files; the fingerprint stays the same.
    """
    # Sorted, because the order of a vocabulary may change when its files are rewritten.
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    # `verbose=False`: no warning about probes that are longer than the model's length.
    probes = [list(tokenizer(text, verbose=False)["input_ids"]) for text in _PROBES]
    return hashlib.sha256(json.dumps([vocabulary, probes]).encode()).hexdigest()


class TextTokenizer:
    """Turn whole strings into token ids, truncated so that special tokens and EOS stay.

    Args:
        tokenizer_json: from `load_fast_tokenizer`.
        eos_id: the tokenizer's EOS, if it has one.
        append_eos: end every text with EOS even if the tokenizer's own rules do not.
    """

    def __init__(self, tokenizer_json: str, *, eos_id: int | None, append_eos: bool) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._append = eos_id if append_eos else None
        # Also of a text of which the normaliser leaves nothing.
        self._nothing = row_without_text(eos_id)
        # 1 where EOS is appended here: truncation must leave room for it in long texts. It is 0
        # where the tokenizer adds EOS itself, because truncation then counts it.
        ids = self._tokenizer.encode("a").ids
        self._missing = int(append_eos and (not ids or ids[-1] != eos_id))

    def encode(
        self,
        texts: Sequence[str],
        max_length: int,
        *,
        prefixes: Sequence[int] | None = None,
        suffixes: Sequence[int] | None = None,
    ) -> tuple[list[NDArray[np.int32]], NDArray[np.int32]]:
        """Turn texts into rows of token ids, and count the tokens of their prefixes.

        A row of `max_length` tokens may have been cut; a shorter one was not.

        Args:
            texts: (R,) whole strings, prefix and suffix included.
            max_length: tokens after which a text is cut.
            prefixes: characters of each text's prefix, from `instruction_characters`.
            suffixes: characters at the end of each text that a cut must keep.

        Returns:
            (R,) rows of ids, each of at least one token, and (R,) tokens of each row's prefix,
            fewer than the row has.
        """
        prefixes, suffixes = prefixes or [0] * len(texts), suffixes or [0] * len(texts)
        room = max_length - self._missing
        backend = self._tokenizer
        ends = any(suffixes)
        # On every call, because the library keeps the setting of the last one. Its own truncation
        # would drop the suffix first, so rows with suffixes are cut below.
        if ends:
            backend.no_truncation()
        else:
            backend.enable_truncation(room)
        # The faster call computes no offsets, so it serves only texts without prefix and suffix.
        encode = backend.encode_batch if ends or any(prefixes) else backend.encode_batch_fast
        rows, counts = [], np.zeros(len(texts), dtype=np.int32)
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
                # One fewer than the row has: pooling needs a token that is not the prefix's.
                counts[number] = min(tokens_within(encoding.offsets, prefix), len(rows[-1]) - 1)
        return rows, counts


def row_without_text(eos_id: int | None) -> list[int]:
    """Return the row of a text that a tokenizer makes no token of, because pooling needs one.

    One rule for the shards of training and for what an export embeds.
    """
    return [eos_id or 0]


def instruction_characters(prefix: str) -> int:
    """Return the length of a prefix without the space that joins it to the text.

    Most tokenizers make one token of that space and the next word, and this token belongs to the
    text. So the space counts as text for every tokenizer.
    """
    return len(prefix.rstrip())


def tokens_within(offsets: Iterable[tuple[int, int]], num_characters: int) -> int:
    """Count the tokens at the front of a row that lie wholly within its first characters.

    Args:
        offsets: start and end of each token in the string; special tokens are (0, 0).
        num_characters: from `instruction_characters`; 0 leaves every token to the text.
    """
    if not num_characters:
        return 0
    # A BOS ends at 0, so it counts with the prefix that follows it.
    return sum(1 for _ in takewhile(lambda offset: offset[1] <= num_characters, offsets))


def cut_before(
    ids: list[int], offsets: Sequence[tuple[int, int]], *, num_characters: int, max_length: int
) -> list[int]:
    """Cut a row to `max_length` tokens by dropping only the last tokens of its text.

    Special tokens at the end and the template's suffix are kept.

    Args:
        ids: the whole row, special tokens included.
        offsets: start and end of each token in the string; special tokens are (0, 0).
        num_characters: length of the string without the suffix.
        max_length: largest number of tokens to return.

    Raises:
        UserError: the suffix alone is longer.
    """
    if len(ids) <= max_length:
        return ids
    # From the back to the last token that ends in the text. Special tokens have the offset (0, 0),
    # so those at the end are kept as well.
    kept = 0
    for _, end in reversed(offsets):
        if 0 < end <= num_characters:
            break
        kept += 1
    if kept >= max_length:
        raise UserError(
            f"a maximum length of {max_length} tokens",
            allowed=f"at least {kept + 1}: the end of the template takes {kept}",
            fix="raise the maximum length, or shorten what follows {text} in the template",
        )
    return ids[: max_length - kept] + ids[len(ids) - kept :]
