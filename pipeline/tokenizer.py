"""Load tokenizers, and read the lengths and ids that a model accepts; no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.config import POOLINGS, ModelConfig, Template, local_file, read_declared
from pipeline.config.model import model_fix, require_model_place
from pipeline.errors import UserError, blame, say_warning

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


def describe_tokenizer(path: str, *, append_eos: bool) -> tuple[str, TokenizerInfo]:
    """Load a Hugging Face tokenizer folder or name.

    Returns:
        The fast tokenizer as JSON, which `TextEncoder` takes, and what a manifest records.

    Raises:
        UserError: nothing is there, it has no fast form, or it has no EOS to append.
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
