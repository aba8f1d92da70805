"""Tokens of an earlier dataset, for the documents that its length limit did not cut."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.building.plan import Build, Hashes
from pipeline.data.shards import Dataset
from pipeline.errors import UserError


def earlier_tokens(build: Build, hashes: Hashes) -> list[tuple[NDArray[np.int32], int] | None]:
    """For each document its tokens, and how many are its instruction's; None where not whole."""
    found: list[tuple[NDArray[np.int32], int] | None] = [None] * len(hashes)
    if build.config.reuse is None:
        return found
    dataset = open_earlier(build)
    stored = _stored_hashes(build.config.reuse)
    places = np.minimum(np.searchsorted(stored, hashes), len(stored) - 1)
    rows = np.flatnonzero(stored[places] == hashes)
    lengths = dataset.documents.lengths("tokens", places[rows])
    # A text that reaches the earlier limit may have been cut there.
    whole = lengths < dataset.max_document_length
    whole &= lengths <= build.config.max_document_length
    rows = rows[whole]
    views = dataset.documents.views("tokens", places[rows])
    skipped = dataset.documents.scalars("instruction_tokens", places[rows])
    for row, view, count in zip(rows.tolist(), views, skipped.tolist(), strict=True):
        found[row] = view.astype(np.int32), count
    return found


def open_earlier(build: Build) -> Dataset:
    """The dataset named by `reuse`.

    Raises:
        UserError: it was made with another tokenizer, or with other special tokens.
    """
    assert build.config.reuse is not None
    dataset = _open(build.config.reuse)
    earlier, own = dataset.tokenizer, build.plan.tokenizer
    if (earlier.fingerprint, earlier.append_eos) != (own.fingerprint, own.append_eos):
        raise UserError(
            f"reuse: {build.config.reuse} was prepared with another tokenizer or append_eos than "
            f"{build.config.tokenizer}",
            fix="remove `reuse` from the config",
        )
    return dataset


@functools.lru_cache(maxsize=1)
def _open(path: Path) -> Dataset:
    return Dataset.open(path)


@functools.lru_cache(maxsize=1)
def _stored_hashes(path: Path) -> Hashes:
    """Hashes of all documents of a dataset; they are sorted, as documents are."""
    return _open(path).documents.hashes()
