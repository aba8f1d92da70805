"""Write the mined dataset: new negatives in the examples, everything else as it was.

negatives   picked candidates, the teacher's verdict -> one examples-K.arrow per shard
vectors     a teacher's stored vectors -> vectors/*.npy per shard
complete    documents by hard link, the audit and, last, manifest.json; then the final name
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import as_tree
from pipeline.data.batch import IntArray, Ragged
from pipeline.data.manifest import (
    FILE_NAME,
    Manifest,
    MiningInfo,
    ShardInfo,
    TeacherInfo,
    read_manifest,
    write_manifest,
)
from pipeline.data.shards import (
    EXAMPLE_SCHEMA,
    MINED_EXAMPLE_SCHEMA,
    map_batch,
    ragged_array,
    write_table,
)
from pipeline.data.vectors import vector_file, write_teacher_vectors
from pipeline.errors import UserError, say_warning
from pipeline.files import map_vectors, read_record, save_arrays, write_sealed
from pipeline.mining.audit import RATIO_BINS, count_ratios, write_audit
from pipeline.mining.pick import read_picked, source_of_examples
from pipeline.mining.plan import Mining, delete_and_mine, once
from pipeline.mining.retrieve import read_found
from pipeline.mining.rules import CANDIDATE, Candidates, Limits, choose
from pipeline.mining.teacher import read_scores
from pipeline.mining.texts import lowest_scores, positives_of


def blocks_of(mining: Mining, role: str, shard: int) -> list[int]:
    """Return the numbers of a shard's blocks of documents or queries."""
    return [k for k, block in enumerate(mining.blocks(role)) if block.shard == shard]


@dataclasses.dataclass(slots=True)
class _Rows:
    """The new columns of a shard's examples, and counts for the audit."""

    negatives: list[IntArray] = dataclasses.field(default_factory=list)
    scores: list[NDArray[np.float32]] = dataclasses.field(default_factory=list)
    candidates: list[IntArray] = dataclasses.field(default_factory=list)
    candidate_scores: list[NDArray[np.float32]] = dataclasses.field(default_factory=list)
    candidate_bands: list[NDArray[np.int8]] = dataclasses.field(default_factory=list)
    # Chosen negatives of each example, and the ones that the teacher took from its candidates.
    mined: list[int] = dataclasses.field(default_factory=list)
    false: list[int] = dataclasses.field(default_factory=list)


def write_shard(mining: Mining, task: int) -> None:
    """Write one shard of examples with its new negatives."""
    info = mining.source.manifest.example_shards[task]
    rows = _Rows()
    num_sources, num_bands = len(mining.source.manifest.sources), max(1, len(mining.config.bands))
    shape = (len(mining.config.retrievers), num_sources, num_bands, RATIO_BINS)
    ratios = np.zeros(shape, dtype=np.int64)
    for number in blocks_of(mining, "queries", task):
        _add_block(mining, number, rows, ratios)
    batch = map_batch(mining.source.folder / info.file)
    columns = {name: batch.column(name) for name in EXAMPLE_SCHEMA.names}
    columns["negatives"] = ragged_array(Ragged.from_rows(rows.negatives), pa.int64())
    columns["scores"] = ragged_array(Ragged.from_rows(rows.scores), pa.float32())
    if not mining.config.keep_negatives:
        # They were counted among the negatives that are replaced.
        columns["num_first_negatives"] = pa.array(np.zeros(info.rows, np.int32))
    schema = EXAMPLE_SCHEMA
    if mining.config.candidates:
        schema = MINED_EXAMPLE_SCHEMA
        parts: list[tuple[Sequence[NDArray[Any]], pa.DataType]] = [
            (rows.candidates, pa.int64()),
            (rows.candidate_scores, pa.float32()),
            (rows.candidate_bands, pa.int8()),
        ]
        for name, (part, kind) in zip(schema.names[-3:], parts, strict=True):
            columns[name] = ragged_array(Ragged.from_rows(part), kind)
    path = mining.building / "dataset" / f"examples-{task:05d}.arrow"
    write_table(path, pa.table([columns[name] for name in schema.names], schema=schema))
    _summarise(mining, task, rows, ratios, path)


def _summarise(
    mining: Mining, task: int, rows: _Rows, ratios: NDArray[np.int64], path: Path
) -> None:
    shard = ShardInfo.of(path, len(rows.negatives))
    summary = mining.summary("examples", task)
    # Before the summary, whose existence means that the shard and these counts are written.
    save_arrays(
        summary.with_suffix(".npz"),
        mined=np.array(rows.mined, dtype=np.int64),
        false=np.array(rows.false, dtype=np.int64),
        ratios=ratios,
    )
    # Below a key: a shard's own hash has the name of the record's.
    write_sealed(summary, {"shard": dataclasses.asdict(shard)})


