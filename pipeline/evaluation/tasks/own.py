"""Retrieval tasks of the user's own: a folder of corpus, queries and qrels as a task of mteb."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets

from pipeline.config import OwnTask, SourceConfig
from pipeline.data.sources.blocks import BadRowError
from pipeline.data.sources.corpus import (
    corpus_records,
    folder_part,
    identifier,
    judgement_files,
    judgement_records,
)
from pipeline.data.sources.records import Record, plan_blocks, read_records
from pipeline.errors import UserError
from pipeline.evaluation.tasks.library import load_mteb

_SUBSET = "default"


def make_task(own: OwnTask) -> Any:
    """Return a task that mteb scores like its own: nDCG@10 over all queries with judgements."""
    mteb = load_mteb()
    from mteb.abstasks import AbsTaskRetrieval

    class FolderTask(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = mteb.TaskMetadata(
            name=own.name,
            description=f"Retrieval of the documents in {own.path}.",
            dataset={"path": str(own.path), "revision": "local"},
            type="Retrieval",
            category="t2t",
            eval_splits=[own.split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            self.dataset = {_SUBSET: {own.split: read_split(own)}}
            self.data_loaded = True

    return FolderTask()


def read_split(own: OwnTask) -> dict[str, Any]:
    """Read corpus, queries and judgements, as mteb holds a split.

    As with mteb's own tasks, queries without judgements do not count; how many is said.

    Raises:
        UserError: a file is missing or damaged, or no query is left; names file and line.
    """
    source = SourceConfig(name=own.name, format="mteb", path=str(own.path), split=own.split)
    try:
        corpus = _distinct(own, ((name, text) for name, text, _ in corpus_records(source)))
        queries = _distinct_queries(_records(source, "queries"))
        judged: dict[str, dict[str, int]] = {}
        files = tuple(judgement_files(source))
        for record, query, document, score in judgement_records(files, _refuse):
            judged.setdefault(query, {})[document] = _grade(record, score)
    except UserError as error:
        found = error.found.replace(f"sources.{own.name}", f"tasks.{own.name}")
        raise UserError(found, allowed=error.allowed, fix=error.fix) from error
    relevant = {query: documents for query, documents in judged.items() if query in queries}
    if not relevant:
        raise UserError(
            f"tasks.{own.name}: no query of {own.path} has judgements in split {own.split!r}",
            fix="check the ids in queries and qrels, or give the task another split",
        )
    _say_left_out(own, queries, judged)
    return {
        "corpus": datasets.Dataset.from_dict({"id": list(corpus), "text": list(corpus.values())}),
        "queries": _query_table({query: queries[query] for query in queries if query in relevant}),
        "relevant_docs": relevant,
        "top_ranked": None,
    }


def _distinct(own: OwnTask, documents: Iterator[tuple[str, str]]) -> dict[str, str]:
    """Texts by id.

    Raises:
        UserError: two documents have one id, so that judgements of it mean nothing.
    """
    corpus: dict[str, str] = {}
    for document, text in documents:
        if corpus.setdefault(document, text) != text:
            raise UserError(
                f"tasks.{own.name}: two documents of {own.path} have the id {document!r}",
                fix="give each document an id of its own",
            )
    return corpus


def _distinct_queries(records: Iterator[Record]) -> dict[str, Record]:
    """Records by id.

    Raises:
        UserError: two queries have one id, so that judgements of it mean nothing.
    """
    queries: dict[str, Record] = {}
    for record in records:
        first = queries.setdefault(name := identifier(record), record)
        if _asked(first) != _asked(record):
            raise record.fail(f"an earlier query has the id {name!r}", allowed="an id a query")
    return queries


def _asked(record: Record) -> tuple[object, object]:
    """Text and instruction of a query."""
    value = record.value
    return value.get("text", value.get("query")), value.get("instruction")


def _records(source: SourceConfig, part: str) -> Iterator[Record]:
    for file in folder_part(source, part):
        for block in plan_blocks(file, split=None, block_bytes=2**62, max_rows=None):
            yield from read_records(block, split=None)


def _refuse(bad: BadRowError) -> None:
    raise bad


def _grade(record: Record, score: float) -> int:
    if score != int(score):
        raise record.fail(
            f"score {score}", allowed="a whole number; documents above 0 are relevant"
        )
    return int(score)


def _query_table(queries: dict[str, Record]) -> datasets.Dataset:
    """Ids and texts, with the queries' own instructions where there are any."""
    columns: dict[str, list[str | None]] = {"id": list(queries), "text": []}
    for record in queries.values():
        text, _ = _asked(record)
        if not isinstance(text, str):
            raise record.fail("no text", allowed="a text in the field text or query")
        columns["text"].append(text)
    if any(record.value.get("instruction") for record in queries.values()):
        columns["instruction"] = [record.value.get("instruction") for record in queries.values()]
    return datasets.Dataset.from_dict(columns)


def _say_left_out(own: OwnTask, queries: dict[str, Record], judged: dict[str, Any]) -> None:
    counts = {
        "queries without judgements, left out": len(queries.keys() - judged.keys()),
        "judged queries without text, left out": len(judged.keys() - queries.keys()),
    }
    for what, count in counts.items():
        if count:
            print(f"{own.name}: {what}: {count}", flush=True)
