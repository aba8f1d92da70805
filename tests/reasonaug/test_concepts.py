from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from random import Random
from types import ModuleType
from typing import Any

import pytest

from ReasonAug.concepts import CONCEPTS, FAMILIES
from ReasonAug.problem import DOMAINS, Concept, agree, compose, num_tokens
from ReasonAug.programs import coding_draw, load_function

Rows = list[dict[str, Any]]


def test_five_domains_hold_forty_or_more_concepts_and_each_domain_keeps_some_back() -> None:
    count = Counter(concept.domain for concept in CONCEPTS)
    held_out = Counter(concept.domain for concept in CONCEPTS if concept.held_out)
    assert set(count) == set(held_out) == set(DOMAINS)
    assert sum(count.values()) >= 40
    assert min(count.values()) >= 6
    assert 8 <= sum(held_out.values()) <= 10
    assert len({concept.name for concept in CONCEPTS}) == len(CONCEPTS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_text_of_a_family_belongs_to_one_of_its_concepts(family: ModuleType) -> None:
    assert [concept.name for concept in family.CONCEPTS] == list(family.TEXTS)


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda concept: concept.name)
def test_every_wording_of_a_concept_is_complete_and_does_not_name_it(concept: Concept) -> None:
    name = re.sub(r"\(.*?\)", "", concept.name).strip().lower()
    assert len(set(concept.forms)) == 4
    for form in range(4):
        problem = compose(concept, Random(form), form=form, max_tokens=1500)
        assert not re.search(r"\{(who|other|place|things|role)\}", problem.document())
        assert not re.search(rf"\b{re.escape(name)}\b", problem.statement.lower())
        assert "nan" not in problem.solution.split()


def test_at_least_three_thousand_pairs_of_varied_length_are_made(
    rows_of: Callable[[str], Rows],
) -> None:
    problems = rows_of("problems")
    lengths = [num_tokens(row["statement"] + row["solution"]) for row in problems]
    assert len(problems) >= 3000
    assert min(lengths) <= 50
    assert 1000 <= max(lengths) <= 1500
    assert len({row["statement"] for row in problems}) == len(problems)


def test_coding_solutions_give_the_results_that_their_statements_print(
    rows_of: Callable[[str], Rows],
) -> None:
    checked = 0
    for row in rows_of("problems"):
        fenced = re.search(r"```python\n(.*?)\n```", row["solution"], flags=re.DOTALL)
        if row["domain"] not in ("algorithm", "data structure"):
            assert fenced is None
            continue
        assert fenced is not None
        for name, arguments, expected in re.findall(
            r"^(\w+)\((.*)\) -> (.*)$", row["statement"], flags=re.MULTILINE
        ):
            function = load_function(fenced[1], name)
            assert function(*ast.literal_eval(f"({arguments},)")) == ast.literal_eval(expected)
            checked += 1
    assert checked > 1000


def _number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match is not None, text
    return float(match[1].replace(",", ""))


def test_printed_answers_follow_from_the_printed_numbers(rows_of: Callable[[str], Rows]) -> None:
    """Four families solved here once more, from the text alone."""
    seen = Counter[str]()
    for row in rows_of("problems"):
        text, form = row["statement"], (row["concept"], row["form"])
        if form == ("Compound Interest", 0):
            amount, rate = _number(r"puts ([\d]+) euros", text), _number(r"pays ([\d.]+) %", text)
            years = _number(r"after (\d+) years", text)
            answer = _number(r"= ([\d,]+\.\d\d)\.", row["solution"])
            assert answer == pytest.approx(amount * (1 + rate / 100) ** years, abs=0.006)
        elif form == ("Chinese Remainder Theorem", 2):
            pairs = re.findall(r"n = (\d+) \(mod (\d+)\)", text)
            answer = _number(r"(?:gives|remainder) (\d+)", row["solution"])
            assert all(int(answer) % int(m) == int(r) for r, m in pairs)
        elif form == ("Doppler Effect", 0):
            tone = _number(r"tone of (\d+) Hz", text)
            speed = _number(r"at (\d+) m/s", text)
            answer = _number(r"(?:=|that:) ([\d.]+) Hz", row["solution"])
            assert answer == pytest.approx(tone / (1 - speed / 340), rel=1e-4)
        elif form == ("Fermat's Little Theorem", 2):
            base, power, prime = map(int, re.findall(r"(\d+)\^(\d+) mod (\d+)", text)[0])
            numbers = re.findall(r"\d+", row["solution"])
            assert int(numbers[-1]) == pow(base, power, prime)
        else:
            continue
        seen[form[0]] += 1
    assert len(seen) == 4
    assert min(seen.values()) >= 10


def test_a_wrong_program_is_refused() -> None:
    wrong = "def solve(xs):\n    return xs[0]"
    draw = coding_draw(wrong, reference=max, arguments=lambda rng: (rng.sample(range(99), 5),))
    with pytest.raises(ArithmeticError, match=r"brute force|fails on"):
        for seed in range(5):
            draw(Random(seed))


def test_a_second_method_that_differs_is_refused() -> None:
    agree(1.0, 1.0 + 1e-9)
    with pytest.raises(ArithmeticError, match="disagrees"):
        agree(1.0, 1.001)


@pytest.mark.parametrize("body", ["import os", "open('x')", "eval('1')", "__import__('sys')"])
def test_programs_reach_neither_files_nor_the_system(body: str) -> None:
    with pytest.raises((ImportError, NameError)):
        load_function(f"def solve():\n    {body}", "solve")()
