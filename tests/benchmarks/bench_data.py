"""Ratios of the data room against its baselines: python tests/benchmarks/bench_data.py.

Times depend on the machine; ratios are taken within one run, interleaved, best of three.
"""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.config import PrepareConfig, SourceConfig
from pipeline.data.batch import Ragged, assign_by_cost, text_cost
from pipeline.data.manifest import ShardInfo
from pipeline.data.order import Group, Order
from pipeline.data.prepare import prepare
from pipeline.data.prepare.build import Build, TokeniseSummary, make_plan
from pipeline.data.prepare.clean import collect_block, dedup_slice, hashes_to_arrow, store_corpus
from pipeline.data.prepare.tokenise import make_catalogue, tokenise_slice
from pipeline.data.shards import DOCUMENT_SCHEMA, Table, ragged_array, write_table
from pipeline.workers import LocalWorkers

REPEATS = 3


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best(*works: Callable[[], Any]) -> list[float]:
    """Best time of each, interleaved so that all meet the same disturbances."""
    times = [[seconds(work) for work in works] for _ in range(REPEATS)]
    return [min(column) for column in zip(*times, strict=True)]


def row(name: str, value: str, target: str) -> None:
    """One line of the table."""
    print(f"| {name} | {value} | {target} |", flush=True)


def bench_random_reads(folder: Path) -> None:
    """Random documents from our shards and from `datasets`, the same rows in the same order."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 0.8, 20_000), 1, 4096).astype(np.int64)
    values = rng.integers(0, 50_000, int(lengths.sum()), dtype=np.int32)
    tokens = Ragged.from_lengths(lengths, values)
    hashes = np.array([f"{k:016d}" for k in range(len(lengths))], dtype="S16")
    path = folder / "documents-00000.arrow"
    none = pa.array(np.zeros(len(lengths), np.int32))
    columns = [ragged_array(tokens, pa.int32()), hashes_to_arrow(hashes), none]
    write_table(path, pa.table(columns, schema=DOCUMENT_SCHEMA))
    info = ShardInfo(file=path.name, rows=len(lengths), bytes=path.stat().st_size, sha256="")
    ours = Table(folder, [info], DOCUMENT_SCHEMA)
    theirs = datasets.Dataset.from_dict({"tokens": list(tokens)}).with_format("numpy")
    ids = rng.permutation(len(lengths))
    few = ids[:2000].tolist()
    read = ours.ragged("tokens", ids)  # warm
    assert np.array_equal(read[7], theirs[int(ids[7])]["tokens"])
    mine, item, take = best(
        lambda: ours.ragged("tokens", ids),
        lambda: [theirs[k] for k in few],
        lambda: [theirs[ids[k : k + 256]] for k in range(0, 2048, 256)],
    )
    rate = len(ids) / mine
    row("random documents/s, warm", f"{rate:,.0f}", ">= 400,000")
    row("... against datasets[i]", f"{rate * item / len(few):.1f}x", ">= 10x")
    row("... against datasets[256 rows]", f"{rate * take / 2048:.1f}x", "")


def bench_start() -> None:
    """Order of a far step over ten million rows, from nothing."""
    groups = [
        Group(source=f"s{k % 4}", instruction=str(k), start=k * 100_000, count=100_000)
        for k in range(100)
    ]
    shares = {f"s{k}": 0.25 for k in range(4)}

    def start(step: int, mode: Any) -> None:
        order = Order(groups, global_batch_size=4096, homogeneous=mode, seed=0, shares=shares)
        order.batch(step)

    for mode in ("instruction", "none"):
        near, far = best(
            functools.partial(start, 0, mode), functools.partial(start, 1_000_000, mode)
        )
        row(
            f"start at step 1,000,000 of 10M rows ({mode})",
            f"{far * 1000:.1f} ms, {far / near:.2f}x step 0",
            "<= 50 ms",
        )


def bench_balance() -> None:
    """Heaviest rank against the mean, longest-processing-time and at random."""
    for world_size in (8, 64, 256, 1024):
        rng = np.random.default_rng(world_size)
        lengths = np.clip(rng.lognormal(6, 1, 64 * world_size), 1, 4096).astype(np.int64)
        cost = text_cost(lengths)

        def imbalance(ranks: Any, cost: Any = cost, world_size: int = world_size) -> float:
            loads = np.bincount(ranks, weights=cost, minlength=world_size)
            return float(loads.max() / loads.mean())

        ours = imbalance(assign_by_cost(cost, world_size))
        chance = imbalance(np.arange(len(cost)) % world_size)
        row(
            f"imbalance, {world_size} ranks x 64 documents",
            f"{ours:.4f} (unsorted {chance:.2f})",
            "<= 1.01",
        )


def make_corpus(folder: Path, count: int) -> tuple[Path, Path]:
    """A JSON-lines source of `count` rows and a BPE tokenizer of its words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    source = folder / f"rows{count}.jsonl"
    with source.open("w") as handle:
        for number in range(count):
            texts = [" ".join(rng.choices(words, k=rng.randint(50, 350))) for _ in range(2)]
            record = {"query": f"question {number}", "positives": texts[:1], "negatives": texts[1:]}
            handle.write(json.dumps(record) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=4000, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "tokenizer")
    return source, folder / "tokenizer"


