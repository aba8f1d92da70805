"""One way to load a tokenizer, for preparing data, for exports and for evaluation; no torch."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.config.declared import model_fix, require_model_place
from pipeline.errors import UserError, blame

_CODE_FIX = (
    "its own code is never run; copy the folder, remove auto_map from its tokenizer_config.json, "
    "and keep a tokenizer.json in it"
)


def load_model_tokenizer(path: str) -> Any:
    """Load the tokenizer of the model that `model.path` names.

    Raises:
        UserError: no whole model is there, or transformers cannot read its tokenizer by itself.
    """
    # Without it transformers makes another tokenizer of the same files.
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise UserError(
            f"model.path: no config.json in {path}",
            allowed="a folder in Hugging Face layout, or a model name in the local cache",
            fix="it holds an adapter: name its base here, and this folder as model.adapter"
            if adapter
            else "name the folder that holds the whole model",
        )
    return load_tokenizer(path, key="model.path")


def load_tokenizer(path: str, *, key: str = "tokenizer") -> Any:
    """Load a Hugging Face tokenizer folder or hub name, never running code that comes with it.

    Args:
        path: of the folder, or the name.
        key: what names it, for messages.

    Raises:
        UserError: nothing there that transformers can read by itself.
    """
    # Inside, because importing transformers takes seconds.
    from transformers import AutoTokenizer, Qwen2Tokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    allowed = "a folder with tokenizer.json, or a model name in the local cache"
    # Dream's tokenizer is remote code around Qwen2's files.
    native = {"Dream": Qwen2Tokenizer}
    require_model_place(path, key=key)
    folder, model_type = Path(path), ""
    local = folder.is_dir() or not _can_reach_hub()
    # A tokenizer without a model is fine; one whose config.json is damaged may be Dream's.
    if not folder.is_dir() or (folder / "config.json").exists():
        found = f"{key}: {path}/config.json cannot be read"
        with blame(found, allowed=allowed, fix=model_fix(path)):
            model_type = _model_type(path, local_only=local)
    kind = native.get(model_type, AutoTokenizer)
    found, fix = f"{key}: cannot load the tokenizer {path!r}", model_fix(path)
    with blame(found, allowed=allowed, fix=fix):
        own_code = "auto_map" in get_tokenizer_config(path, local_files_only=local)
    with blame(found, allowed=allowed, fix=_CODE_FIX if own_code else fix):
        tokenizer = kind.from_pretrained(path, trust_remote_code=False, local_files_only=local)
    files = sorted(getattr(tokenizer, "vocab_files_names", {}).values())
    known = [*files, "*.model", "*.tiktoken", "tekken.json", "vocab.*"]
    if folder.is_dir() and not any(p.is_file() for name in known for p in folder.glob(name)):
        # Transformers makes an empty vocabulary of no file.
        raise UserError(f"{key}: no vocabulary in {path!r}", allowed=", ".join(files))
    return tokenizer


def _model_type(path: str, *, local_only: bool) -> str:
    from transformers import PretrainedConfig

    try:
        found = PretrainedConfig.get_config_dict(path, local_files_only=local_only)
        return str(found[0].get("model_type", ""))
    except OSError:
        if Path(path).is_dir():
            raise
        return ""  # a tokenizer on the hub without a model


def _can_reach_hub() -> bool:
    """Say whether asking the hub can be of use, before its client tries 15 times over minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # the proxy would have to be asked; let the client do so
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def instruction_characters(prefix: str) -> int:
    """Length of what stands before a text, without the space that joins the two.

    Most tokenizers make the space of `Query: ` and the word behind it one token, which is the
    text's; so is the space where they do not.
    """
    return len(prefix.rstrip())


def tokens_within(offsets: Iterable[tuple[int, int]], num_characters: int) -> int:
    """How many tokens at the front of a row hold nothing but the row's first characters.

    Args:
        offsets: where each token begins and ends in the string; special tokens are (0, 0).
        num_characters: from `instruction_characters`; 0 leaves every token to the text.
    """
    if not num_characters:
        return 0
    return sum(1 for _ in takewhile(lambda offset: offset[1] <= num_characters, offsets))


def cut_before(
    ids: list[int], offsets: Sequence[tuple[int, int]], *, num_characters: int, max_length: int
) -> list[int]:
    """Cut a row to `max_length` tokens by leaving out the last tokens of its text only.

    Special tokens at the end, and what the template puts behind the text, are kept.

    Args:
        ids: the whole row, special tokens included.
        offsets: where each token begins and ends in the string; special tokens are (0, 0).
        num_characters: of what stands before the end to keep.
        max_length: tokens of the result, at most.

    Raises:
        UserError: the end alone is longer than that.
    """
    if len(ids) <= max_length:
        return ids
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
