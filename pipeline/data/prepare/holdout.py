"""Write the rows that `holdout` keeps out of training as tasks for `diffembed evaluate`.

    a row's positives              becomes
    all held out                   a query of SHARDS/holdout/SOURCE-holdout
    some held out                  nothing; it is dropped
    none held out                  an example, without the negatives that are held out

    holdout/evaluate.yaml          the tasks and their instructions, for `extends`
            TASK/queries.jsonl     {"_id", "text"}
                 corpus.jsonl      {"_id", "text"}: all documents of these rows, and documents of
                                   the shards, because a search among right answers is easy
                 qrels/test.tsv    query-id, corpus-id, score

A hash of a document's words decides, so it depends on neither the order nor the number of rows, and
a document that several rows or sources share goes the same way in all of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.config import PrepareConfig, SourceConfig, Template, dump_yaml
from pipeline.data.prepare.build import Build, CatalogueSummary
from pipeline.data.prepare.clean import hash_text, read_distinct_texts
from pipeline.data.shards import map_batch
from pipeline.data.sources.records import stable_hash
from pipeline.files import write_text

FOLDER = "holdout"
_CORPUS = 10_000  # documents to which a corpus is filled up


@dataclasses.dataclass(slots=True)
class _Task:
    """The held-out rows of one source."""

    instruction: str = ""
    # By the text of the query: rows with the same query are one. The dicts are ordered sets.
    positives: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)
    documents: dict[str, None] = dataclasses.field(default_factory=dict)
    num_trained: int = 0  # rows left out, because their query is also trained on


def write_holdout(build: Build) -> list[str]:
    """Write the tasks of all sources; return lines about them."""
    if build.config.holdout is None:
        return []
    trained = _trained_queries(build)
    fill = list(_training_documents(build))
    tasks: dict[str, _Task] = {}
    lines = []
    for number, source in enumerate(build.plan.sources):
        task = _read_task(build, number, trained)
        if not task.positives:
            lines.append(f"{source.name}: no row is held out")
            continue
        name = _name_of(source, tasks)
        tasks[name] = task
        for text in fill:
            if len(task.documents) >= _CORPUS:
                break
            task.documents.setdefault(text)
        _write_task(build, name, task)
        also = f", {task.num_trained:,} rows left out, because their query is also trained on"
        lines.append(
            f"{source.name}: {len(task.positives):,} queries held out, to find among "
            f"{len(task.documents):,} documents{also if task.num_trained else ''}"
        )
    if tasks:
        write_text(build.dataset / FOLDER / "evaluate.yaml", _evaluation(build.config, tasks))
        path = build.config.output_dir / FOLDER / "evaluate.yaml"
        lines.append(f"`diffembed evaluate` scores these with a config that extends {path}")
    return lines


def _read_task(build: Build, source: int, trained: frozenset[int]) -> _Task:
    """Join the held-out rows of a source, in the wording that an evaluation needs."""
    template, task = build.config.template, _Task()
    rows = [
        json.loads(line)
        for block in build.blocks_of(source)
        for line in build.held_out(block).read_bytes().splitlines()
    ]
    kept = [row for row in rows if stable_hash(row["query"]) not in trained]
    task.num_trained = len(rows) - len(kept)
    instructions = {row["instruction"] for row in kept}
    if len(instructions) == 1:
        (task.instruction,) = instructions
    for row in kept:
        query = row["query"]
        # An evaluation has one instruction for a task. Several become part of the queries, without
        # what the template will put around these again.
        if len(instructions) > 1:
            query = _inner(template.format_query(query, row["instruction"]), template, "query")
        positives = [_inner(text, template, "document") for text in row["positives"]]
        task.positives.setdefault(query, {}).update(dict.fromkeys(positives))
        negatives = [_inner(text, template, "document") for text in row["negatives"]]
        task.documents.update(dict.fromkeys([*positives, *negatives]))
    return task


def _inner(text: str, template: Template, role: Any) -> str:
    """Return a text without what the template puts around one that has no instruction."""
    prefix, suffix = template.frame(role)
    return text.removeprefix(prefix).removesuffix(suffix)


def _trained_queries(build: Build) -> frozenset[int]:
    """Return the hashes of all queries that are trained on."""
    blocks = range(len(build.plan.blocks))
    keys = [map_batch(build.rows(block)).column("query_key").to_numpy() for block in blocks]
    return frozenset(np.unique(np.concatenate(keys)).tolist())


def _training_documents(build: Build) -> Iterator[str]:
    """Yield documents of the shards in the order of their hashes, as many as a corpus may need."""
    left = _CORPUS
    for number, size in enumerate(build.read_summary(CatalogueSummary, 0).slices):
        count = min(left, size)
        for document in read_distinct_texts(build, number, np.arange(count)):
            yield _inner(document.text, build.config.template, "document")
        left -= count
        if not left:
            return


def _name_of(source: SourceConfig, taken: dict[str, _Task]) -> str:
    """Return a name for a source's task that is none of mteb's, and that a folder can have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name) + "-holdout"
    while name in taken:
        name += "-"
    return name


def _write_task(build: Build, name: str, task: _Task) -> None:
    folder = build.dataset / FOLDER / name
    ids = {text: hash_text(text).hex() for text in (*task.documents, *task.positives)}
    corpus = sorted(task.documents, key=ids.__getitem__)
    for file, texts in (("corpus", corpus), ("queries", task.positives)):
        entries = ({"_id": ids[text], "text": text} for text in texts)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        write_text(folder / f"{file}.jsonl", "".join(lines))
    judged = [
        f"{ids[query]}\t{ids[document]}\t1\n"
        for query, documents in task.positives.items()
        for document in documents
    ]
    write_text(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n" + "".join(judged))


def _evaluation(config: PrepareConfig, tasks: dict[str, _Task]) -> str:
    """Return the keys of an evaluation that follow from the shards."""
    longest = max(config.max_query_length, config.max_document_length)
    # The final folder, not the build's, in which these files are written.
    folder = config.output_dir / FOLDER
    tree = {
        "tasks": [{"name": name, "path": str(folder / name)} for name in tasks],
        "instructions": {name: task.instruction for name, task in tasks.items()},
        "max_length": longest,
        "max_tokens": max(16384, longest),  # its default, unless one text needs more
    }
    return "# For `extends` in a config of `diffembed evaluate`.\n" + dump_yaml(tree)
