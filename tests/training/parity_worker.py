"""One rank of the gradient matrix: the real engine against plain autograd in one process.

Started by test_gradients.py through a launcher; prints one JSON line per case on rank 0.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline import comm
from pipeline.config import (
    ChunkConfig,
    DataConfig,
    DistillationConfig,
    GuideConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    ProjectionConfig,
    TrainConfig,
)
from pipeline.data.batch import Chunk, GlobalBatch, Ragged
from pipeline.launch import discover_world
from pipeline.model.encoder import build_encoder, compile_layers
from pipeline.training.contrastive_step import Projection, accumulate_gradients
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import build_optimizer, seed_random
from pipeline.training.zero import ZeroEngine
from tests import forks
from tests.benchmarks.bench_support import PlainEngine
from tests.support import PATIENCE, rank_environments
from tests.training.exactness import gradient_errors, wake_adapters

TEMPERATURE = 0.1
DISTILLATION = DistillationConfig(weight=0.3, temperature=0.5)
# By stored vectors: a guide, and distillation over all documents of the batch.
GUIDE = GuideConfig(margin=0.1)
TAUGHT = DistillationConfig(weight=0.3, temperature=0.2, documents="batch")
# And a projection to them.
PROJECTION = ProjectionConfig(weight=0.7)
TEACHER_WIDTH = 5
DROPOUT = 0.1
NUM_QUERIES, NUM_DOCUMENTS = 12, 22
SEED, STEP = 7, 3
BACKEND = "aot_eager"  # makes no code of the graphs, which takes a minute


def make_batch(
    rank: int, world_size: int, counts: list[int], *, longest: int | None = None
) -> GlobalBatch:
    """Texts of 3 to 14 random tokens dealt to ranks; rank r cuts its own into counts[r] chunks.

    With `longest`, the last document has that many tokens.

    Ranks with fewer chunks than others get dummies, as the loader gives them.
    """
    rng = np.random.default_rng(0)
    total = NUM_QUERIES + NUM_DOCUMENTS
    texts = [rng.integers(2, 500, size=rng.integers(3, 15)) for _ in range(total)]
    if longest is not None:
        texts[-1] = rng.integers(2, 500, size=longest)
    mine = rng.permutation(total)[rank::world_size]
    teacher = rng.standard_normal((total, TEACHER_WIDTH)).astype(np.float32)
    chunks = []
    for part in np.array_split(mine, counts[rank]):
        chunks.append(
            Chunk(
                input_ids=np.concatenate([texts[i] for i in part]).astype(np.int64),
                lengths=np.array([len(texts[i]) for i in part], dtype=np.int64),
                texts=part.astype(np.int64),
                # Queries start with an instruction of two tokens.
                instruction_tokens=np.where(part < NUM_QUERIES, 2, 0).astype(np.int64),
                teacher=teacher[part],
            )
        )
    dummy = Chunk(
        input_ids=np.zeros(1, np.int64),
        lengths=np.ones(1, np.int64),
        texts=-np.ones(1, np.int64),
        teacher=np.zeros((1, TEACHER_WIDTH), np.float32),
    )
    chunks += [dummy] * (max(counts) - counts[rank])
    # Query i: positive i; own hard negative 12 + i for the first ten; every third hides one more.
    negatives = [[NUM_QUERIES + i] if i < 10 else [] for i in range(NUM_QUERIES)]
    masked = [[(i + 1) % NUM_QUERIES] if i % 3 == 0 else [] for i in range(NUM_QUERIES)]
    own = _ragged(negatives)
    return GlobalBatch(
        step=STEP,
        num_queries=NUM_QUERIES,
        num_documents=NUM_DOCUMENTS,
        chunks=tuple(chunks),
        positives=_ragged([[i] for i in range(NUM_QUERIES)]),
        negatives=own,
        masked=_ragged(masked),
        example_ids=np.arange(NUM_QUERIES),
        tokens=sum(map(len, texts)),
        positive_scores=_ragged([[float(i % 5)] for i in range(NUM_QUERIES)], np.float32),
        negative_scores=dataclasses.replace(own, values=(own.values % 3).astype(np.float32)),
    )


def _ragged(rows: list[list[Any]], kind: Any = np.int64) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Ragged(offsets=offsets, values=np.array([v for row in rows for v in row], dtype=kind))


def divergence(scores: torch.Tensor, batch: GlobalBatch) -> torch.Tensor:
    """KL(teacher || model) over each query's positive and own negatives, mean over queries."""
    assert batch.positive_scores is not None and batch.negative_scores is not None
    total = torch.zeros(())
    for query in range(NUM_QUERIES):
        listed = [*batch.positives[query], *batch.negatives[query]]
        teacher = [*batch.positive_scores[query], *batch.negative_scores[query]]
        wanted = (torch.tensor(teacher) / DISTILLATION.temperature).softmax(0)
        total = total + F.kl_div(scores[query, listed].log_softmax(0), wanted, reduction="sum")
    return total / NUM_QUERIES


