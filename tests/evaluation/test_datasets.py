"""Tasks as mteb loads them: complete, or refused in one line; prefetched through a local hub."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import benchmark_replicas as replicas
import mteb
import pytest
from datasets import Dataset
from local_hub import serve
from mteb._create_dataloaders import _combine_queries_with_instruction_text, _corpus_to_dict

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.datasets import (
    REVISION_FILE,
    document_texts,
    evaluated_splits,
    get_task,
    load_and_check,
    load_texts,
    localise,
    prefetch,
    private_cache,
    query_texts,
)
from pipeline.evaluation.run import plan, run_all
from pipeline.evaluation.tasks import BENCHMARKS

FOLLOW_IR = "Core17InstructionRetrieval"
AOPS, CORE = "BrightAopsRetrieval", "Core17InstructionRetrieval"


def test_strings_are_those_that_mteb_would_make():
    rows = {"id": ["1", "2", "3"], "title": ["A title", "", None], "text": [" x ", "y\n", "z"]}
    theirs = [
        _corpus_to_dict({key: rows[key][i] for key in rows if rows[key][i] is not None})["text"]
        for i in range(3)
    ]
    assert document_texts(Dataset.from_dict(rows)) == theirs
    assert document_texts(Dataset.from_dict({"text": [" only text "]})) == ["only text"]
    queries = Dataset.from_dict({"text": ["q1", "q2"], "instruction": ["do this", None]})
    assert query_texts(queries) == _combine_queries_with_instruction_text(queries)["text"][:]
    assert query_texts(Dataset.from_dict({"text": ["q1"]})) == ["q1"]


@pytest.mark.parametrize("task", [*BENCHMARKS["BRIGHT"], *BENCHMARKS["BRIGHT-long"]])
def test_bright_is_listed_by_column_as_mteb_loads_it(task, snapshots, tmp_path):
    with private_cache(tmp_path):
        loaded = localise(get_task(task), snapshots)
        load_and_check(loaded)
    ((_, _, data),) = evaluated_splits(loaded)
    documents, queries = load_texts(task, snapshots=snapshots)
    assert documents == document_texts(data["corpus"])
    assert queries == query_texts(data["queries"])


def test_doubtful_rows_of_a_snapshot_are_counted(tmp_path, capsys):
    replicas.write_follow_ir(tmp_path / "hub")
    folder = tmp_path / "hub/mteb" / FOLLOW_IR

    def add(part: str, change: Callable[[list[dict]], list[dict]]) -> None:
        (path,) = (folder / part).glob("*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *change(rows)]))

    add("corpus", lambda rows: [rows[0], {**rows[1], "text": "other"}])
    add("queries", lambda rows: [rows[0], {**rows[1], "text": "other"}])
    add("default", lambda rows: [{**rows[0], "corpus-id": "nowhere"}])
    (path,) = (folder / "default").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["score"] *= row["query-id"] != rows[0]["query-id"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with private_cache(tmp_path):
        load_and_check(localise(get_task(FOLLOW_IR), tmp_path / "hub"))
    assert capsys.readouterr().out.splitlines() == [
        f"{FOLLOW_IR} default/test: {what}: 1"
        for what in (
            "queries without a relevant document, which count as 0",
            "judged documents that the corpus lacks, never found",
            "documents with an earlier document's id and another text, of which one counts",
            "queries with an earlier query's id and another text, of which one counts",
        )
    ]


def test_repeated_ids_of_bright_are_counted_although_mteb_drops_them(tmp_path, capsys):
    replicas.write_bright(tmp_path / "hub", "mteb/BRIGHT")
    for part, column in (("documents", "content"), ("examples", "query")):
        (path,) = (tmp_path / "hub/mteb/BRIGHT" / part).glob("aops.jsonl")
        lines = path.read_text().splitlines()
        other = {**json.loads(lines[0]), column: "other"}
        path.write_text("\n".join([*lines, lines[1], json.dumps(other)]) + "\n")
    with private_cache(tmp_path):
        load_and_check(localise(get_task(AOPS), tmp_path / "hub"))
    assert capsys.readouterr().out.splitlines() == [
        f"{AOPS} default/standard: {what} with an earlier {kind}'s id and another text, of which "
        "one counts: 1"
        for what, kind in (("documents", "document"), ("queries", "query"))
    ]


def test_localising_a_task_leaves_mtebs_own_metadata_alone(snapshots):
    localised = localise(get_task(FOLLOW_IR), snapshots)
    assert localised.metadata.dataset["path"].startswith(str(snapshots))
    fresh = mteb.get_task(FOLLOW_IR)
    assert fresh.metadata.dataset["path"] == f"mteb/{FOLLOW_IR}"
    assert localised.metadata.dataset["revision"] == fresh.metadata.dataset["revision"]


def test_a_missing_snapshot_and_an_unknown_task_are_the_users_errors(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        localise(get_task(FOLLOW_IR), tmp_path)
    with pytest.raises(UserError, match="no such task"):
        get_task("Core18InstructionRetrieval")
    with pytest.raises(UserError, match=r"for a folder, write \{name: NAME, path: "):
        get_task(str(tmp_path))
    with pytest.raises(UserError, match="allowed: retrieval"):
        get_task("STS12")


def edit(path: Path, change: Callable[[list[dict]], object]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FAULTS: dict[str, tuple[str, str, Callable[[list[dict]], object], str]] = {
    "null document": (
        AOPS,
        "mteb/BRIGHT/documents/aops.jsonl",
        lambda rows: rows[2].update(content=None),
        "document 'aops/glaciers-measurement': text is null",
    ),
    "null query": (
        CORE,
        f"mteb/{CORE}/queries/queries.jsonl",
        lambda rows: rows[0].update(text=None),
        "query '0-og': text is null",
    ),
    "no judgement": (
        AOPS,
        "mteb/BRIGHT/examples/aops.jsonl",
        lambda rows: rows[2].update(gold_ids=[]),
        r"no relevance judgements for queries \['2'\]",
    ),
    "document's id": (
        AOPS,
        "mteb/BRIGHT/documents/aops.jsonl",
        lambda rows: [row.update(id=[]) for row in rows],
        r"document: an id is \[\] \| allowed: texts",
    ),
    "query's id": (
        AOPS,
        "mteb/BRIGHT/examples/aops.jsonl",
        lambda rows: [row.update(id=[1]) for row in rows],
        r"query \[1\] judges the documents .* allowed: ids that are texts",
    ),
    "half a grade": (
        CORE,
        f"mteb/{CORE}/default/test.jsonl",
        lambda rows: [row.update(score=0.5) for row in rows],
        r"Float value 0.500000 was truncated",
    ),
    "judged number": (
        AOPS,
        "mteb/BRIGHT/examples/aops.jsonl",
        lambda rows: rows[2].update(gold_ids=[-0.5]),
        r"query '2' judges the documents \[-0.5\] \| allowed: ids that are texts",
    ),
    "no such column": (
        AOPS,
        "mteb/BRIGHT/documents/aops.jsonl",
        lambda rows: [row.pop("content") for row in rows],
        "cannot load the data set",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_data_are_named_with_a_fix_that_fits_where_they_come_from(
    fault: str, one: EvaluateConfig, tmp_path: Path
) -> None:
    task, file, change, message = FAULTS[fault]
    hub = tmp_path / "hub"
    folder = hub / Path(*Path(file).parts[:2])
    shutil.copytree(one.snapshots / folder.relative_to(hub), folder)
    edit(hub / file, change)
    own = dataclasses.replace(one, snapshots=hub, tasks=(task,))
    with pytest.raises(UserError, match=f"{message}.* fix: repair the files in {folder}, or name"):
        plan(own)
    if fault == "no judgement":
        from pipeline.evaluation.datasets import get_task

        revision = get_task(task).metadata.dataset["revision"]
        (folder / REVISION_FILE).write_text(revision)
        with pytest.raises(UserError, match=f"fix: remove {folder} and run `diffembed evaluate"):
            plan(own)


_OFFLINE = """
import sys
from pipeline.errors import UserError
from pipeline.evaluation.datasets import get_task, load_and_check
try:
    load_and_check(get_task(sys.argv[1]))
