"""Rows out of generations: our own texts in every form of heading, and the released ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.config import PrepareConfig, SourceConfig
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from ReasonAug.__main__ import main
from ReasonAug.generation_rows import write_generation_rows
from ReasonAug.generations import definition_body, program, split_generation, verdict

Rows = list[dict[str, Any]]
FORMS = [
    "**{}**", "**{}**  ", "**{}:**  ", "**{}**:", "**{}**: ", "## {}", "### {}:", "{}:", "__{}__",
]  # fmt: skip
CONCEPTS = {
    "math theorem": ["Chord Rule", "Root Bound", "Parity Lemma"],
    "algorithm": ["Heap Walk", "Bucket Scan"],
}


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def generation(domain: str, concept: str, n: int, **changes: Any) -> dict[str, Any]:
    form = FORMS[n % len(FORMS)]
    text = (
        f"{form.format('Problem')}\nProblem sets differ: find item {n} by the {concept}.\n\n"
        f"{form.format('Solution')}\nSolution steps of {concept} give {n}."
    )
    check = (
        "YES" if domain == "math theorem" else f"Yes, so:\n\n```python\nanswer = {n}\n```\nDone."
    )
    return {
        "n": n, "domain": domain, "concept": concept, "generation": text, "check": check, **changes
    }  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """Four accepted generations of each concept, and one of each way to be left out."""
    rows = [
        generation(domain, concept, 4 * place + n)
        for domain, concepts in CONCEPTS.items()
        for place, concept in enumerate(concepts)
        for n in range(4)
    ]
    rows += [
        generation("math theorem", "Chord Rule", 90, check="**No.** The sum is wrong."),
        generation("math theorem", "Chord Rule", 91, check=None),
        generation("math theorem", "Chord Rule", 92, generation="**Problem**\nNo heading follows."),
        generation("algorithm", "Heap Walk", 93, check="Yes, it is right as it stands."),
    ]
    definitions = [
        {
            "domain": domain,
            "concept": concept,
            "definition": f"**Concept**  \n{concept}\n\n**Definition**  \nIt says {concept}.",
        }
        for domain, concepts in CONCEPTS.items()
        for concept in concepts
    ]
    return write(tmp_path / "g.jsonl", rows), write(tmp_path / "d.jsonl", definitions)


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gap", ["\n", "\n\n", " "])
def test_every_form_of_heading_is_read(form: str, gap: str) -> None:
    text = f"{form.format('Problem')}{gap}Which n?\n\n{form.format('Solution')}{gap}n = **4**."
    if form.startswith("#") and gap == " ":
        text = text.replace("Problem ", "Problem: ").replace("Solution ", "Solution: ")
    assert split_generation(text) == ("Which n?", "n = **4**.")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "**Problem**\nWhich n?",
        "**Solution**\nn = 4",
        "**Problem**\n\n**Solution**\nn = 4",
        "**Solution**\nn = 4\n**Problem**\nWhich n?",
        "Problem solving helps.\nSolution follows.",
    ],
)
def test_a_text_without_problem_and_solution_is_not_read(text: str) -> None:
    assert split_generation(text) is None


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ("YES", True), ("**Yes.** It holds.", True), ("Yes, the code is right.", True),
        ("NO", False), ("**No**. \nThe sum", False), ("Nothing is wrong", None),
        ("The solution is right", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_the_verdict_is_the_first_word(check: str | None, expected: bool | None) -> None:
    assert verdict(check) is expected


def test_a_program_is_what_the_first_python_fence_holds() -> None:
    check = "Yes:\n```text\nx\n```\n```python\ndef f():\n    return 1\n```\n```python\ng\n```"
    assert program(check) == "def f():\n    return 1"
    assert program("Yes.") is None


def test_a_definition_without_a_heading_is_taken_whole() -> None:
    assert definition_body("**Concept**: X\n\n**Definition:** It holds.") == "It holds."
    assert definition_body(" It holds. ") == "It holds."


def test_counts_follow_the_rule_of_each_kind(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    summary = write_generation_rows(*inputs, tmp_path / "train.jsonl", seed=0)
    assert summary["generations"] == {
        "total": 24, "accepted": 20, "no_code": 1, "no_verdict": 1, "rejected": 1, "unparsable": 1
    }  # fmt: skip
    assert summary["concepts"] == {"math theorem": 3, "algorithm": 2}
    kinds = summary["rows"]
    assert kinds["i2ps"] == 20
    # Two nearest of the other concepts, of which the domain `algorithm` has one only.
    assert kinds["p2i"] == 2 * 12 + 8
    assert kinds["p2ps"] + kinds["ps2ps"] == 5 * 4 * 3
    assert json.loads((tmp_path / "train.summary.json").read_text()) == summary
    assert "language model" in summary["left_out"]


def test_rows_join_texts_of_the_concepts_they_name(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    write_generation_rows(*inputs, tmp_path / "train.jsonl", seed=0)
    for row in read(tmp_path / "train.jsonl"):
        positive, negative = row["positive_document"], row["hard_negative_document"]
        assert row["instance"] != row["negative_instance"]
        assert {row["instance"], row["negative_instance"]} <= set(CONCEPTS[row["domain"]])
        if row["domain"] == "math theorem":
            assert row["instance"] in positive and row["negative_instance"] in negative
        # The published i2ps negatives were two problems instead of a problem and its solution.
        for mark in ("**Problem**", "**Solution**", "```python", "It says"):
            assert positive.count(mark) == negative.count(mark) <= 1 or row["task_type"] == "p2i"
        if row["task_type"] == "i2ps" and row["domain"] == "algorithm":
            assert positive.startswith("```python\nanswer =") and "Problem" not in negative
        if row["task_type"] in ("p2ps", "ps2ps"):
            assert row["user_query"].split("\n")[1 if "**" in row["user_query"] else 0] not in (
                positive.split("\n")
            )


def test_the_same_seed_gives_the_same_bytes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_generation_rows(*inputs, tmp_path / f"{name}.jsonl", seed=seed)
        contents.append((tmp_path / f"{name}.jsonl").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def run(monkeypatch: pytest.MonkeyPatch, generations: Path, definitions: Path, out: Path) -> int:
    arguments = ["--generations", generations, "--definitions", definitions, "--out", out]
    monkeypatch.setattr("sys.argv", ["ReasonAug", "rows", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_command_prints_what_became_of_the_generations(
    inputs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *inputs, tmp_path / "new" / "train.jsonl") == 0
    printed = capsys.readouterr().out
    assert "generations: total 24, accepted 20," in printed
    assert "repeat another one" not in printed
    assert "concepts: 5\n" in printed


def test_the_command_counts_problems_that_were_written_twice(
    inputs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, *others = read(inputs[0])
    write(tmp_path / "g.jsonl", [first, *others, first])
    assert run(monkeypatch, tmp_path / "g.jsonl", inputs[1], tmp_path / "train.jsonl") == 0
    assert "; of the accepted, 1 repeat another one\n" in capsys.readouterr().out


DEFINITION = {"domain": "math theorem", "concept": "Chord Rule", "definition": "It says so."}


@pytest.mark.parametrize(
    ("generations", "definitions", "message"),
    [
        (None, [], "g.jsonl: No such file"),
        ([{"n": 1}], [], "g.jsonl: object 1: 'domain' is NoneType"),
        ([[]], [], "g.jsonl:1: no object"),
        ([generation("math theorem", "Chord Rule", 1)], [], "no definition of 'Chord Rule'"),
        (
            [generation("math theorem", "Chord Rule", 1)],
            [DEFINITION],
            "accepted generations of 'Chord Rule' only",
        ),
    ],
)
def test_unusable_input_is_refused_with_one_line(
    generations: Rows | None,
    definitions: Rows,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if generations is not None:
        write(tmp_path / "g.jsonl", generations)
    write(tmp_path / "d.jsonl", definitions)
    out = tmp_path / "train.jsonl"
    assert run(monkeypatch, tmp_path / "g.jsonl", tmp_path / "d.jsonl", out) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": 1, "generation": "cut', "g.jsonl:3: Unterminated string"),
        (b'{"n": "\xff"}', "g.jsonl:3: invalid start byte"),
        (b'{"n": "\\ud83d"}', "g.jsonl:3: half of a pair"),
        (b"[" * 100_000, "g.jsonl:3: maximum recursion depth"),
        (b'{"n": 1' + b"0" * 5000 + b"}", "g.jsonl:3: Exceeds the limit"),
        (b"\0\0\0", "g.jsonl:3: Expecting value"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(
    line: bytes, message: str, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    generations, definitions = inputs
    lines = generations.read_bytes().split(b"\n")
    damaged = tmp_path / "g.jsonl"
    damaged.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
    assert run(monkeypatch, damaged, definitions, tmp_path / "train.jsonl") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_released_generations_become_rows_and_shards(released: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    summary = write_generation_rows(
        released / "generations.jsonl", released / "definitions.jsonl", train, seed=0
    )
    fates = summary["generations"]
    assert 1 - fates["unparsable"] / fates["total"] >= 0.98
    assert 0.55 <= fates["accepted"] / fates["total"] <= 0.75
    assert sum(summary["concepts"].values()) >= 200
    rows = read(train)
    kinds = Counter(row["task_type"] for row in rows)
    assert kinds["p2i"] == 2 * kinds["i2ps"]
    assert 0.70 <= kinds["p2ps"] / (kinds["p2ps"] + kinds["ps2ps"]) <= 0.80
    # 10,896 rows came from 1,583 accepted generations: 6.9 each.
    assert 5 <= len(rows) / fates["accepted"] <= 7
    dataset = Dataset.open(prepare(_config(train, tmp_path), num_workers=1), verify=True)
    assert dataset.num_examples == len(rows)
    assert len(dataset.documents) < len(rows)


def _config(rows: Path, folder: Path) -> PrepareConfig:
    """A word tokenizer is enough to make shards."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=2000, special_tokens=["<unk>", "<eos>"])
    texts = (row["positive_document"] for row in read(rows)[:500])
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder / "tokenizer")
    return PrepareConfig(
        output_dir=folder / "shards",
        tokenizer=str(folder / "tokenizer"),
        sources=(SourceConfig(name="reasonaug", format="reasonaug", path=str(rows)),),
    )
