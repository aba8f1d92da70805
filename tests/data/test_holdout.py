"""Documents that `holdout` keeps out of training, and the tasks made of their rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_support import ConfigMaker, make_source, words, write_jsonl

from pipeline.config import EvaluateConfig, OwnTask, Template, build_config
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.evaluation.tasks import read_split

Records = list[dict[str, Any]]
Build = Callable[..., Dataset]


def make_rows(count: int) -> Records:
    """Rows with one or two own positives, and negatives that are others' positives."""
    rng = random.Random(5)
    documents = [f"{number} {words(rng, 8)}" for number in range(count + 1)]
    return [
        {
            "query": f"question {number}",
            "positives": documents[number : number + 1 + (number % 4 == 0)],
            "negatives": rng.sample(documents[:number] or ["no"], 1),
        }
        for number in range(count)
    ]


@pytest.fixture
def build(make_config: ConfigMaker, tmp_path: Path) -> Build:
    def run(rows: Records, name: str = "dataset", **options: Any) -> Dataset:
        source = options.pop("source", {})
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        config = make_config(make_source(path, **source), name=name, **options)
        return Dataset.open(prepare(config, num_workers=1), verify=True)

    return run


def task_of(dataset: Dataset) -> dict[str, Any]:
    """The task as an evaluation reads it, with texts in place of ids."""
    path = dataset.folder / "holdout" / "set-holdout"
    read = read_split(OwnTask(name="set-holdout", path=path))
    corpus = dict(zip(read["corpus"]["id"], read["corpus"]["text"], strict=True))
    queries = dict(zip(read["queries"]["id"], read["queries"]["text"], strict=True))
    answers = {
        queries[query]: {corpus[document] for document in judged}
        for query, judged in read["relevant_docs"].items()
    }
    return {"answers": answers, "corpus": set(corpus.values())}


def texts(dataset: Dataset, tokenizer_path: Path, column: str) -> list[list[str]]:
    """The queries of all examples, or the documents of a column."""
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(tokenizer_path).decode
    every = np.arange(dataset.num_examples)
    if column == "query":
        return [[decode(view)] for view in dataset.examples.views(column, every)]
    numbers = dataset.examples.ragged(column, every)
    return [[decode(view) for view in dataset.documents.views("tokens", numbers[k])] for k in every]


def test_held_out_documents_are_in_no_example_and_their_rows_are_a_task(
    build: Build, tokenizer_path: Path
) -> None:
    rows = make_rows(120)
    dataset = build(rows, holdout=0.3)
    task = task_of(dataset)
    trained = dict(
        zip(
            (query for (query,) in texts(dataset, tokenizer_path, "query")),
            zip(
                texts(dataset, tokenizer_path, "positives"),
                texts(dataset, tokenizer_path, "negatives"),
                strict=True,
            ),
            strict=True,
        )
    )
    shown = set().union(*(found for pair in trained.values() for found in pair))
    mixed = 0
    for row in rows:
        positives, query = set(row["positives"]), row["query"]
        if query in task["answers"]:
            assert task["answers"][query] == positives
            assert not positives & shown
            assert set(row["negatives"]) <= task["corpus"]
        elif query in trained:
            assert set(trained[query][0]) == positives
            assert set(trained[query][1]) == set(row["negatives"]) & shown
        else:
            mixed += 1
            assert len(positives) == 2 and positives - shown
    assert 20 < len(task["answers"]) < 55
    assert len(task["answers"]) + len(trained) + mixed == len(rows)
    dropped = dataset.manifest.sources[0].dropped
    assert dropped["query: only some of its positives are held out"] == mixed > 0
    assert dropped["negative: held out"] > 0
    # All documents of the shards make the search harder.
    assert shown <= task["corpus"]
    assert f"{len(task['answers'])} queries held out" in (dataset.folder / "report.md").read_text()


def test_a_document_stays_on_its_side_when_rows_are_added(build: Build) -> None:
    rows = make_rows(80)
    few = task_of(build(rows[::2], name="few", holdout=0.4))["answers"]
    many = task_of(build(rows, name="many", holdout=0.4))["answers"]
    shared = {row["query"] for row in rows[::2]}
    assert few == {query: found for query, found in many.items() if query in shared}


def test_the_size_of_blocks_does_not_change_what_is_held_out(build: Build) -> None:
    rows = make_rows(80)
    folders = [
        build(rows, name=name, holdout=0.2, block_bytes=size).folder / "holdout" / "set-holdout"
        for name, size in (("small", 1024), ("large", 10**6))
    ]
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_query_that_is_also_trained_on_is_not_a_test(build: Build) -> None:
    rows = make_rows(60)
    same = [{**row, "query": "the same question"} for row in rows]
    different = [{**row, "query": f"again {row['query']}"} for row in rows]
    dataset = build([*same, *different], holdout=0.3)
    assert "the same question" not in task_of(dataset)["answers"]
    assert (
        "rows left out, because their query is also" in (dataset.folder / "report.md").read_text()
    )


@pytest.mark.parametrize(
    "query", ["Instruct: {instruction}\nQuery: {text}", "[I] {instruction}; {text} [/I]"]
)
def test_queries_are_scored_in_the_words_that_training_uses(build: Build, query: str) -> None:
    template = Template(query=query)
    rows = [{**row, "instruction": f"Do {k % 2}"} for k, row in enumerate(make_rows(60))]
    columns = {
        "columns": {"query": "query", "positives": "positives", "instruction": "instruction"}
    }
    several = build(rows, name="several", holdout=0.3, source=columns, template=template)
    one = build(rows, name="one", holdout=0.3, source={"instruction": "Do 0"}, template=template)
    for dataset, wanted in ((several, None), (one, "Do 0")):
        tree = yaml.safe_load((dataset.folder / "holdout" / "evaluate.yaml").read_text())
        config = build_config(
            EvaluateConfig,
            {**tree, "output_dir": "x", "models": [{"name": "m", "path": "m"}]},
            origin="test",
        )
        instruction = config.instructions["set-holdout"]
        asked = {template.format_query(text, instruction) for text in task_of(dataset)["answers"]}
        trained = {
            template.format_query(row["query"], wanted or row["instruction"]) for row in rows
        }
        assert asked and asked <= trained
        assert config.tasks == (
            OwnTask(name="set-holdout", path=dataset.folder / "holdout" / "set-holdout"),
        )


def test_a_dataset_without_a_holdout_does_not_know_of_it(build: Build) -> None:
    dataset = build(make_rows(20))
    assert "holdout" not in json.loads((dataset.folder / "recipe.json").read_text())["config"]
    assert not (dataset.folder / "holdout").exists()