def teacher_rows(batches: list[GlobalBatch]) -> torch.Tensor:
    """Unit vectors of all queries, then documents, from the ranks' chunks."""
    rows = torch.zeros(NUM_QUERIES + NUM_DOCUMENTS, TEACHER_WIDTH)
    for chunk in (chunk for batch in batches for chunk in batch.chunks if not chunk.is_dummy):
        assert chunk.teacher is not None
        rows[torch.from_numpy(chunk.texts)] = torch.from_numpy(chunk.teacher)
    return F.normalize(rows, dim=1)


def reference_gradients(
    encoder: torch.nn.Module,
    batches: list[GlobalBatch],
    *,
    distilled: bool = False,
    taught: bool = False,
    matrix: torch.Tensor | None = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by one autograd graph over all ranks' chunks; no caching, no engine."""
    embeddings: list[torch.Tensor] = [torch.empty(0)] * (NUM_QUERIES + NUM_DOCUMENTS)
    for rank, batch in enumerate(batches):
        for number, chunk in enumerate(batch.chunks):
            seed_random(SEED, STEP, rank, number)
            columns = (chunk.input_ids, chunk.lengths, chunk.instruction_tokens)
            rows = encoder(*(None if x is None else torch.from_numpy(x) for x in columns))
            for text, row in zip(chunk.texts, rows, strict=True):
                if text >= 0:
                    embeddings[text] = row
    scores = torch.stack(embeddings[:NUM_QUERIES]) @ torch.stack(embeddings[NUM_QUERIES:]).T
    scores = scores / TEMPERATURE
    teaching, unmasked = divergence(scores, batches[0]), scores.clone()
    for query in range(0, NUM_QUERIES, 3):
        scores[query, (query + 1) % NUM_QUERIES] = -torch.inf
    if taught:
        teacher = teacher_rows(batches)
        cosines = teacher[:NUM_QUERIES] @ teacher[NUM_QUERIES:].T
        wanted = (cosines / TAUGHT.temperature).softmax(1)
        teaching = F.kl_div(unmasked.log_softmax(1), wanted, reduction="batchmean")
        beyond = cosines > cosines.diagonal()[:, None] - GUIDE.margin
        beyond.fill_diagonal_(False)
        scores = scores.masked_fill(beyond, -torch.inf)
    loss = F.cross_entropy(scores, torch.arange(NUM_QUERIES))
    if distilled or taught:
        loss = (1 - DISTILLATION.weight) * loss + DISTILLATION.weight * teaching
    if matrix is not None:
        distance = 1 - F.cosine_similarity(torch.stack(embeddings) @ matrix, teacher_rows(batches))
        loss = loss + PROJECTION.weight * distance.mean()
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None
    }


