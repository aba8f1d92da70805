"""The word-level probing task."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pipeline.config.rules import UserPath, require, strict


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """A linear classifier of words on a frozen model: `diffembed probe CONFIG`.

    The word task of LLM2Vec (arXiv 2404.05961, section 4.1).

    Args:
        model: an export; `diffembed export --checkpoint init` makes one of an untrained model.
        train, test: words and tags, in CoNLL-2003's columns (word, pos, chunk, ner) or as JSON
            lines with `tokens` and `pos_tags`, `chunk_tags` or `ner_tags`.
        labels: whether a word is classified by its own tokens, or by the token before each of them.
        merge_subwords: take the mean over a word's tokens, not its first token alone.
        max_length: tokens after which a sentence is cut.
        max_tokens: packed tokens of one forward.
        batch_size: words per update of the classifier.
    """

    output_dir: UserPath
    model: UserPath
    train: UserPath
    test: UserPath
    task: Literal["pos", "chunk", "ner"]
    labels: Literal["same_token", "next_token"] = "same_token"
    merge_subwords: bool = True
    max_length: int = 512
    max_tokens: int = 16384
    dropout: float = 0.1
    lr: float = 5e-4
    num_epochs: int = 5
    batch_size: int = 256
    seed: int = 42

    def __post_init__(self) -> None:
        for key in ("max_length", "max_tokens", "num_epochs", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "an integer >= 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 <= dropout < 1")
        require(self.lr > 0, "lr", self.lr, "a number > 0")
