"""Estimate the work of a mining from its plan and the manifest; nothing is computed or written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config import MineConfig
from pipeline.data.manifest import LengthHistogram
from pipeline.errors import UserError
from pipeline.evaluation.models import num_parameters
from pipeline.mining.plan import (
    CorpusReport,
    Mining,
    is_bm25,
    is_mined,
    local_folder,
    plan_mining,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The size of a mining.

    Attributes:
        documents: texts and tokens to search.
        queries: the same of the examples.
        unread: corpora that no earlier mining has read; their documents come in addition.
    """

    documents: LengthHistogram
    queries: LengthHistogram
    unread: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens that every embedder reads."""
        return self.documents.tokens + self.queries.tokens


def describe_mining(config: MineConfig) -> str:
    """Return what each step would compute, and how much of it the store holds already.

    Raises:
        UserError: the data, a model or the output is not usable.
    """
    if is_mined(config):
        return f"{config.output} is complete: nothing to do"
    mining = plan_only(config)
    work = _measure(mining)
    lines = [
        f"{config.data}: {work.queries.texts:,} queries of {work.queries.tokens:,} tokens, "
        f"{work.documents.texts:,} documents of {work.documents.tokens:,} tokens",
        *(f"corpora.{name}: not read yet, its documents come in addition" for name in work.unread),
        "",
        _row("step", "parts", "in store", "work"),
        *_rows(mining, work),
    ]
    return "\n".join(lines)


def plan_only(config: MineConfig) -> Mining:
    """Return a mining whose plan is in memory alone."""
    mining = Mining(config)
    vars(mining)["plan"] = plan_mining(config)
    if not (mining.store("texts") / "corpora.json").is_file():
        nothing = LengthHistogram.of(np.empty(0, np.int64), 1)
        vars(mining)["corpora"] = CorpusReport(shards=(), lengths=nothing, read={}, repeated={})
    return mining


def _measure(mining: Mining) -> Work:
    manifest, known = mining.source.manifest, mining.corpora.read
    return Work(
        documents=manifest.document_lengths.plus(mining.corpora.lengths),
        queries=manifest.query_lengths,
        unread=tuple(c.name for c in mining.config.corpora if c.name not in known),
    )


def _rows(mining: Mining, work: Work) -> Iterator[str]:
    # Inside: the steps import this package's other modules.
    from pipeline.mining import STEPS

    continues = _is_current(mining)
    for step in STEPS:
        outputs = step.outputs(mining)
        # What lies in the folder of another plan's shards is removed at the start.
        kept = [p for p in outputs if continues or not p.is_relative_to(mining.building)]
        done = sum(path.exists() for path in kept)
        if outputs:
            sizes = (f"{len(outputs):,}", f"{done:,}")
            yield _row(step.name, *sizes, _describe(step.name, mining, work))


def _row(step: str, parts: str, done: str, work: str) -> str:
    return f"{step:<8} {parts:>7} {done:>8}  {work}".rstrip()


def _is_current(mining: Mining) -> bool:
    try:
        return bool(Mining(mining.config).plan == mining.plan)
    except UserError:
        return False


def _describe(step: str, mining: Mining, work: Work) -> str:
    config, documents, queries = mining.config, work.documents.texts, work.queries.texts
    embedders = [r for r in config.retrievers if not is_bm25(r)]
    teacher = config.teacher
    match step:
        case "texts":
            return f"{work.tokens:,} tokens to text"
        case "marks":
            return f"signatures of {documents:,} documents"
        case "index":
            return f"words of {documents:,} documents"
        case "embed":
            return "; ".join(
                _forward(r.name, local_folder(r.path, key="retrievers"), work.tokens)
                for r in embedders
            )
        case "search":
            total = len(config.retrievers) * queries * documents
            return f"{total:,} scores of pairs, the best {config.depth:,} of each query"
        case "pick":
            return f"at most {config.num_kept:,} candidates of each of {queries:,} queries"
        case "teach" if teacher is not None and teacher.path is not None:
            return _forward("teacher", local_folder(teacher.path, key="teacher.path"), work.tokens)
        case "score" if teacher is not None:
            return _scored(mining)
        case "write":
            return f"{queries:,} examples"
    return ""


def _forward(name: str, folder: str, tokens: int) -> str:
    """Describe one forward of all texts: two operations for each weight and token."""
    weights = num_parameters(Path(folder))
    return (
        f"{name}: {tokens:,} tokens through {weights / 1e6:,.0f} million weights, at most "
        f"{2 * weights * tokens / 1e12:,.1f} TFLOP"
    )


def _scored(mining: Mining) -> str:
    """Count the pairs of query and document that the teacher scores."""
    examples = mining.source.examples
    ids = np.arange(len(examples))
    most = int(examples.lengths("positives", ids).sum()) + len(ids) * mining.config.num_kept
    if mining.config.keep_negatives:
        most += int(examples.lengths("negatives", ids).sum())
    kind = mining.config.teacher.kind if mining.config.teacher else ""
    asked = f", in {len(ids):,} requests or more" if kind == "endpoint" else ""
    return f"at most {most:,} pairs by the {kind.replace('_', '-')}{asked}"