def run_case(
    model_path: str,
    *,
    schedule: str,
    keep_graphs: int,
    stage: int,
    counts: list[int],
    lora: bool,
    longest: int | None = None,
    compiled: bool = False,
    causal: bool,
    pool_instruction: bool,
    distilled: bool,
    taught: bool,
    only_graphs: bool = False,
) -> dict[str, float]:
    """Return the worst relative error over all parameters, and both losses.

    With `only_graphs`, find the graphs of compiled layers in this process, without an engine.
    """
    model = ModelConfig(
        path=model_path,
        dtype="float32",
        attention="causal" if causal else "bidirectional",
        pooling="last_token" if causal else "mean",
        pool_instruction=pool_instruction,
        attention_dropout=DROPOUT if longest is None else 0.0,
        gradient_checkpointing=causal and schedule != "sweep",
        lora=LoraConfig(rank=4, alpha=8, dropout=DROPOUT) if lora else None,
    )
    config = TrainConfig(
        output_dir=Path("unused"),
        seed=SEED,
        schedule=schedule,
        chunks=ChunkConfig(keep_graphs=keep_graphs),
        num_steps=1,
        model=model,
        data=DataConfig(path=Path("unused")),
        loss=LossConfig(
            temperature=TEMPERATURE,
            guide=GUIDE if taught else None,
            distillation=TAUGHT if taught else DISTILLATION if distilled else None,
            projection=PROJECTION if taught or distilled else None,
        ),
    )
    world_size, rank = comm.world_size(), comm.rank()
    encoders = []
    for _ in range(2):
        torch.manual_seed(0)
        encoder = build_encoder(model)
        wake_adapters(encoder)
        encoders.append(encoder)
    encoders[0].train()  # the other one is for its engine to bring into this mode
    batches = [make_batch(r, world_size, counts, longest=longest) for r in range(world_size)]
    projection = None
    if config.loss.projection is not None:
        projection = Projection(
            config,
            width=encoders[0].num_dimensions,
            teacher_width=TEACHER_WIDTH,
            device=torch.device("cpu"),
        )
    matrix = None if projection is None else projection.weight.detach().clone().requires_grad_()
    loss, wanted = reference_gradients(
        encoders[0], batches, distilled=distilled, taught=taught, matrix=matrix
    )
    if only_graphs:
        compile_layers(encoders[1].train(), backend=BACKEND)
        plain: Any = PlainEngine(encoders[1])
        weight = None if projection is None else projection.weight
        accumulate_gradients(
            plain, batches[0], config, device=torch.device("cpu"), projection=weight
        )
        return {}
    # DeepSpeed keeps small parameters whole by default, which would hide ZeRO-3's faults.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    ds_config = resolve_ds_config({"zero_optimization": zero}, config, world_size=world_size)
    engine = ZeroEngine(encoders[1], build_optimizer(encoders[1], config.optimizer), ds_config)
    if compiled:
        compile_layers(engine.encoder, backend=BACKEND)
    output = accumulate_gradients(
        engine,
        batches[rank],
        config,
        device=torch.device("cpu"),
        projection=None if projection is None else projection.weight,
    )
    errors = gradient_errors(engine, wanted)
    if matrix is not None:
        assert matrix.grad is not None and output.projection_grad is not None
        difference = (output.projection_grad - matrix.grad).abs().max()
        errors["projection"] = float(difference / matrix.grad.abs().max())
    engine.step(1e-4)
    engine.close()
    return {"error": max(errors.values()), "loss": float(output.loss), "reference_loss": loss}


