from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ReasonAug.concepts import CONCEPTS
from ReasonAug.templates import write_templates

Rows = list[dict[str, Any]]
TRAINED_TEXTS = ("user_query", "positive_document", "hard_negative_document")


def trained(rows_of: Callable[[str], Rows]) -> set[str]:
    return {row[field] for row in rows_of("train") for field in TRAINED_TEXTS}


def fivegrams(text: str) -> set[str]:
    """Written apart from the generator's own check."""
    words = re.sub(r"\W+", " ", text.lower()).split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def test_no_evaluation_text_is_trained_on(rows_of: Callable[[str], Rows]) -> None:
    everything = "\n".join(trained(rows_of))
    unseen = [row for row in rows_of("problems") if row["split"] != "train"]
    assert len(unseen) > 1000
    for row in unseen:
        assert row["statement"] not in everything


def test_no_evaluation_problem_is_nearly_a_trained_one(rows_of: Callable[[str], Rows]) -> None:
    problems = rows_of("problems")
    by_concept: dict[str, list[set[str]]] = {}
    for row in problems:
        if row["split"] == "train":
            by_concept.setdefault(row["concept"], []).append(fivegrams(row["statement"]))
    for row in problems:
        if row["split"] == "unseen_problems":
            mine = fivegrams(row["statement"])
            nearest = max(len(mine & it) / len(mine | it) for it in by_concept[row["concept"]])
            assert nearest <= 0.5, row["id"]


def test_nothing_of_a_held_out_concept_is_trained_on(rows_of: Callable[[str], Rows]) -> None:
    held_out = {concept.name for concept in CONCEPTS if concept.held_out}
    definitions = {row["concept"]: row["definition"] for row in rows_of("definitions")}
    texts = trained(rows_of)
    for row in rows_of("train"):
        assert row["instance"] not in held_out
        assert row["negative_instance"] not in held_out
    for name in held_out:
        assert name not in texts
        assert definitions[name] not in texts
    code = [c.code.strip().splitlines()[-1] for c in CONCEPTS if c.held_out and c.code]
    assert len(code) == 4


def test_each_split_has_the_concepts_it_should(rows_of: Callable[[str], Rows]) -> None:
    problems = rows_of("problems")
    concepts = {
        split: {row["concept"] for row in problems if row["split"] == split}
        for split in ("train", "unseen_problems", "unseen_concepts")
    }
    assert concepts["train"] == concepts["unseen_problems"]
    assert not concepts["train"] & concepts["unseen_concepts"]
    assert concepts["unseen_concepts"] == {c.name for c in CONCEPTS if c.held_out}


def test_half_of_the_unseen_problems_have_a_wording_that_training_never_shows(
    rows_of: Callable[[str], Rows],
) -> None:
    last = len(CONCEPTS[0].forms) - 1
    forms = {
        split: Counter(row["form"] for row in rows_of("problems") if row["split"] == split)
        for split in ("train", "unseen_problems")
    }
    assert last not in forms["train"]
    assert forms["unseen_problems"][last] * 2 == forms["unseen_problems"].total()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 3), ("b", 3), ("b", 3), ("c", 4)):
        write_templates(tmp_path / name, seed=seed, problems_per_concept=8, max_tokens=400)
        contents.append(
            {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
        )
    assert contents[0] == contents[1] == contents[2]
    assert set(contents[0]) == {
        "README.md", "definitions.jsonl", "problems.jsonl", "summary.json", "train.jsonl",
    }  # fmt: skip
    assert contents[0]["train.jsonl"] != contents[3]["train.jsonl"]


@pytest.mark.parametrize("seed", [1, 2])
def test_short_problems_are_still_told_apart(tmp_path: Path, seed: int) -> None:
    summary = write_templates(tmp_path, seed=seed, problems_per_concept=16, max_tokens=300)
    assert summary["problems"]["train"] == 44 * 12
