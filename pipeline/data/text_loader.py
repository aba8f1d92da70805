"""Load batches of plain texts and hide tokens in them; open the loader of any training run.

step -> example ids -> their first positives, or blocks of joined texts -> chunks -> tokens

A model that predicts tokens sees some of them hidden:

    objective          hidden                       predicted
    next_token         nothing                      every token but the first of a row
    mntp               `mask_rate` of the tokens    the hidden tokens
    masked_diffusion   a random share of each row   the hidden tokens, weighted by 1 / share

The draw for a token is a hash of (seed, step, id of its text, its position), so that it depends
neither on ranks nor on chunks nor on the order of work.

Letters: T tokens of a chunk, C its rows, P predictions, N texts of the global batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DataConfig, MntpConfig, ObjectiveConfig, TrainConfig
from pipeline.data.batch import Chunk, GlobalBatch, IntArray, Ragged
from pipeline.data.loader import DUMMY, Loader
from pipeline.data.order import Group, make_key, uniform
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.tokenizer import load_model_tokenizer, tokenizer_fingerprint

FloatArray = NDArray[np.float64]
_Bools = NDArray[np.bool_]
# Purposes of draws: the share of a row that is hidden, which tokens, how, and by which token.
_SHARE, _HIDE, _REPLACE, _TOKEN = range(4, 8)
# BERT's shares: mask token below the first, random token below the second, unchanged above.
_BERT_MASK, _BERT_RANDOM = 0.8, 0.9
# The smallest share of a row, which bounds the weight of its tokens; as LLaDA was trained.
_MIN_SHARE = 1e-3

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
    # Before the first values are read: of an empty list that would be the next example's.
    if dataset.examples.lengths("positives", ids).min() < 1:
        raise dataset.damaged("an example without a positive")
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
        # From the document with the block's first token to the one with its last.
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Token ids that masking needs."""

    size: int
    mask: int  # -1 where nothing is masked
    special: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The tokens that the model sees of a chunk, and the tokens that it has to predict.

    The loss of a global batch is the sum of weight * cross-entropy over the predictions of all
    chunks, divided by the sum of their `total`.
    """

    input_ids: IntArray  # (T,) with tokens hidden
    states: IntArray  # (P,) index in 0..T-1 of the hidden state that predicts
    labels: IntArray  # (P,) the token to predict
    weights: FloatArray  # (P,)
    total: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """A chunk's tokens, each with its text and position."""

    ids: IntArray  # (T,)
    text: IntArray  # (T,) id of the text, the same on every rank and in every chunk
    position: IntArray  # (T,) in its row
    row: IntArray  # (T,) row of the chunk


def predict(
    chunk: Chunk,
    objective: ObjectiveConfig,
    vocabulary: Vocabulary,
    *,
    text_ids: IntArray,
    shift: bool,
    seed: int,
    step: int,
) -> Prediction:
    """Hide tokens of a chunk and list what to predict from which hidden state.

    A token that no hidden state can predict (the first of a row, where predictions are shifted) is
    never hidden. A chunk with nothing to predict gets one prediction of weight 0, so that all
    ranks have the same gradients to reduce.

    Args:
        text_ids: (N,) an id of each text of the global batch, which decides its draws.
        shift: whether a token is predicted from the hidden state before it.
    """
    if chunk.is_dummy:
        return _pad(chunk.input_ids)
    row = np.repeat(np.arange(len(chunk.lengths), dtype=np.int64), chunk.lengths)
    first = np.cumsum(chunk.lengths) - chunk.lengths
    tokens = _Tokens(
        ids=chunk.input_ids,
        text=text_ids[chunk.texts][row],
        position=np.arange(len(row), dtype=np.int64) - first[row],
        row=row,
    )

    def draw(purpose: int, *parts: IntArray) -> FloatArray:
        return uniform(make_key(seed, purpose, step), *parts)

    predictable = tokens.position > 0 if shift else np.ones(len(row), dtype=np.bool_)
    if objective.next_token is not None:
        return _predict_marked(tokens, tokens.ids, predictable, shift)
    if objective.mntp is not None:
        predictable &= ~np.isin(tokens.ids, list(vocabulary.special))
        chance = draw(_HIDE, tokens.text, tokens.position)
        hidden = predictable & (chance < objective.mntp.mask_rate)
        ids = _replace(tokens, hidden, objective.mntp, vocabulary, draw)
        return _predict_marked(tokens, ids, hidden, shift)
    # Masked diffusion: the mean over rows of the mean over their tokens, weighted by 1 / share.
    share = _MIN_SHARE + (1 - _MIN_SHARE) * draw(_SHARE, tokens.text)
    hidden = predictable & (draw(_HIDE, tokens.text, tokens.position) < share)
    # Divided by the row's tokens and its share: an unbiased mean over the row.
    tokens_of_row = np.bincount(row[predictable], minlength=len(chunk.lengths))
    weights = 1 / (share[hidden] * tokens_of_row[row[hidden]])
    ids = np.where(hidden, vocabulary.mask, tokens.ids)
    # Rows in which nothing was hidden count: without them the mean would be too large.
    total = float((tokens_of_row > 0).sum())
    return _predict_marked(tokens, ids, hidden, shift, weights=weights, total=total)


