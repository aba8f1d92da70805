"""What to predict in a text and what to hide for it, as pure functions of seed, step and text.

T tokens of a chunk, C its rows, P predictions. Chance never depends on ranks, chunks or the order
of work: the draw for a token is a hash of (seed, step, id of its text, its position).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.config import MntpConfig, ObjectiveConfig
from pipeline.data.batch import Chunk, IntArray
from pipeline.data.keyed import make_key, uniform

FloatArray = NDArray[np.float64]
_Bools = NDArray[np.bool_]

# What the draws are for: the level of a row, which tokens are hidden, by what, by which token.
_LEVEL, _HIDE, _REPLACE, _TOKEN = range(4, 8)
# BERT's shares: mask token below the first, random token below the second, unchanged above.
_BERT_MASK, _BERT_RANDOM = 0.8, 0.9
# The smallest level of a row, which bounds the weight of its tokens; as LLaDA was trained.
_MIN_LEVEL = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The ids that masking deals with."""

    size: int
    mask: int  # -1 where nothing is masked
    special: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What the model sees of a chunk and what it must say about it.

    The loss of a global batch is the sum of weight * cross-entropy over the predictions of all
    chunks, divided by the sum of their `total`.
    """

    input_ids: IntArray  # (T,) with tokens hidden
    states: IntArray  # (P,) place in 0..T-1 of the hidden state that predicts
    labels: IntArray  # (P,) the token it must give
    weights: FloatArray  # (P,)
    total: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """A chunk's tokens, each with its text and place."""

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
    """Hide tokens of a chunk and say what has to be predicted from where.

    A token that no hidden state may predict (the first of a row, where predictions are shifted) is
    never hidden. A chunk with nothing to predict gets one prediction of weight 0, so that all
    ranks have the same gradients to reduce.

    Args:
        text_ids: (N,) for each text of the global batch, an id that decides its chance.
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

    may = tokens.position > 0 if shift else np.ones(len(row), dtype=np.bool_)
    if objective.next_token is not None:
        return _ask(tokens, tokens.ids, may, shift)
    if objective.mntp is not None:
        may &= ~np.isin(tokens.ids, list(vocabulary.special))
        hidden = may & (draw(_HIDE)(tokens.text, tokens.position) < objective.mntp.mask_rate)
        return _ask(
            tokens, _replace(tokens, hidden, objective.mntp, vocabulary, draw), hidden, shift
        )
    # Masked diffusion: the mean over rows of the mean over their tokens, each at its row's level.
    level = _MIN_LEVEL + (1 - _MIN_LEVEL) * draw(_LEVEL)(tokens.text)
    hidden = may & (draw(_HIDE)(tokens.text, tokens.position) < level)
    tokens_of_row = np.bincount(row[may], minlength=len(chunk.lengths))
    weights = 1 / (level[hidden] * tokens_of_row[row[hidden]])
    ids = np.where(hidden, vocabulary.mask, tokens.ids)
    total = float((tokens_of_row > 0).sum())
    return _ask(tokens, ids, hidden, shift, weights=weights, total=total)


def _replace(
    tokens: _Tokens,
    hidden: _Bools,
    config: MntpConfig,
    vocabulary: Vocabulary,
    draw: Callable[[int], Callable[..., FloatArray]],
) -> IntArray:
    """(T,) tokens with the hidden ones replaced."""
    if config.replace == "all":
        return np.where(hidden, vocabulary.mask, tokens.ids)
    how = draw(_REPLACE)(tokens.text, tokens.position)
    other = (draw(_TOKEN)(tokens.text, tokens.position) * vocabulary.size).astype(np.int64)
    replaced = np.where(how < _BERT_MASK, vocabulary.mask, other)
    return np.where(hidden & (how < _BERT_RANDOM), replaced, tokens.ids)


def _ask(
    tokens: _Tokens,
    ids: IntArray,
    predicted: _Bools,
    shift: bool,
    *,
    weights: FloatArray | None = None,
    total: float | None = None,
) -> Prediction:
    """Predict the marked tokens; by default the loss is the mean over them."""
    places = np.flatnonzero(predicted)
    if not len(places):
        return _pad(ids, total or 0.0)
    return Prediction(
        input_ids=ids,
        states=places - int(shift),
        labels=tokens.ids[places],
        weights=np.ones(len(places)) if weights is None else weights,
        total=float(len(places)) if total is None else total,
    )


def _pad(ids: IntArray, total: float = 0.0) -> Prediction:
    """One prediction that counts nothing."""
    nothing = np.zeros(1, dtype=np.int64)
    return Prediction(
        input_ids=ids, states=nothing, labels=nothing, weights=np.zeros(1), total=total
    )