except UserError as error:
    print(error)
"""


def test_without_a_network_or_a_home_folder_one_line_names_prefetch(tmp_path: Path) -> None:
    """In a separate process: libraries decide at import whether they are offline."""
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "home")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": nowhere}
    environment.pop("MTEB_CACHE", None)
    ran = subprocess.run(
        [sys.executable, "-c", _OFFLINE, "NFCorpus"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (line,) = ran.stdout.splitlines()
    assert line.startswith("NFCorpus: cannot load the data set mteb/nfcorpus (")
    assert line.endswith(
        "| fix: set snapshots to a folder, and run `diffembed evaluate prefetch` on a machine "
        "with network"
    )


TASKS = ("Core17InstructionRetrieval", "BrightAopsRetrieval", "BrightBiologyRetrieval")


@pytest.fixture
def away(config, tmp_path):
    """A config whose snapshots are still to be fetched."""
    return dataclasses.replace(
        config, snapshots=tmp_path / "fetched", tasks=TASKS, models=config.models[:1]
    )


def test_fetched_snapshots_score_like_the_originals(away, config, snapshots, load):
    with serve(snapshots) as (address, sent):
        prefetch(away, endpoint=address)
        assert len({name for name in sent if name.startswith("mteb/BRIGHT/")}) > 3
        assert not [name for name in sent if name.startswith("xlangai/")]
        count = len(sent)
        prefetch(away, endpoint=address)
        assert len(sent) == count  # nothing is fetched again
    fetched = run_all(away, load=load)
    there = dataclasses.replace(away, snapshots=snapshots, output_dir=away.output_dir / "there")
    assert [r["score"] for r in fetched] == [r["score"] for r in run_all(there, load=load)]


def test_a_snapshot_of_another_revision_is_refused(away, snapshots):
    with serve(snapshots) as (address, _):
        prefetch(away, endpoint=address)
    marker = away.snapshots / "mteb/BRIGHT" / REVISION_FILE
    assert marker.read_text().strip() == get_task(TASKS[1]).metadata.dataset["revision"]
    marker.write_text("0" * 40)
    with pytest.raises(UserError, match="revision 000000000000"):
        localise(get_task(TASKS[1]), away.snapshots)


def test_an_incomplete_data_set_is_noticed_while_there_is_a_network(away, tmp_path):
    replicas.write_follow_ir(tmp_path / "origin", without=("top_ranked",))
    away = dataclasses.replace(away, tasks=TASKS[:1])
    with serve(tmp_path / "origin") as (address, _), pytest.raises(UserError, match="candidates"):
        prefetch(away, endpoint=address)


def test_a_hub_without_the_data_set_is_the_users_error(away, tmp_path):
    with serve(tmp_path) as (address, _), pytest.raises(UserError, match="reaches the hub"):
        prefetch(away, endpoint=address)
    with pytest.raises(UserError, match="snapshots: not set"):
        prefetch(dataclasses.replace(away, snapshots=None))
