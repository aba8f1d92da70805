"""Windows, margins, merging and choice, compared with plain loops over one query."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import (
    BandConfig,
    MarginConfig,
    MineConfig,
    RetrieverConfig,
    Template,
    WindowConfig,
)
from pipeline.errors import UserError
from pipeline.mining.plan import Mining
from pipeline.mining.rules import (
    CANDIDATE,
    OUTCOMES,
    POSITIVE,
    Candidates,
    Judged,
    Limits,
    apportion,
    choose,
    judge,
    merge,
)
from pipeline.mining.texts import divide_text

BANDS = (
    BandConfig(name="hard", last=4, share=0.5),
    BandConfig(name="easy", last=20, share=0.5),
)


def config(**changes: Any) -> MineConfig:
    return MineConfig(
        **{
            "data": "a",
            "output": "b",
            "retrievers": (RetrieverConfig(name="one", path="bm25"),),
            **changes,
        }
    )


def listed(documents: list[int], inside: list[bool] | None = None, bands: int = 0) -> Candidates:
    count = len(documents)
    lasts = [band.last for band in BANDS][:bands] or [count]
    found = np.searchsorted(lasts, np.arange(1, count + 1))
    return Candidates(
        documents=np.array(documents),
        scores=np.zeros((count, 1)),
        bands=np.minimum(found, len(lasts) - 1).astype(np.int8),
        inside=np.ones(count, bool) if inside is None else np.array(inside),
    )


def judged(documents: list[int], scores: list[float], outcome: int = CANDIDATE) -> Judged:
    """A list of documents with one outcome; candidates have the ranks 1, 2, ..."""
    count = len(documents)
    return Judged(
        documents=np.array(documents),
        scores=np.array(scores),
        outcomes=np.full(count, outcome, np.int8),
        ranks=np.arange(1, count + 1) * (outcome == CANDIDATE),
    )


def names(outcomes: Any) -> list[str]:
    return [OUTCOMES[outcome] for outcome in outcomes]


def test_ranks_count_only_documents_that_may_be_negatives() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    forbidden = np.array([CANDIDATE, POSITIVE, CANDIDATE, CANDIDATE, CANDIDATE], dtype=np.int8)

    found = judge(
        config(window=WindowConfig(first=2, last=3)), np.arange(5), scores, forbidden, Limits()
    )

    assert found.ranks.tolist() == [1, 0, 2, 3, 4]
    assert names(found.outcomes) == [
        "before the window",
        "positive of the query",
        "candidate",
        "candidate",
        "behind the window",
    ]


def test_each_margin_removes_what_its_formula_says() -> None:
    scores, positive = np.linspace(1, -1, 41), 0.6
    rules = {
        "absolute": (MarginConfig(absolute=0.1), scores <= positive - 0.1),
        "relative": (MarginConfig(relative=0.95), scores <= 0.95 * positive),
        "percentile": (MarginConfig(percentile=20), scores <= 0.3),
    }
    for margin, expected in rules.values():
        outcomes = Limits.of(margin, positive, 0.3).exceeded(scores)
        assert np.array_equal(outcomes == CANDIDATE, expected)


def test_a_relative_margin_of_a_negative_score_lies_below_it() -> None:
    limits = Limits.of(MarginConfig(relative=0.9), -0.5, np.nan)

    assert limits.relative == pytest.approx(-0.55)


def test_two_lists_are_merged_by_reciprocal_ranks_and_by_turns() -> None:
    lists = [judged([5, 6, 7], [3.0, 2.0, 1.0]), judged([8, 7], [9.0, 8.0])]
    fused: dict[int, float] = {}
    for part in lists:
        for place, number in enumerate(part.documents.tolist(), start=1):
            fused[number] = fused.get(number, 0) + 1 / (60 + place)
    by_fusion = sorted(fused, key=lambda number: (-fused[number], number))

    merged = merge(config(), lists)
    turns = merge(config(merge="round_robin"), lists)

    assert merged.documents.tolist() == by_fusion == [7, 5, 8, 6]
    assert turns.documents.tolist() == [5, 8, 6, 7]
    assert merged.scores[0].tolist() == [1.0, 8.0]
    assert np.isnan(merged.scores[1, 1])


def test_a_document_that_one_list_refuses_is_no_candidate() -> None:
    lists = [judged([5, 6], [1.0, 1.0]), judged([6], [1.0], POSITIVE)]

    merged = merge(config(), lists)

    assert merged.documents.tolist() == [5]


def test_a_random_choice_depends_on_seed_example_and_document_alone() -> None:
    many, some = listed(list(range(100, 160))), listed(list(range(100, 160, 2)))
    settings = config(choose="random")

    first = many.documents[choose(settings, many, 60, 7)]
    without = some.documents[choose(settings, some, 60, 7)]

    assert [number for number in first.tolist() if number in some.documents] == without.tolist()
    assert first.tolist() != many.documents[choose(settings, many, 60, 8)].tolist()
    other = dataclasses.replace(settings, seed=1)
    assert first.tolist() != many.documents[choose(other, many, 60, 7)].tolist()


def test_bands_give_their_shares_and_fill_only_if_asked() -> None:
    settings = config(choose="bands", bands=BANDS, negatives=8)
    candidates = listed(list(range(10)), bands=2)

    chosen = choose(settings, candidates, 8, 0)
    scarce = choose(settings, listed(list(range(6)), bands=2), 8, 0)
    filled = choose(
        dataclasses.replace(settings, short="fill"), listed(list(range(6)), bands=2), 8, 0
    )

    assert np.bincount(candidates.bands[chosen]).tolist() == [4, 4]
    assert len(scarce) == 6
    assert sorted(filled.tolist()) == list(range(6))


def test_filling_takes_what_is_behind_the_window_last() -> None:
    candidates = listed([1, 2, 3, 4, 5], inside=[True, True, False, False, False])

    assert choose(config(), candidates, 4, 0).tolist() == [0, 1]
    assert choose(config(short="fill"), candidates, 4, 0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("total", range(12))
def test_shares_are_apportioned_without_remainder(total: int) -> None:
    quotas = apportion(np.array([0.3, 0.3, 0.4]), total)

    assert quotas.sum() == total
    assert np.abs(quotas - np.array([0.3, 0.3, 0.4]) * total).max() < 1


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"window": {"first": 9, "last": 3}}, "the window is empty"),
        ({"choose": "bands"}, "bands with choose: bands"),
        ({"retrievers": [{"name": "a", "path": "bm25"}] * 2}, "names that differ"),
        ({"negatives": 9, "candidates": 3}, "at least 9"),
        ({"teacher": {"kind": "endpoint", "path": "a"}}, "url for an endpoint"),
        ({"teacher": {"path": "a", "vectors": True}}, "for a bi_encoder only"),
        (
            {"teacher": {"path": "a"}, "retrievers": [{"name": "teacher", "path": "bm25"}]},
            "`teacher` has this one",
        ),
    ],
)
def test_contradictions_of_a_config_are_refused(changes: dict[str, Any], found: str) -> None:
    from pipeline.config import build_config

    tree = {"data": "a", "output": "b", "retrievers": [{"name": "one", "path": "bm25"}], **changes}
    with pytest.raises(UserError, match=found):
        build_config(MineConfig, tree, origin="config")


@pytest.mark.parametrize(
    ("template", "role", "head", "given", "wanted"),
    [
        # The prefix of every document is no instruction, whatever the queries' template matches.
        ("{instruction} {text}", "documents", "passage:", "", ("a lake", "")),
        ("{instruction} {text}", "documents", "Passage :", "", ("a lake", "")),
        ("{instruction} {text}", "documents", "Find it", "", ("a lake", "Find it")),
        ("{instruction} {text}", "queries", "Find it", "", ("a lake", "Find it")),
        ("Do: {instruction} {text}", "documents", "Do: find it", "", ("a lake", "find it")),
        ("Do: {instruction} {text}", "documents", "passage:", "", ("a lake", "")),
        ("Do: {instruction} {text}", "queries", "Do: find it", "find it", ("a lake", "find it")),
    ],
)
def test_a_decoded_text_is_divided_from_its_template(
    template: str, role: str, head: str, given: str, wanted: tuple[str, str]
) -> None:
    both = Template(query=template, document="passage: {text}")

    assert divide_text(both, role, f"{head} a lake", head, " a lake", given) == wanted


def test_the_plan_of_a_linked_output_lies_where_the_shards_are_built(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mining = Mining(dataclasses.replace(config(), output=tmp_path / "link"))

    assert mining.plan_path.name == ".real.plan.json"
    assert mining.building.name == ".real.building"
