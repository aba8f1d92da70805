"""Hidden and predicted tokens, compared with published collators and papers' definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DataCollatorForLanguageModeling

from pipeline.config import MaskedDiffusionConfig, MntpConfig, NextTokenConfig, ObjectiveConfig
from pipeline.data.batch import Chunk
from pipeline.data.loader import DUMMY
from pipeline.data.text_loader import Prediction, Vocabulary, predict

SIZE, MASK = 1000, 999
VOCABULARY = Vocabulary(size=SIZE, mask=MASK, special=frozenset({0, 1}))
MNTP = ObjectiveConfig(mntp=MntpConfig())
DIFFUSION = ObjectiveConfig(masked_diffusion=MaskedDiffusionConfig())
NEXT = ObjectiveConfig(next_token=NextTokenConfig())


def make_chunk(lengths: list[int], texts: list[int] | None = None) -> Chunk:
    """Tokens that are a function of text and position, ids 2 to SIZE - 2."""
    texts = list(range(len(lengths))) if texts is None else texts
    rows = [
        2 + np.random.default_rng(text).integers(0, SIZE - 3, size=length)
        for text, length in zip(texts, lengths, strict=True)
    ]
    return Chunk(
        input_ids=np.concatenate(rows).astype(np.int64),
        lengths=np.array(lengths, dtype=np.int64),
        texts=np.array(texts, dtype=np.int64),
    )


def ask(chunk: Chunk, objective: ObjectiveConfig, **changes: Any) -> Prediction:
    settings = {"text_ids": np.arange(5000), "shift": True, "seed": 3, "step": 5, **changes}
    return predict(chunk, objective, VOCABULARY, **settings)


class _Tokenizer:
    """The part of a tokenizer that the collator needs."""

    mask_token, pad_token_id = "[MASK]", 0

    def __len__(self) -> int:
        return SIZE

    def convert_tokens_to_ids(self, _: str) -> int:
        return MASK

    def get_special_tokens_mask(self, ids: list[int], **_: bool) -> list[int]:
        return [0] * len(ids)


@pytest.mark.parametrize("objective", [MNTP, DIFFUSION, NEXT])
@pytest.mark.parametrize("shift", [True, False])
def test_what_is_asked_of_a_text_does_not_depend_on_its_chunk(
    objective: ObjectiveConfig, shift: bool
) -> None:
    lengths = [7, 1, 30, 12, 2]
    whole = ask(make_chunk(lengths), objective, shift=shift)
    found, totals, offset = [], 0.0, 0
    for text in range(5):
        alone = ask(make_chunk([lengths[text]], [text]), objective, shift=shift)
        counts = alone.weights > 0
        parts = zip(
            alone.states[counts] + offset, alone.labels[counts], alone.weights[counts], strict=True
        )
        found += list(parts)
        totals += alone.total
        end = offset + lengths[text]
        assert whole.input_ids[offset:end].tolist() == alone.input_ids.tolist()
        offset = end
    assert found == list(zip(whole.states, whole.labels, whole.weights, strict=True))
    assert totals == whole.total


def test_another_step_seed_or_text_hides_other_tokens() -> None:
    chunk = make_chunk([400])
    base = ask(chunk, MNTP).states.tolist()
    assert ask(chunk, MNTP).states.tolist() == base
    for change in ({"step": 6}, {"seed": 4}, {"text_ids": np.arange(5000) + 1}):
        assert ask(chunk, MNTP, **change).states.tolist() != base


def test_mntp_hides_as_the_published_collator_does() -> None:
    chunk = make_chunk([200] * 500)
    ours = ask(chunk, MNTP, shift=False)
    asked = np.zeros(len(chunk.input_ids), dtype=bool)
    asked[ours.states] = True
    collator = DataCollatorForLanguageModeling(_Tokenizer(), mlm_probability=0.2)  # type: ignore[arg-type]
    torch.manual_seed(0)
    ids = torch.from_numpy(chunk.input_ids)
    theirs, labels = collator.torch_mask_tokens(ids.clone().view(500, 200))
    theirs_asked = (labels.view(-1) != -100).numpy()
    shares = [
        _shares(ids.numpy(), ours.input_ids, asked),
        _shares(ids.numpy(), theirs.view(-1).numpy(), theirs_asked),
    ]
    for wanted, own, their in zip((0.2, 0.8, 0.1, 0.1), *shares, strict=True):
        error = 4 * (wanted * (1 - wanted) / 20_000) ** 0.5
        assert own == pytest.approx(wanted, abs=error)
        assert their == pytest.approx(wanted, abs=error)
    assert ours.labels.tolist() == ids.numpy()[asked].tolist()
    assert (ours.input_ids[~asked] == ids.numpy()[~asked]).all()


def _shares(before: Any, after: Any, asked: Any) -> tuple[float, float, float, float]:
    """Share asked for; of those, shares of mask tokens, other tokens, and the same token."""
    old, new = before[asked], after[asked]
    same, masked = new == old, new == MASK
    return asked.mean(), masked.mean(), (~same & ~masked).mean(), same.mean()


def test_all_mask_hides_every_token_that_is_asked_for() -> None:
    objective = ObjectiveConfig(mntp=MntpConfig(mask_rate=0.8, replace="all"))
    chunk = make_chunk([200] * 100)
    found = ask(chunk, objective)
    hidden = np.flatnonzero(found.input_ids == MASK)
    assert (hidden == found.states + 1).all()
    assert len(hidden) == pytest.approx(0.8 * 199 * 100, rel=0.02)


def test_special_tokens_and_the_first_of_a_row_are_not_asked_for() -> None:
    chunk = make_chunk([50] * 40)
    ids = chunk.input_ids.copy()
    ids[::50] = 7  # a row's first token
    ids[10::50] = 1  # a special token
    marked = Chunk(input_ids=ids, lengths=chunk.lengths, texts=chunk.texts)
    found = ask(marked, ObjectiveConfig(mntp=MntpConfig(mask_rate=0.99)))
    assert len(found.labels) > 40 * 45
    assert not np.isin((found.states + 1) % 50, [0, 10]).any()
    assert (found.input_ids[::50] == 7).all()


def test_diffusion_draws_its_level_per_row_and_weighs_by_it() -> None:
    length, num_rows = 400, 1500
    found = ask(make_chunk([length] * num_rows), DIFFUSION, shift=False)
    counts = np.bincount(found.states // length, minlength=num_rows)
    assert (found.input_ids[found.states] == MASK).all()
    assert found.total == num_rows
    # Levels are uniform: so are, nearly, the shares that are hidden.
    assert stats.kstest(counts / length, "uniform").pvalue > 1e-3
    # A token's weight is 1 / (t L): for a level t, about t L tokens are hidden.
    per_row = np.bincount(found.states // length, weights=found.weights, minlength=num_rows)
    many = counts > 100
    level = 1 / (
        length * found.weights[np.searchsorted(found.states // length, np.arange(num_rows)[many])]
    )
    assert np.abs(level - counts[many] / length).max() < 5 * 0.5 / length**0.5
    assert per_row.mean() == pytest.approx(1, abs=0.1)


def test_the_next_token_is_asked_of_the_one_before_it() -> None:
    chunk = make_chunk([4, 1, 3])
    found = ask(chunk, NEXT)
    assert found.states.tolist() == [0, 1, 2, 5, 6]
    assert found.labels.tolist() == chunk.input_ids[[1, 2, 3, 6, 7]].tolist()
    assert found.total == 5
    assert found.input_ids.tolist() == chunk.input_ids.tolist()


@pytest.mark.parametrize("objective", [MNTP, DIFFUSION, NEXT])
def test_a_chunk_with_nothing_to_ask_counts_nothing(objective: ObjectiveConfig) -> None:
    for chunk in (DUMMY, make_chunk([1])):
        found = ask(chunk, objective)
        assert (found.total, found.weights.tolist(), found.states.tolist()) == (0, [0], [0])
