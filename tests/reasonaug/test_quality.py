"""The report on generated data has right counts, and thresholds keep bad data from the rows."""

from __future__ import annotations

import json
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics import BLEU

from pipeline.config.loading import build_config
from pipeline.errors import UserError
from ReasonAug import quality
from ReasonAug.quality import Figures, measure, missed, names_concept, require_quality
from ReasonAug.quality_report import write_quality
from ReasonAug.synthesis.config import StrictConfig, SynthesisConfig
from ReasonAug.synthesis.run import synthesize
from tests.reasonaug.language_server import serving

WORDS = [f"word{number}" for number in range(500)]


def text_of(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def item(number: int, *, domain: str = "physics", **changes: Any) -> dict[str, Any]:
    return {
        "domain": domain,
        "concept": "Bayes' Theorem",
        "problem": text_of(number),
        "solution": "x = 1",
        "definition": "a b c",
        "dropped": None,
        **changes,
    }


def checked(agreed: int, solutions: int, passed: int | None = None) -> dict[str, Any]:
    return {
        "executed": passed is not None,
        "tests": 5 * (passed is not None),
        "passed": passed or 0,
        "agreed": agreed,
        "solutions": solutions,
    }


def row(kind: str, query: str, positive: str) -> dict[str, str]:
    return {
        "instance": "Bayes' Theorem",
        "task_type": kind,
        "user_query": query,
        "positive_document": positive,
        "hard_negative_document": "another",
    }


@pytest.fixture(scope="module")
def figures() -> Figures:
    problems = [item(n) for n in range(8)] + [item(8, domain="algorithm", dropped="unanswered")]
    solved = [
        item(0, verification=checked(2, 2)),
        item(1, verification=checked(0, 2), dropped="wrong_solution"),
        item(2, domain="algorithm", verification=checked(1, 1, passed=5)),
        item(3, domain="algorithm", verification=checked(1, 1, passed=4), dropped="wrong_solution"),
        item(4, verification=checked(0, 0)),
    ]
    near = text_of(0).replace(text_of(0).split()[-1], "changed")
    clean = [
        item(0),
        item(1, problem=near),
        item(2, problem="Use Bayes theorems to decide."),
        item(3, dropped="contaminated"),
    ]
    rows = [
        row("p2i", "what is P(A|B)?", "Bayes' theorem"),
        row("p2i", "by BAYES' THEOREM, what?", "**Bayes' Theorem**: P(A|B) is"),
        row("i2ps", "Bayes' Theorem", "By Bayes' theorem, it is"),
    ]
    return measure({"problems": problems, "solved": solved, "clean": clean}, rows)


def test_yield_is_counted_by_stage_domain_and_reason(figures: Figures) -> None:
    assert figures.stages["problems"] == {"physics": {"kept": 8}, "algorithm": {"unanswered": 1}}
    assert figures.stages["solved"]["algorithm"] == {"kept": 1, "wrong_solution": 1}
    assert figures.totals["yield"] == 3 / 9


def test_agreement_counts_second_solutions_and_passing_counts_programs(figures: Figures) -> None:
    assert figures.totals["agreement"] == 4 / 6
    assert figures.totals["passed"] == 1 / 2
    assert figures.solutions["algorithm"] == {
        "agreed": 2, "checked": 2, "executed": 2, "passed": 1, "second": 2
    }  # fmt: skip


def test_a_row_leaks_if_query_and_positive_name_the_concept(figures: Figures) -> None:
    assert figures.rows["p2i"] == {"rows": 2, "leaking": 1}
    assert figures.rows["i2ps"] == {"rows": 1, "leaking": 1}
    # A query that is a name names it on purpose.
    assert figures.totals["leakage"] == 1 / 2
    assert figures.totals["named"] == 1 / 3


def test_a_problem_with_another_last_word_is_a_near_duplicate(figures: Figures) -> None:
    assert figures.totals["near_duplicates"] == 1 / 3


@pytest.mark.parametrize(
    ("text", "concept", "named"),
    [
        ("two\n pointers move", "Two Pointers", True),
        ("the two-pointer", "Two Pointers", False),
        ("Dijkstra's algorithms", "Dijkstra's Algorithm", True),
        ("a queue is", "Queue", True),
        ("two queues", "Queue", True),
        ("a dequeue", "Queue", False),
        ("run a DFS", "Depth-First Search (DFS)", True),
        ("a depth first search", "Depth-First Search (DFS)", True),
        ("O(n) time", "Counting (n)", False),
        ("anything", "(?)", False),
    ],
)
def test_names_are_found_in_any_form(text: str, concept: str, named: bool) -> None:
    assert names_concept(text, concept) == named


def measured(texts: list[str], **more: Any) -> dict[str, float | int | None]:
    clean = [item(0, problem=text) for text in texts]
    return measure({"problems": clean, "clean": clean}, [], **more).texts["own"]


def test_distinct_shares_equal_the_definition() -> None:
    texts = [text_of(seed) for seed in range(12)]

    found = measured(texts)

    for n in (1, 2, 3):
        grams = [tuple(w[k : k + n]) for t in texts if (w := t.split()) for k in range(61 - n)]
        assert found[f"distinct_{n}"] == pytest.approx(len(set(grams)) / len(grams))


def test_self_bleu_equals_sacrebleu() -> None:
    texts = [text_of(seed % 5, 20 + seed) for seed in range(8)] + ["word1", "one two", "one two"]
    texts.append(" ".join(["word1 word2"] * 9))

    bleu = BLEU(effective_order=True, tokenize="none")
    scores = [
        bleu.sentence_score(text, texts[:k] + texts[k + 1 :]).score for k, text in enumerate(texts)
    ]
    assert measured(texts)["self_bleu"] == pytest.approx(sum(scores) / len(scores))


def test_figures_do_not_depend_on_the_order_of_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "WORDS", 400)
    texts = [text_of(seed) for seed in range(20)]

    assert measured(texts) == measured(texts[::-1])


