"""Compare with mteb: python tests/benchmarks/bench_evaluation.py [plan] [throughput] [table].

plan: wall-clock and memory of planning all three benchmarks at their real sizes. throughput: one
corpus of mixed lengths through mteb with sentence-transformers and through us, equal scores; for
whole evaluations by both sides' defaults see bench_job.py. table:
every task on replicas fetched from a local hub, a third of the blocks lost and embedded again, our
score next to mteb's direct one, and how far the stored vectors move it.
"""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

import benchmark_replicas as replicas
import full_size_hub
import torch
from bench_job import PRECISIONS, direct, run_parts, timed
from bench_support import Figure, minilm_path
from local_hub import serve
from sentence_transformers import SentenceTransformer

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.evaluation.datasets import prefetch
from pipeline.evaluation.embed import embed_element, missing_blocks
from pipeline.evaluation.embedding_plan import store_folder, write_plan
from pipeline.evaluation.models import load_encoder
from pipeline.evaluation.run import run_all, run_element, score_all
from pipeline.evaluation.tasks import element_at

ALL = ("FollowIR", "LongEmbed", "BRIGHT", "BRIGHT-long")
AOPS = "BrightAopsRetrieval"


def config_of(folder: Path, tasks: Sequence[str], **others: Any) -> EvaluateConfig:
    """MiniLM with bare texts, as mteb gives them to a sentence-transformers model."""
    model = EvaluatedModel(name="minilm", path=minilm_path())
    return EvaluateConfig(output_dir=folder / "out", models=(model,), tasks=tuple(tasks), **others)


def plan(folder: Path, scale: float) -> list[Figure]:
    """Plan all tasks on noise of the real sizes; LongEmbed at three lengths."""
    hub = full_size_hub.write_hub(folder / "hub", scale=scale)
    lengths = {"LongEmbed": (512, 4096, 32768)}
    config = config_of(
        folder, ALL, snapshots=hub, max_length=32768, max_tokens=32768, lengths=lengths
    )
    began, cpu = time.perf_counter(), sum(os.times()[:4])
    written = write_plan(config, num_workers=os.cpu_count() or 1)
    seconds, cpu = time.perf_counter() - began, sum(os.times()[:4]) - cpu
    own, others = (
        resource.getrusage(who).ru_maxrss / 2**20
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    texts = f"{written.num_texts:,} distinct texts of {written.num_occurrences:,}"
    saved = written.occurrence_cost / sum(written.block_costs)
    return [
        Figure(name=f"{texts}: wall-clock", asked="< 60 s", measured=f"{seconds:.0f} s",
               ok=seconds < 60),
        Figure(name="... CPU time of all processes", measured=f"{cpu:.0f} s"),
        Figure(name="... memory of the planner, of its largest worker",
               measured=f"{own:.1f}, {others:.1f} GiB"),
        Figure(name="work with repetitions / work embedded", measured=f"{saved:.2f}"),
    ]  # fmt: skip


def mixed_corpus(root: Path, num_topics: int) -> None:
    """BRIGHT's Aops replica with documents of 5 to 500 words."""
    generator = random.Random(0)
    words = " ".join(replicas.TOPICS.values()).split()
    short = replicas.TOPICS
    replicas.TOPICS = {
        f"{topic} {number}": " ".join(
            [text, *generator.choices(words, k=int(generator.lognormvariate(4, 1)))]
        )
        for number in range(num_topics)
        for topic, text in short.items()
    }
    replicas.write_bright(root, "mteb/BRIGHT")
    replicas.TOPICS = short


def throughput(folder: Path, scale: float) -> list[Figure]:
    """Whole evaluation of one task, from its files to its score, in CPU time of one thread."""
    mixed_corpus(folder / "hub", max(1, round(16 * scale)))
    config = config_of(
        folder, (AOPS,), snapshots=folder / "hub", max_length=256, instructions={AOPS: ""}
    )
    reference = SentenceTransformer(str(minilm_path()), device="cpu")
    reference.max_seq_length = config.max_length
    (model,) = config.models
    wanted, slow = timed(lambda: direct(reference, AOPS, config.snapshots))
    figures = []
    for precision in PRECISIONS:
        exact = precision == "float32"
        models = (dataclasses.replace(model, precision=precision),)
        tree = dataclasses.replace(config, models=models)
        load_encoder(tree, element_at(tree, 0))  # before, as `reference`
        result, fast = timed(lambda tree=tree: run_element(tree, 0))
        score = float(result["score"])
        gap, ratio = abs(wanted - score), slow.cpu / fast.cpu
        figures += [
            Figure(name=f"{precision}: difference of the scores", gate=exact,
                   asked="<= 1e-5" if exact else "", measured=f"{gap:.1e}",
                   ok=gap <= 1e-5 if exact else None),
            Figure(name=f"{precision}: CPU time, mteb + sentence-transformers / ours",
                   asked=">= 3", measured=f"{ratio:.2f} ({slow.cpu:.1f} s / {fast.cpu:.1f} s)",
                   ok=ratio >= 3),
        ]  # fmt: skip
    return figures


def table(folder: Path, scale: float) -> list[Figure]:
    """Prefetch, plan, embed, lose a third of the blocks, embed them again, score; then mteb."""
    tasks = [*ALL, "BRIGHT-v1", "BRIGHT-v1-long"] if scale == 1 else [AOPS, "LEMBNeedleRetrieval"]
    replicas.write_all(folder / "hub")
    config = config_of(folder, tasks, snapshots=folder / "snapshots", max_length=64)
    with serve(folder / "hub") as (address, _):
        prefetch(config, endpoint=address)
    write = write_plan(config)
    store = store_folder(config, config.models[0])
    embed_element(config, 0, 1, load=load_encoder)
    blocks = range(len(write.block_costs))
    for block in random.Random(0).sample(blocks, max(1, round(0.3 * len(blocks)))):
        write.vectors_path(store, block).unlink()
    assert missing_blocks(config, config.models[0], write)
    for index in range(3):
        embed_element(config, index, 3, load=load_encoder)
    reference = SentenceTransformer(str(minilm_path()), device="cpu")
    reference.max_seq_length = config.max_length
    figures, rounding = [], 0.0
    alone = dataclasses.replace(config, output_dir=folder / "alone")
    for stored, result in zip(score_all(config), run_all(alone), strict=True):
        wanted = direct(reference, result["task"], config.snapshots)
        rounding = max(rounding, abs(stored["score"] - result["score"]))
        figures.append(
            Figure(
                name=f"{result['task']} {result['metric']}: ours",
                asked=f"mteb {wanted:.5f}",
                measured=f"{result['score']:.5f}",
                ok=abs(wanted - result["score"]) <= 2e-5,
                gate=True,
            )
        )
    # Vectors are stored in float16: two documents that nearly tie may change places.
    figures.append(
        Figure(name="... largest difference of one from stored vectors", asked="<= 0.01",
               measured=f"{rounding:.5f}", ok=rounding <= 0.01, gate=True)
    )  # fmt: skip
    return figures


PARTS = {"plan": plan, "throughput": throughput, "table": table}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_parts(PARTS, description=__doc__, scale=1.0)
