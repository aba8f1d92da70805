"""A user's own retrieval task scores, plans and reports like one of mteb's on the same data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_support import load_letters

from pipeline.config import EvaluateConfig, OwnTask, build_config, dump_config
from pipeline.errors import UserError
from pipeline.evaluation.datasets import prefetch
from pipeline.evaluation.report import write_report
from pipeline.evaluation.run import embed, plan, run_all, run_element, score_all
from pipeline.evaluation.tasks import list_elements, read_split

BUILT_IN = "BrightBiologyRetrieval"


def rows_of(snapshots: Path, part: str) -> list[dict]:
    lines = (snapshots / "mteb/BRIGHT" / part / "biology.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_beir(folder: Path, corpus: list[dict], queries: list[dict], qrels: list[dict]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row.values())) for row in qrels)]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder: Path, corpus: list[dict], queries: list[dict], qrels: list[dict]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels/test", qrels)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


def write_task(folder: Path, snapshots: Path, write: Callable[..., Path] = write_beir) -> Path:
    """The data of the built-in task, with a title, a query and a document that must not count."""
    examples = rows_of(snapshots, "examples")
    corpus = [
        {"_id": row["id"], "title": row["content"][:9].strip(), "text": row["content"][9:].strip()}
        for row in rows_of(snapshots, "documents")
    ]
    queries = [{"_id": row["id"], "text": row["query"]} for row in examples]
    qrels = [
        {"query-id": row["id"], "corpus-id": gold, "score": 1}
        for row in examples
        for gold in row["gold_ids"]
    ]
    return write(folder, corpus, [*queries, {"_id": "unasked", "text": "Why?"}], qrels)


@pytest.fixture
def both(config: EvaluateConfig, snapshots: Path, tmp_path: Path) -> EvaluateConfig:
    """One weak model on the built-in task and on the same data as an own task."""
    own = OwnTask(name="mine", path=write_task(tmp_path / "mine", snapshots))
    return dataclasses.replace(
        config,
        models=config.models[:1],
        tasks=(BUILT_IN, own),
        instructions={BUILT_IN: "Find it", "mine": "Find it"},
    )


def test_an_own_task_scores_like_mtebs_on_the_same_data_and_stands_beside_it_in_the_report(
    both: EvaluateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    built_in, own = run_all(both, load=load_letters)
    assert "mine: queries without judgements, left out: 1" in capsys.readouterr().out
    assert own["metric"] == "ndcg_at_10"
    assert 0 < own["score"] < 1
    for key in ("metric", "score", "chance", "other_scores", "instruction"):
        assert own[key] == pytest.approx(built_in[key]), key
    assert list(own["per_query"].values()) == [*built_in["per_query"].values()]
    report = json.loads((write_report(both) / "report.json").read_text())
    assert [task["name"] for task in report["tasks"]] == [BUILT_IN, "mine"]
    assert report["tasks"][1]["benchmark"] == "other"
    assert report["tasks"][1]["published"] == {}


def test_stored_vectors_and_another_container_give_an_own_task_the_same_score(
    both: EvaluateConfig, snapshots: Path, tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "parquet", snapshots, write_parquet)
    own = OwnTask(name="mine", path=folder)
    prefetch(dataclasses.replace(both, tasks=(own,), instructions={}))  # it is only proved complete
    stored = dataclasses.replace(both, tasks=(BUILT_IN, own))
    plan(stored)
    embed(stored, 0, 1, load=load_letters, num_processes=1)
    (built_in, found) = score_all(stored)
    assert list(found["per_query"].values()) == list(built_in["per_query"].values())


def test_a_changed_folder_is_noticed_and_a_moved_one_is_no_change(
    both: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = dataclasses.replace(both, tasks=both.tasks[1:], instructions={})
    first = run_element(alone, 0, load=load_letters)
    (tmp_path / "mine").rename(tmp_path / "moved")
    moved = dataclasses.replace(alone, tasks=(OwnTask(name="mine", path=tmp_path / "moved"),))
    assert run_element(moved, 0, load=load_letters) == first
    corpus = tmp_path / "moved/corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("history", "zzzzzzz"))
    capsys.readouterr()
    run_element(moved, 0, load=load_letters)
    assert "scored again, changed since: data\n" in capsys.readouterr().out


FAULTS = {
    "null text": (
        lambda rows: rows["corpus"].append({"_id": "x", "text": None}),
        r"corpus.jsonl:49: no text",
    ),
    "two texts": (
        lambda rows: rows["corpus"].append({**rows["corpus"][0], "text": "other"}),
        r"corpus.jsonl:\d+: an earlier document has the id",
    ),
    "two queries": (
        lambda rows: rows["queries"].append({**rows["queries"][0], "text": "other"}),
        r"queries.jsonl:\d+: an earlier query has the id",
    ),
    "no query": (lambda rows: rows["queries"].clear(), "no query of .* has judgements"),
    "a query without text": (
        lambda rows: rows["queries"][0].pop("text"),
        r"queries.jsonl:1: no text",
    ),
    "a part of a grade": (
        lambda rows: rows["qrels"][0].update(score=0.5),
        "score 0.5 .*allowed: a whole number",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_data_of_an_own_task_are_one_line_before_the_model_is_loaded(
    fault: str, both: EvaluateConfig, tmp_path: Path, snapshots: Path
) -> None:
    change, message = FAULTS[fault]
    rows: dict[str, list[dict]] = {}
    write_task(
        tmp_path / "unused",
        snapshots,
        lambda folder, *parts: rows.update(zip(("corpus", "queries", "qrels"), parts, strict=True)),
    )
    change(rows)
    own = OwnTask(name="mine", path=write_beir(tmp_path / "wrong", **rows))
    with pytest.raises(UserError, match=message):
        plan(dataclasses.replace(both, tasks=(own,), instructions={}))


def test_bad_rows_of_all_files_of_an_own_task_are_told_at_once(
    snapshots: Path, tmp_path: Path
) -> None:
    rows: dict[str, list[dict]] = {}
    write_task(
        tmp_path / "unused",
        snapshots,
        lambda folder, *parts: rows.update(zip(("corpus", "queries", "qrels"), parts, strict=True)),
    )
    for fault in ("null text", "two texts", "two queries", "a query without text"):
        FAULTS[fault][0](rows)
    rows["queries"].append({"text": "no id"})
    rows["qrels"][0].update(score=float("nan"))
    path = write_beir(tmp_path / "wrong", **rows)
    with (path / "corpus.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError) as error:
        read_split(OwnTask(name="mine", path=path))
    found = error.value.found
    assert found.startswith("tasks.mine: 7 rows cannot be used: ")
    assert found.endswith("; and 2 more")
    for reason in ("no text", "an earlier document", "not JSON", "an earlier query", "no id"):
        assert reason in found


def test_own_tasks_are_written_in_the_config_beside_names(tmp_path: Path) -> None:
    tree = {
        "output_dir": "out",
        "models": [{"name": "a", "path": "a"}],
        "tasks": ["BRIGHT", {"name": "mine", "path": str(tmp_path), "split": "dev"}],
        "lengths": {"BRIGHT": [16], "mine": [8, 16]},
    }
    config = build_config(EvaluateConfig, tree, origin="here")
    last = list_elements(config)[-1]
    assert (last.task, last.max_length, last.own) == ("mine", 16, config.tasks[1])
    assert build_config(EvaluateConfig, json.loads(json.dumps(tree)), origin="here") == config
    assert "split: dev" in dump_config(config)
    for task, message in (
        (
            {"name": "mine", "path": "x", "spilt": "dev"},
            "here: tasks: unknown key 'spilt' .*name, path, split",
        ),
        ({"name": "mine"}, "tasks: key 'path' is missing"),
        ({"name": "../x", "path": "x"}, "letters, digits"),
    ):
        with pytest.raises(UserError, match=message):
            build_config(EvaluateConfig, {**tree, "tasks": [task]}, origin="here")
    for name in ("BRIGHT", BUILT_IN):
        own = dataclasses.replace(config.tasks[1], name=name)  # type: ignore[type-var]
        with pytest.raises(UserError, match="is a name of mteb"):
            list_elements(dataclasses.replace(config, tasks=(own,), lengths={}))