def test_a_reference_is_measured_on_as_many_words(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    statement = text_of(1, words=40)
    line = {
        "domain": "physics",
        "concept": "c",
        "generation": f"**Problem**\n{statement}\n\n**Solution**\n1",
        "check": "Yes",
    }
    path.write_text(json.dumps(line) + "\n")
    clean = [item(n) for n in range(5)]

    found = measure({"problems": clean, "clean": clean}, [], reference=path).texts

    words = statement.split()
    assert found["reference"]["distinct_1"] == len(set(words)) / 40
    # The sample takes texts in the order of their hashes.
    first = min((text_of(n) for n in range(5)), key=lambda t: sha256(f"0/{t}".encode()).digest())
    assert found["own"]["distinct_1"] == len(set(first.split()[:40])) / 40


def test_rows_that_miss_thresholds_are_refused_in_one_line(figures: Figures) -> None:
    require_quality(figures, StrictConfig(min_yield=0.3, max_leakage=0.5), Path("page.md"))

    with pytest.raises(UserError) as refused:
        require_quality(
            figures, StrictConfig(min_yield=0.5, max_leakage=0.1, max_named=0.9), Path("page.md")
        )
    assert str(refused.value) == (
        "strict: no rows written: yield 0.3333 (allowed: at least 0.5); leakage 0.5 (allowed: at "
        "most 0.1) | fix: read page.md; improve the data, or change the keys below strict"
    )


def test_a_figure_that_could_not_be_measured_misses_its_threshold() -> None:
    clean = [item(0)]
    nothing = measure({"problems": clean, "clean": clean}, [])

    assert missed(nothing, StrictConfig(min_passed=0.0)) == [
        "passed not measured (allowed: at least 0)"
    ]


def test_every_threshold_is_about_a_figure(figures: Figures) -> None:
    names = {name.partition("_")[2] for name in StrictConfig.__slots__}

    assert names == set(figures.totals)


def test_the_report_has_a_page_a_record_and_figures(figures: Figures, tmp_path: Path) -> None:
    page = write_quality(figures, StrictConfig(min_yield=0.5), tmp_path)

    text = page.read_text()
    assert "| yield | 0.333 | at least 0.5 |" in text
    assert "| solved | algorithm | 1 | 2 | 0.500 | 1 wrong_solution |" in text
    assert "| p2i | 2 | 1 | 0.500 |" in text
    assert json.loads((page.parent / "quality.json").read_text())["totals"] == figures.totals
    for plot in ("yield.png", "lengths.png"):
        assert f"({plot})" in text
        assert (page.parent / plot).read_bytes().startswith(b"\x89PNG")


def test_an_empty_data_set_has_a_report(tmp_path: Path) -> None:
    figures = measure({"problems": [], "clean": []}, [])

    assert "| yield | - |" in write_quality(figures, StrictConfig(), tmp_path).read_text()


def test_a_synthesis_that_misses_a_threshold_writes_a_report_and_no_rows(tmp_path: Path) -> None:
    names = {"physics theorem": ["Snell's Law", "Ideal Gas Law"]}
    (tmp_path / "concepts.yaml").write_text(json.dumps(names))
    run = tmp_path / "run"
    with serving() as (url, server):
        tree = {
            "output_dir": str(run),
            "model": {"name": "template", "servers": [{"url": url}]},
            "concepts": {"files": [str(tmp_path / "concepts.yaml")]},
            "problems": {"per_concept": 2},
        }

        def synthesis(sections: dict[str, Any] | None = None, **thresholds: float) -> None:
            config = {**tree, **(sections or {}), "strict": thresholds}
            synthesize(build_config(SynthesisConfig, config, origin="test"))

        # These two are refused before a call.
        with pytest.raises(UserError, match=r"^test: strict\.min_passed: 0\.5 .*execution: off"):
            synthesis({"checks": {"execution": "off"}}, min_passed=0.5)
        with pytest.raises(UserError, match=r"nowhere\.jsonl"):
            synthesis({"quality": {"reference": "nowhere.jsonl"}})
        assert server.requests == 0
        with pytest.raises(UserError, match=r"no rows written: passed not measured .*README\.md"):
            synthesis(min_passed=0.5)
        assert not (run / "rows.jsonl").exists()
        assert (run / "quality/README.md").is_file()
        asked = server.requests
        synthesis(min_yield=0.5)
        assert (run / "rows.jsonl").exists()
        # The same answers are measured again.
        assert server.requests == asked
