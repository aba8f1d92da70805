"""Hide tokens of a chunk, and list the predictions that the model has to make.

    objective          hidden                       predicted
    next_token         nothing                      every token but the first of a row
    mntp               `mask_rate` of the tokens    the hidden tokens
    masked_diffusion   a random share of each row   the hidden tokens, weighted by 1 / share

The draw for a token is a hash of (seed, step, id of its text, its position), so that chance depends
neither on ranks nor on chunks nor on the order of work.

Letters: T tokens of a chunk, C its rows, P predictions, N texts of the global batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.config import MntpConfig, ObjectiveConfig
from pipeline.data.batch import Chunk, IntArray
from pipeline.data.order import make_key, uniform

FloatArray = NDArray[np.float64]
_Bools = NDArray[np.bool_]
# Purposes of draws: the share of a row that is hidden, which tokens, how, and by which token.
_SHARE, _HIDE, _REPLACE, _TOKEN = range(4, 8)
# BERT's shares: mask token below the first, random token below the second, unchanged above.
_BERT_MASK, _BERT_RANDOM = 0.8, 0.9
# The smallest share of a row, which bounds the weight of its tokens; as LLaDA was trained.
_MIN_SHARE = 1e-3


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

    def draw(purpose: int) -> Callable[..., FloatArray]:
        key = make_key(seed, purpose, step)
        return lambda *parts: uniform(key, *parts)

    predictable = tokens.position > 0 if shift else np.ones(len(row), dtype=np.bool_)
    if objective.next_token is not None:
        return _predict_marked(tokens, tokens.ids, predictable, shift)
    if objective.mntp is not None:
        predictable &= ~np.isin(tokens.ids, list(vocabulary.special))
        chance = draw(_HIDE)(tokens.text, tokens.position)
        hidden = predictable & (chance < objective.mntp.mask_rate)
        ids = _replace(tokens, hidden, objective.mntp, vocabulary, draw)
        return _predict_marked(tokens, ids, hidden, shift)
    # Masked diffusion: the mean over rows of the mean over their tokens, weighted by 1 / share.
    share = _MIN_SHARE + (1 - _MIN_SHARE) * draw(_SHARE)(tokens.text)
    hidden = predictable & (draw(_HIDE)(tokens.text, tokens.position) < share)
    # Divided by the row's tokens and its share: an unbiased mean over the row.
    tokens_of_row = np.bincount(row[predictable], minlength=len(chunk.lengths))
    weights = 1 / (share[hidden] * tokens_of_row[row[hidden]])
    ids = np.where(hidden, vocabulary.mask, tokens.ids)
    total = float((tokens_of_row > 0).sum())
    return _predict_marked(tokens, ids, hidden, shift, weights=weights, total=total)


def _replace(
    tokens: _Tokens,
    hidden: _Bools,
    config: MntpConfig,
    vocabulary: Vocabulary,
    draw: Callable[[int], Callable[..., FloatArray]],
) -> IntArray:
    """(T,) tokens with the hidden ones replaced, by BERT's shares or all by the mask token."""
    if config.replace == "all":
        return np.where(hidden, vocabulary.mask, tokens.ids)
    how = draw(_REPLACE)(tokens.text, tokens.position)
    # A random token may be any id, special ones and the right one among them, as in BERT.
    other = (draw(_TOKEN)(tokens.text, tokens.position) * vocabulary.size).astype(np.int64)
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