def _add_block(mining: Mining, number: int, rows: _Rows, ratios: NDArray[np.int64]) -> None:
    config, block = mining.config, mining.query_blocks[number]
    ids = block.numbers
    picked, positives = read_picked(mining, number), positives_of(mining, ids)
    taught = read_scores(mining, number) if config.teacher is not None else None
    earlier = mining.source.examples.ragged("negatives", ids)
    found = [read_found(mining, retriever, number) for retriever in range(len(config.retrievers))]
    # (retrievers, queries)
    lowest = np.stack([lowest_scores(positives, part["positive_scores"]) for part in found])
    sources = source_of_examples(mining, ids)
    for row, example in enumerate(ids.tolist()):
        span = slice(picked["offsets"][row], picked["offsets"][row + 1])
        candidates = Candidates(
            documents=picked["documents"][span],
            scores=picked["scores"][span],
            bands=picked["bands"][span],
            inside=picked["inside"][span],
        )
        scores = taught["candidates"][span] if taught else np.empty(0)
        if taught:
            own = taught["positives"][positives.offsets[row] : positives.offsets[row + 1]]
            # A candidate that the teacher scores like a positive is probably an unlabelled answer.
            is_true = _accepted(mining, scores, float(own.min()))
            rows.false.append(int((~is_true).sum()))
            candidates, scores = candidates.take(np.flatnonzero(is_true)), scores[is_true]
        # Chosen here and not in `pick`, from what the teacher has left.
        chosen = choose(config, candidates, config.negatives, example)
        kept = earlier[row] if config.keep_negatives else np.empty(0, np.int64)
        # A kept negative may have been found again: the query must not list it twice.
        new = chosen[~np.isin(candidates.documents[chosen], kept)]
        rows.negatives.append(np.concatenate([kept, candidates.documents[new]]).astype(np.int64))
        rows.mined.append(len(new))
        if taught:
            known = slice(earlier.offsets[row], earlier.offsets[row + 1])
            before = taught["negatives"][known] if config.keep_negatives else np.empty(0)
            # Value for value of the columns `positives` and `negatives`.
            parts = [own, before, scores[new]]
            rows.scores.append(np.concatenate(parts).astype(np.float32))
        else:
            rows.scores.append(np.empty(0, np.float32))
        # Stored for other draws in each epoch of a training.
        best = slice(0, config.candidates)
        rows.candidates.append(candidates.documents[best])
        rows.candidate_scores.append(scores[best].astype(np.float32))
        rows.candidate_bands.append(candidates.bands[best])
        count_ratios(ratios[:, sources[row]], candidates.take(new), lowest[:, row])


def _accepted(mining: Mining, scores: NDArray[np.float64], lowest: float) -> NDArray[np.bool_]:
    """(C,) False where the teacher takes a candidate for an answer."""
    margin = mining.teacher[0].margin
    if margin is None:
        return np.ones(len(scores), dtype=bool)
    limits = Limits.of(margin, lowest, _teacher_level(mining, margin.percentile))
    accepted: NDArray[np.bool_] = limits.exceeded(scores) == CANDIDATE
    return accepted


def _teacher_level(mining: Mining, percentile: float | None) -> float:
    """Return this percentile of the teacher's scores of all positives; NaN for None."""
    if percentile is None:
        return float("nan")

    def measure() -> float:
        blocks = range(len(mining.query_blocks))
        scores = [read_scores(mining, block)["positives"] for block in blocks]
        return float(np.percentile(np.concatenate(scores), percentile))

    return once(mining.store("teacher"), f"level {percentile}", measure)


# --- a teacher's vectors ---------------------------------------------------------------------


def vector_tasks(mining: Mining) -> list[tuple[str, int]]:
    """Return kind and shard of each file of vectors."""
    teacher = mining.config.teacher
    if teacher is None or not teacher.vectors:
        return []
    manifest = mining.source.manifest
    num_documents = len(manifest.document_shards) + len(mining.corpora.shards)
    return [("documents", k) for k in range(num_documents)] + [
        ("queries", k) for k in range(len(manifest.example_shards))
    ]


def write_vectors(mining: Mining, task: int) -> None:
    """Write the teacher's vectors of one shard."""
    kind, shard = vector_tasks(mining)[task]
    _, model = mining.teacher
    numbers = blocks_of(mining, kind, shard)
    paths = [mining.vectors(model, kind, k) for k in numbers]
    # `write_teacher_vectors` refuses a block of another width than the first.
    width = map_vectors(paths[0], fix=delete_and_mine(paths[0])).shape[1]
    info = write_teacher_vectors(
        mining.building / "dataset",
        vector_file(kind, shard),
        # One block in memory at a time.
        (map_vectors(path, fix=delete_and_mine(path)) for path in paths),
        rows=sum(mining.blocks(kind)[k].rows for k in numbers),
        width=width,
    )
    summary = mining.summary("vectors", task)
    write_sealed(summary, {"width": width, "shard": dataclasses.asdict(info)})