def list_cases(world_size: int) -> dict[str, dict[str, Any]]:
    """Return the arguments of `run_case` by the name of each case on so many ranks."""
    # (schedule, chunks that keep their graph, chunks per rank); dropout is always on.
    layouts = [("cache", 0, counts) for counts in ([1, 1], [2, 2], [5, 5], [8, 8], [3, 5])]
    layouts += [("cache", 2, [3, 5]), ("plain", 0, [3, 5]), ("sweep", 0, [3, 5])]
    if world_size == 3:  # does not divide the parameters, and adds in another order
        layouts = [("sweep", 0, counts) for counts in ([3, 5, 4], [2, 2, 1])]
    # Each combination of stage, layout and adapter once, on one rank or on two; either number of
    # ranks has all pairs of them.
    cases = [
        {
            "schedule": schedule,
            "keep_graphs": keep_graphs,
            "stage": stage,
            "counts": counts[:world_size],
            "lora": (stage + number + world_size) % 2 == 0,
        }
        for stage, (number, (schedule, keep_graphs, counts)) in itertools.product(
            (1, 2, 3), enumerate(layouts)
        )
    ]
    if world_size == 1:
        # One long document among short ones, in every schedule; several seconds at 4,096, so once.
        long = {"keep_graphs": 0, "stage": 3, "counts": [3], "lora": False}
        cases += [
            {"schedule": schedule, "longest": longest, **long}
            for schedule, longest in (("cache", 4096), ("plain", 2048), ("sweep", 2048))
        ]
    if world_size == 2:
        compiled = {"counts": [3, 5], "compiled": True}
        cases += [
            {"schedule": "cache", "keep_graphs": 0, "stage": 2, "lora": False, **compiled},
            {"schedule": "cache", "keep_graphs": 2, "stage": 1, "lora": True, **compiled},
            {"schedule": "sweep", "keep_graphs": 0, "stage": 3, "lora": True, **compiled},
            {"schedule": "sweep", "keep_graphs": 0, "stage": 3, "lora": False, **compiled},
        ]
    return {_name(**case): case for case in cases}


def _name(
    *,
    schedule: str,
    keep_graphs: int,
    stage: int,
    counts: list[int],
    lora: bool,
    longest: int | None = None,
    compiled: bool = False,
) -> str:
    words = [f"zero{stage}", schedule, f"{'+'.join(map(str, counts))} chunks"]
    words += [f"{keep_graphs} kept"] * (keep_graphs > 0) + ["lora"] * lora
    words += ["compiled"] * compiled
    return ", ".join(words + [f"{longest} tokens"] * (longest is not None))


def run_cases(model_path: str, *, compiled: bool) -> None:
    """Be a rank: run all cases with compiled layers, or all others."""
    comm.start(discover_world(), timeout_seconds=PATIENCE)
    for name, case in list_cases(comm.world_size()).items():
        if case.get("compiled", False) == compiled:
            result = run_case(model_path, **_with_model(case))
            if comm.rank() == 0:
                print(json.dumps({"case": name, **result}), flush=True)
    comm.leave(0, gracefully=True)


def _with_model(case: dict[str, Any]) -> dict[str, Any]:
    """Add what the model and the loss of a case are."""
    return {
        **case,
        # Causal attention, last-token pooling and activation checkpointing ride on the LoRA cases.
        "causal": case["lora"] and case["counts"][0] in (2, 3),
        # Every schedule once without the instruction's tokens.
        "pool_instruction": case["lora"] or case["counts"][0] != 3,
        # A teacher joins where graphs are kept, with a projection to its vectors.
        "distilled": case["keep_graphs"] > 0,
        # And its vectors in sweeps, which every stage and number of ranks has.
        "taught": case["schedule"] == "sweep",
    }


def fork_compiled_ranks(model_path: str, world_size: int) -> None:
    """Find all graphs once, which takes most of the time, and fork ranks that have them."""
    for case in list_cases(world_size).values():
        if case.get("compiled", False):
            run_case(model_path, only_graphs=True, **_with_model(case))

    def be_rank(environment: dict[str, str]) -> None:
        os.environ.update(environment)
        run_cases(model_path, compiled=True)

    with TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            forks.Child(
                functools.partial(be_rank, environment),
                folder=Path.cwd(),
                stdout=folder / f"{rank}.out",
                stderr=folder / f"{rank}.err",
            )
            for rank, environment in enumerate(rank_environments(world_size))
        ]
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(0.02)
        for rank in ranks:
            rank.kill()
        print(*(text for rank in ranks for text in rank.read()), sep="\n", flush=True)
    sys.exit(any(codes))


def main() -> None:
    torch.set_num_threads(1)
    model_path, *compiled = sys.argv[1:]
    if compiled:
        fork_compiled_ranks(model_path, int(compiled[0]))
    run_cases(model_path, compiled=False)


if __name__ == "__main__":
    main()