def make_config(folder: Path, source: Path, tokenizer: Path, name: str) -> PrepareConfig:
    """A dataset of one source."""
    return PrepareConfig(
        output_dir=folder / name,
        tokenizer=str(tokenizer),
        sources=(SourceConfig(name="s", format="columns", path=str(source)),),
        max_document_length=512,
        block_bytes=4 * 2**20,
        # One shard is held while it is packed: small ones show what grows with the documents.
        shard_bytes=8 * 2**20,
    )


def bench_tokenise(folder: Path) -> None:
    """The tokenising step against `datasets.map`, and shared by two processes."""
    source, tokenizer_path = make_corpus(folder, 10_000)
    build = Build(make_config(folder, source, tokenizer_path, "d"), folder / "build")
    make_plan(build)
    store_corpus(build, 0)
    for block in range(len(build.plan.blocks)):
        collect_block(build, block)
    slices = range(build.plan.num_slices)
    for number in slices:
        dedup_slice(build, number)
    make_catalogue(build, 0)
    records = [json.loads(line) for line in source.read_text().splitlines()]
    texts = [text for record in records for text in record["positives"] + record["negatives"]]
    table = datasets.Dataset.from_dict({"text": texts})
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)

    def theirs() -> None:
        table.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=512),
            batched=True,
            remove_columns=["text"],
            load_from_cache_file=False,
        )

    datasets.disable_progress_bars()
    ours, mapped = best(lambda: [tokenise_slice(build, number) for number in slices], theirs)
    tokens = sum(build.read_summary(TokeniseSummary, number).tokens for number in slices)
    row("tokenising, tokens/s per core", f"{tokens / ours:,.0f}", "")
    row("... against datasets.map", f"{mapped / ours:.2f}x", ">= 1x")

    workers = LocalWorkers(2)
    work = functools.partial(tokenise_slice, build)
    outputs = [folder / "none"] * len(slices)
    workers.run(work, outputs, claims=folder)  # starts the two processes
    alone, both = best(
        lambda: [tokenise_slice(build, number) for number in slices],
        lambda: workers.run(work, outputs, claims=folder),
    )
    workers.close()
    row("... two processes, speed-up / 2", f"{alone / both / 2:.2f}", ">= 0.9 on idle cores")


def bench_memory(folder: Path) -> None:
    """Peak memory of a whole preparation in a separate process, at two sizes."""
    points = []
    for count in (5_000, 40_000):
        source, tokenizer = make_corpus(folder, count)
        done = subprocess.run(
            [sys.executable, __file__, "prepare", str(folder), str(source), str(tokenizer)],
            capture_output=True,
            text=True,
            check=True,
        )
        points.append((2 * count, int(done.stdout)))
    (few, small), (many, large) = points
    slope = (large - small) * 1024 / (many - few)
    projected = large / 2**20 + slope * (10**7 - many) / 2**30
    peaks = f"{small / 1024:.0f} / {large / 1024:.0f} MB"
    row(f"peak memory, {few:,} / {many:,} documents", peaks, "")
    row("... bytes per further document", f"{slope:.0f}", "")
    row("... projected to 10M documents", f"{projected:.2f} GB", "< 2 GB per rank")


def main() -> None:
    """All benchmarks, as a Markdown table."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print("| what | measured | target |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_random_reads(folder)
        bench_start()
        bench_balance()
        bench_tokenise(folder)
        bench_memory(folder)


def prepare_alone(folder: str, source: str, tokenizer: str) -> None:
    """Prepare in this process and print its peak memory in kilobytes."""
    name = f"memory-{Path(source).stem}"
    prepare(make_config(Path(folder), Path(source), Path(tokenizer), name), num_workers=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    if sys.argv[1:2] == ["prepare"]:
        prepare_alone(*sys.argv[2:])
    else:
        main()
