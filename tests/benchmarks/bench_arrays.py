"""Seconds of encodings, minings and evaluations as predicted from a calibration, and as observed.

python -m tests.benchmarks.bench_arrays [CALIBRATION]

Calibrates this machine, unless a file is given, and embeds generated problems with MiniLM on a CPU.
All seconds are CPU seconds of forwards and searches with one thread, predicted and observed: a
plan counts what a GPU does, without reading and tokenising. Texts are counted by the tokenizer for
evaluations and minings, and estimated by bytes for encodings, as the commands do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Before torch starts its threads.
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")

from pipeline.config import EvaluateConfig, EvaluatedModel, MineConfig, OwnTask, RetrieverConfig
from pipeline.evaluation.encode import EncodeJob, encode_file
from pipeline.evaluation.run import run_element
from pipeline.exact_search import Corpus
from pipeline.measuring.calibrate import calibrate
from pipeline.mining import mine
from pipeline.model.encoder import Encoder
from pipeline.planning.arrays import ArrayPlan, plan_encoding, plan_evaluation, plan_mining
from pipeline.planning.calibration import Machine, choose_machine, save
from pipeline.planning.planned_model import PlannedModel
from pipeline.planning.text_sizes import (
    DescribedTask,
    Texts,
    count_texts,
    estimate_tokens,
    read_inputs,
)
from ReasonAug.files import write_jsonl
from tests.benchmarks.bench_mining import (
    MINILM,
    prepare_pairs,
    problems,
    random_corpus,
    random_vectors,
)

Row = tuple[str, float, float]
# Of the search, whose vectors are drawn.
DOCUMENTS, QUERIES, DEPTH = 98_304, 2048, 164


class Clock:
    """CPU seconds inside of one method, over all of its calls."""

    def __init__(self, owner: type, name: str) -> None:
        self.seconds = 0.0
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = inner(*args, **kwargs)
            self.seconds += time.process_time() - started
            return result

        setattr(owner, name, timed)

    def take(self) -> float:
        """Return the seconds since the last call."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def texts(joined: int) -> list[tuple[str, str]]:
    """Return problems and their solutions, each of several joined."""
    found = problems(16)
    groups = [found[start : start + joined] for start in range(0, len(found), joined)]
    return [
        ("\n".join(p.statement for p in group), "\n".join(p.solution for p in group))
        for group in groups
    ]


def encode(folder: Path, machine: Machine, clock: Clock, pairs: list[tuple[str, str]]) -> Row:
    path = folder / "texts.jsonl"
    write_jsonl(path, [{"text": solution} for _, solution in pairs])
    found, factor = read_inputs(str(path), field="text", role="document")
    sizes = Texts.counted(estimate_tokens(found)).times(factor)
    model = PlannedModel.read(MINILM, name="minilm", key="MODEL", precision="auto", machine=machine)
    plan = plan_encoding(model, sizes, limit=512, origin="files")
    job = EncodeJob(
        model=Path(MINILM), input=str(path), output=folder / "vectors.npy", max_length=512
    )
    encode_file(job, num_processes=1)
    return f"encode, {len(pairs):,} texts", plan.seconds, clock.take()


def mining(folder: Path, machine: Machine, clock: Clock, pairs: list[tuple[str, str]]) -> Row:
    shards = prepare_pairs(folder, [{"query": q, "positives": [d]} for q, d in pairs])
    config = mine_config(folder, shards)
    embed, _ = plan_mining(config, machine).work
    mine(config, num_workers=1)
    return f"mine, embed {len(pairs):,} pairs", embed.seconds or 0.0, clock.take()


def mine_config(folder: Path, shards: Path) -> MineConfig:
    model = RetrieverConfig(name="minilm", path=MINILM)
    return MineConfig(data=shards, output=folder / "mined", retrievers=(model,))


def search(folder: Path, machine: Machine) -> Row:
    described = DescribedTask(
        documents=DOCUMENTS, document_tokens=100, queries=QUERIES, query_tokens=10
    )
    config = mine_config(folder, folder / "none")
    _, searched = plan_mining(config, machine, described=described).work
    corpus = Corpus(random_corpus(folder / "vectors", DOCUMENTS))
    clock = Clock(Corpus, "search")
    corpus.search(random_vectors(QUERIES, seed=10**9), DEPTH)
    name = f"mine, {QUERIES:,} queries search {DOCUMENTS:,}"
    return name, searched.seconds or 0.0, clock.take()


def evaluation(
    folder: Path, machine: Machine, clock: Clock, pairs: list[tuple[str, str]]
) -> Iterator[Row]:
    task = folder / "task"
    (task / "qrels").mkdir(parents=True)
    for name, column in (("queries", 0), ("corpus", 1)):
        rows = [{"_id": str(k), "text": pair[column]} for k, pair in enumerate(pairs)]
        (task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"{k}\t{k}\t1\n" for k in range(len(pairs)))
    (task / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    config = EvaluateConfig(
        output_dir=folder / "scores",
        models=(EvaluatedModel(name="minilm", path=Path(MINILM)),),
        tasks=(OwnTask(name="own", path=task),),
        max_length=512,
        lengths={"own": (128, 512)},
    )
    plan: ArrayPlan = plan_evaluation(config, machine, counted=count_texts(config))
    for index, work in enumerate(plan.work):
        run_element(config, index)
        yield f"evaluate at {work.length} tokens", work.seconds or 0.0, clock.take()


def rows(folder: Path, machine: Machine) -> Iterator[Row]:
    """Yield what was measured, its predicted and its observed CPU seconds."""
    clock = Clock(Encoder, "forward")
    short, long = texts(1), texts(6)
    for number, work in enumerate((encode, mining)):
        for name, pairs in (("short", short), ("long", long)):
            own = folder / f"{number}-{name}"
            own.mkdir()
            what, predicted, observed = work(own, machine, clock, pairs)
            yield f"{what}, {name}", predicted, observed
    yield search(folder, machine)
    yield from evaluation(folder, machine, clock, long)


def main() -> None:
    """Calibrate, run everything, and print the table."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = Path(sys.argv[1]) if sys.argv[1:] else folder / "calibration.json"
        if not sys.argv[1:]:
            save(calibrate(1), path)
        machine = choose_machine(None, path, ranks_per_host=1)
        table = ["| work | predicted | observed | ratio |\n|---|---|---|---|"]
        for what, predicted, observed in rows(folder, machine):
            cells = (what, f"{predicted:.2f} s", f"{observed:.2f} s", f"{predicted / observed:.2f}")
            table.append(f"| {' | '.join(cells)} |")
        print("\n".join(table), flush=True)


if __name__ == "__main__":
    main()