def _replace(
    tokens: _Tokens,
    hidden: _Bools,
    config: MntpConfig,
    vocabulary: Vocabulary,
    draw: Callable[..., FloatArray],
) -> IntArray:
    """(T,) tokens with the hidden ones replaced, by BERT's shares or all by the mask token."""
    if config.replace == "all":
        return np.where(hidden, vocabulary.mask, tokens.ids)
    how = draw(_REPLACE, tokens.text, tokens.position)
    # A random token may be any id, special ones and the right one among them, as in BERT.
    other = (draw(_TOKEN, tokens.text, tokens.position) * vocabulary.size).astype(np.int64)
    replaced = np.where(how < _BERT_MASK, vocabulary.mask, other)
    return np.where(hidden & (how < _BERT_RANDOM), replaced, tokens.ids)


def _predict_marked(
    tokens: _Tokens,
    ids: IntArray,
    predicted: _Bools,
    shift: bool,
    *,
    weights: FloatArray | None = None,
    total: float | None = None,
) -> Prediction:
    """Predict the marked tokens; by default the loss is the mean over them."""
    positions = np.flatnonzero(predicted)
    if not len(positions):
        return _pad(ids, total or 0.0)
    return Prediction(
        input_ids=ids,
        # Never a state of the row before: where predictions are shifted, no row's first token is
        # among the positions.
        states=positions - int(shift),
        labels=tokens.ids[positions],
        weights=np.ones(len(positions)) if weights is None else weights,
        total=float(len(positions)) if total is None else total,
    )


def _pad(ids: IntArray, total: float = 0.0) -> Prediction:
    """Return one prediction that does not count."""
    nothing = np.zeros(1, dtype=np.int64)
    return Prediction(
        input_ids=ids, states=nothing, labels=nothing, weights=np.zeros(1), total=total
    )


# Batches whose queries are checked for negatives before a run starts.
_CHECKED_STEPS = 8
_MANY_EPOCHS = 10


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
        teacher_vectors=config.loss.needs_vectors,
    )


def require_negatives(loader: Loader, config: TrainConfig) -> str:
    """Check that queries of the first batches have negatives.

    Returns:
        A warning about the queries that have none; empty where all have some.

    Raises:
        UserError: no query has any, so that there is nothing to learn.
    """
    # Tokens need no negatives, and a teacher's scores teach without any.
    if config.objective is not None or config.loss.distillation is not None:
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


def _require_scores(loader: Loader, config: TrainConfig) -> None:
    """Check that each example that is drawn has a teacher's scores, if the loss learns them."""
    dataset = loader.dataset
    if not config.loss.distils_own or not dataset.manifest.has_scores:
        return  # a dataset without any is refused by `LossConfig.require_fit`
    for unit in loader.order.units:
        ids = unit.example_ids(np.arange(unit.size))
        lacking = dataset.examples.lengths("scores", ids) == 0
        if config.data.candidates is not None:
            candidates = dataset.examples.lengths("candidates", ids)
            lacking |= dataset.examples.lengths("candidate_scores", ids) < candidates
        if lacking.any():
            source = unit.groups[0].source
            raise UserError(
                f"data.path: {dataset.folder}: {int(lacking.sum()):,} of {unit.size:,} examples of "
                f"source {source} have no teacher's scores (the first is {ids[lacking][0]})",
                allowed="scores in every example that loss.distillation draws",
                fix=f"set data.weights: {{{source}: 0}}, score the rows with a teacher in "
                "`diffembed mine`, or remove loss.distillation",
            )


def data_warnings(
    loader: Loader, config: TrainConfig, *, num_examples: int | None = None
) -> list[str]:
    """Check that batches and steps suit the data; return what a user should know before the run.

    Args:
        loader: of the run.
        config: its config.
        num_examples: of data that is only described; None counts the loader's.

    Raises:
        UserError: no query has a negative, so that there is nothing to learn; or scores are
            learned that examples do not have.
    """
    if config.objective is not None:
        return []
    _require_scores(loader, config)
    found = [require_negatives(loader, config)]
    size = config.data.global_batch_size
    documents = loader.num_different(0)[1]
    # Two for each query are usual: a positive and a hard negative.
    if 2 * documents < size and config.loss.negatives != "own":
        found.append(
            f"a batch of {size:,} queries holds only {documents:,} different documents of "
            f"{loader.dataset.manifest.num_documents:,}; a larger data.global_batch_size adds "
            "queries, but hardly a negative"
        )
    examples = num_examples or sum(unit.size for unit in loader.order.units)
    epochs = config.num_steps * size / examples
    if epochs > _MANY_EPOCHS:
        found.append(
            f"{epochs:.0f} epochs of {examples:,} examples; after about {_MANY_EPOCHS} a model "
            "learns them by heart: lower num_steps, or compare scores of earlier checkpoints"
        )
    return [warning for warning in found if warning]