# --- the whole folder ------------------------------------------------------------------------


def complete(mining: Mining, task: int) -> None:
    """Add documents, audit and manifest to the shards of examples."""
    folder = mining.building / "dataset"
    folder.mkdir(parents=True, exist_ok=True)
    source, corpora = mining.source.manifest, mining.corpora
    copied = 0
    documents = list(source.document_shards)
    for info in source.document_shards:
        copied += _share(mining.source.folder / info.file, folder / info.file)
    # Behind the dataset's, so that its documents keep their numbers.
    for number, info in enumerate(corpora.shards, start=len(documents)):
        named = dataclasses.replace(info, file=f"documents-{number:05d}.arrow")
        copied += _share(mining.store("texts") / "corpora" / info.file, folder / named.file)
        documents.append(named)
    if copied:
        say_warning(
            f"{copied} of {len(documents)} document shards were copied to {mining.config.output}: "
            "its disk cannot share them with the original"
        )
    examples = tuple(
        _read_summary(mining, "examples", k)[0] for k in range(len(source.example_shards))
    )
    write_audit(mining, folder)
    manifest = dataclasses.replace(
        source,
        recipe=mining.plan.result,
        has_scores=mining.config.teacher is not None,
        num_documents=source.num_documents + sum(info.rows for info in corpora.shards),
        document_lengths=source.document_lengths.plus(corpora.lengths),
        example_shards=examples,
        document_shards=tuple(documents),
        mining=_mining_info(mining),
    )
    # Last: a folder with a manifest is complete.
    write_manifest(folder / FILE_NAME, manifest)


def _share(source: Path, target: Path) -> int:
    """Link a file under another name, or copy it; return 1 if it was copied."""
    # Left by a killed attempt: a link cannot replace it.
    target.unlink(missing_ok=True)
    try:
        # Resolved: of a symbolic link, Linux would link the link itself.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        return 1
    return 0


def _mining_info(mining: Mining) -> MiningInfo:
    config, plan = mining.config, mining.plan
    models = {
        retriever.name: model.fingerprint
        for retriever, model in zip(config.retrievers, plan.retrievers, strict=True)
    }
    if plan.teacher is not None:
        models["teacher"] = plan.teacher.fingerprint
    tree = as_tree(config)
    # Names of folders on this machine decide nothing.
    settings = {key: value for key, value in tree.items() if key not in ("output", "store")}
    return MiningInfo(
        source=plan.data,
        settings=settings,
        models=models,
        bands=tuple(band.name for band in config.bands) or ("window",),
        candidates=config.candidates > 0,
        teacher=_teacher_info(mining),
    )


def _teacher_info(mining: Mining) -> TeacherInfo | None:
    tasks = vector_tasks(mining)
    if not tasks:
        return None
    files: dict[str, list[ShardInfo]] = {"documents": [], "queries": []}
    widths = set()
    for task, (kind, _) in enumerate(tasks):
        info, tree = _read_summary(mining, "vectors", task)
        files[kind].append(info)
        widths.add(tree["width"])
    if len(widths) > 1:
        raise UserError(
            f"{mining.config.store_folder}: teacher vectors of widths {sorted(widths)}",
            fix="delete the store and run `diffembed mine` again",
        )
    teacher, model = mining.teacher
    return TeacherInfo(
        name=str(teacher.path),
        fingerprint=model.fingerprint,
        width=widths.pop(),
        norm="unit",
        documents=tuple(files["documents"]),
        queries=tuple(files["queries"]),
    )


def _read_summary(mining: Mining, kind: str, task: int) -> tuple[ShardInfo, dict[str, Any]]:
    path = mining.summary(kind, task)
    tree = read_record(path, dict[str, Any], fix=f"delete {mining.building}")
    return ShardInfo(**tree["shard"]), tree


def publish(mining: Mining) -> Manifest:
    """Give the dataset its final name and remove the rest."""
    target = mining.config.output.resolve()
    if target.is_dir():
        target.rmdir()  # empty, or `_is_done` would have refused it
    (mining.building / "dataset").rename(target)
    # After the rename: a kill in between leaves a complete dataset, which the next start tidies.
    remove_rest(mining)
    return read_manifest(target)


def remove_rest(mining: Mining) -> None:
    """Remove what an unfinished mining keeps next to its output."""
    mining.plan_path.unlink(missing_ok=True)
    shutil.rmtree(mining.building, ignore_errors=True)
