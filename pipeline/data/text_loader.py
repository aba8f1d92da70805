"""Load batches of plain texts, and open the dataset and the loader of a training run.

step -> example ids -> their first positives, or blocks of joined texts -> chunks -> tokens
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pipeline.config import DataConfig, TrainConfig
from pipeline.data.batch import Chunk, GlobalBatch, IntArray, Ragged
from pipeline.data.loader import DUMMY, Loader
from pipeline.data.order import Group
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.tokenizer import load_model_tokenizer, tokenizer_fingerprint

# The relevance of a batch without queries.
NOTHING = Ragged.from_lengths(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


class TextLoader(Loader):
    """Batches of documents without queries: the text of an example is its first positive.

    Takes the arguments of `Loader`. With `data.block_length` a text is a block of that many tokens
    of one group's texts in their order; the rest at a group's end is dropped.

    Raises:
        UserError: the batch cannot be formed from this dataset.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, **settings: Any) -> None:
        length = config.block_length
        self._blocks = None if length is None else TokenBlocks(dataset, length)
        groups = None if self._blocks is None else self._blocks.groups
        super().__init__(dataset, config, groups=groups, **settings)

    def batch(self, step: int) -> GlobalBatch:
        """Return the batch of a step; depends on nothing that happened before."""
        ids, documents, lengths = self._draw_texts(step)
        return GlobalBatch(
            step=step,
            num_queries=0,
            num_documents=len(ids),
            chunks=tuple(
                self._read_texts(texts, lengths, documents)
                for texts in self._plan(lengths)[self._rank]
            ),
            positives=NOTHING,
            negatives=NOTHING,
            masked=NOTHING,
            example_ids=ids,
            tokens=int(lengths.sum()),
            kind=self.order.kind(step),
        )

    def _lengths(self, step: int) -> IntArray:
        return self._draw_texts(step)[2]

    def _draw_texts(self, step: int) -> tuple[IntArray, IntArray, IntArray]:
        """Return (N,) examples of a step, the document or block of each, and its length."""
        ids = self.order.batch(step)
        if self._blocks is not None:
            return ids, ids, np.full(len(ids), self._blocks.length, dtype=np.int64)
        documents = _documents(self.dataset, ids)
        return ids, documents, self.dataset.documents.lengths("tokens", documents)

    def _read_texts(self, texts: IntArray, lengths: IntArray, documents: IntArray) -> Chunk:
        if not len(texts):
            return DUMMY
        if self._blocks is None:
            views = self.dataset.documents.views("tokens", documents[texts])
        else:
            views = [self._blocks.read(int(block)) for block in documents[texts]]
        return Chunk(input_ids=self._join(views), lengths=lengths[texts], texts=texts)


def _documents(dataset: Dataset, ids: IntArray) -> IntArray:
    """(N,) document that is the text of each example."""
    found = dataset.examples.first("positives", ids)
    count = len(dataset.documents)
    if found.min() < 0 or found.max() >= count:
        raise dataset.damaged(f"an example refers to documents outside 0..{count - 1}")
    return found


class TokenBlocks:
    """Each group's texts joined in the order of their examples and cut into equal blocks.

    Args:
        dataset: an opened dataset folder.
        length: tokens of a block.

    Attributes:
        groups: the dataset's groups, with blocks instead of examples.

    Raises:
        UserError: no group has a whole block.
    """

    def __init__(self, dataset: Dataset, length: int) -> None:
        self.length = length
        self._dataset = dataset
        self._joined: list[_JoinedTexts] = []
        groups: list[Group] = []
        start = 0
        for group in dataset.manifest.groups:
            ids = np.arange(group.start, group.start + group.count, dtype=np.int64)
            documents = _documents(dataset, ids)
            ends = np.cumsum(dataset.documents.lengths("tokens", documents))
            # Whole blocks only, so that all texts of a batch have the same length.
            count = int(ends[-1]) // length
            if count:
                self._joined.append(_JoinedTexts(documents=documents, ends=ends))
                groups.append(dataclasses.replace(group, start=start, count=count))
                start += count
        if not groups:
            raise UserError(
                f"data.block_length: {length}, more tokens than any source of {dataset.folder} has",
                fix="lower data.block_length, or prepare more text",
            )
        self.groups = tuple(groups)
        self._starts = np.array([group.start for group in groups], dtype=np.int64)

    def read(self, block: int) -> IntArray:
        """(length,) tokens of a block."""
        number = int(np.searchsorted(self._starts, block, side="right")) - 1
        texts = self._joined[number]
        start = (block - int(self._starts[number])) * self.length
        # The documents from the one that holds the block's first token to the one with its last.
        first = int(np.searchsorted(texts.ends, start, side="right"))
        last = int(np.searchsorted(texts.ends, start + self.length, side="left"))
        views = self._dataset.documents.views("tokens", texts.documents[first : last + 1])
        offset = start - (int(texts.ends[first - 1]) if first else 0)
        joined: IntArray = np.concatenate(views)[offset : offset + self.length]
        return joined


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _JoinedTexts:
    """The texts of a group, one after another."""

    documents: IntArray  # (N,)
    ends: IntArray  # (N,) tokens up to the end of each document


# Batches whose queries are checked for negatives before a run starts.
_CHECKED_STEPS = 8


def open_dataset(config: TrainConfig, *, verify: bool) -> Dataset:
    """Open the shards and check that the model can train on them.

    Args:
        config: paths of the shards and the model.
        verify: compare the hash of every shard; after a flipped bit, a token may still look valid.

    Raises:
        UserError: a shard is damaged, was made with another tokenizer than the model's, or holds
            texts that the model cannot take.
    """
    dataset = Dataset.open(config.data.path, verify=verify)
    path = config.model.path
    dataset.require_tokenizer(tokenizer_fingerprint(load_model_tokenizer(path)), path)
    dataset.require_model(config.model)
    return dataset


def make_loader(dataset: Dataset, config: TrainConfig, *, rank: int, world_size: int) -> Loader:
    """Return the loader of one rank of a training run, as training and planning use it."""
    kind = Loader if config.objective is None else TextLoader
    return kind(
        dataset,
        config.data,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        max_chunk_tokens=config.chunks.max_tokens,
        max_chunk_cost=config.chunks.max_cost,
        min_chunks=config.chunks.min_chunks,
    )


def require_negatives(loader: Loader, config: TrainConfig) -> str:
    """Check that queries of the first batches have negatives.

    Returns:
        A warning about the queries that have none; empty where all have some.

    Raises:
        UserError: no query has any, so that there is nothing to learn.
    """
    distilled = config.loss.distillation is not None
    if config.objective is not None or distilled:
        return ""
    steps = min(config.num_steps, _CHECKED_STEPS)
    own = config.loss.negatives == "own"
    counts = np.concatenate([loader.num_negatives(step, own=own) for step in range(steps)])
    lacking = int((counts == 0).sum())
    found = f"{lacking} of {len(counts)} queries in the first {steps} batches have no negative"
    if lacking == len(counts):
        queries, documents = loader.num_different(0)
        raise UserError(
            f"data.path: {loader.dataset.folder}: {found} "
            f"(different queries in the first batch: {queries}, different documents: {documents})",
            allowed="batches in which a query finds documents that do not answer it",
            fix="check that columns name the right fields, or give hard negatives"
            + (", or set loss.negatives: batch" if own else ""),
        )
    return f"{found}: they teach nothing" if lacking else ""
