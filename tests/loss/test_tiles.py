"""The plan of the loss keeps its promises, and its bytes are those a real loss takes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import comm
from pipeline.config import DistillationConfig, GuideConfig, LossConfig
from pipeline.loss.contrastive import contrastive_loss
from pipeline.loss.targets import RaggedIndex, Targets
from pipeline.loss.tiles import TeacherTerms, loss_cost, plan_tiles
from tests.support import run_ranks


@given(
    num_queries=st.integers(0, 10**7),
    num_rank_documents=st.integers(0, 10**7),
    score_bytes=st.integers(64, 2**34),
    symmetric=st.booleans(),
    teacher_slots=st.sampled_from([0, 1, 3]),
)
def test_scores_stay_within_their_budget(
    num_queries: int,
    num_rank_documents: int,
    score_bytes: int,
    symmetric: bool,
    teacher_slots: int,
) -> None:
    plan = plan_tiles(
        num_queries=num_queries,
        num_rank_documents=num_rank_documents,
        score_bytes=score_bytes,
        symmetric=symmetric,
        teacher_slots=teacher_slots,
    )
    assert plan.teacher_slots == teacher_slots
    assert plan.rows >= 1 and plan.columns >= 1
    assert plan.score_bytes <= score_bytes
    assert not (plan.keep_scores and symmetric)
    if plan.keep_scores:
        assert plan.num_slots * plan.columns >= num_rank_documents


def test_a_million_queries_fit_on_8_and_on_128_ranks() -> None:
    for world_size, gigabytes in ((8, 14), (128, 2)):
        cost = loss_cost(
            num_queries=2**20,
            num_documents=2**21,
            width=3584,
            world_size=world_size,
            score_bytes=512 * 2**20,
        )
        assert cost.tiles.keep_scores
        assert cost.num_blocks * cost.tiles.rows >= 2**20
        assert cost.score_bytes <= 512 * 2**20
        assert cost.peak_bytes < gigabytes * 2**30
        # Every foreign query comes once, and the gradient of every own one comes from each other
        # rank, summed on the way: nothing else grows.
        foreign = 2**20 - 2**20 // world_size
        assert cost.received_bytes == 2 * foreign * 3584 * 4
        # Scores, and from them the gradient of either side.
        assert cost.matmul_flops == 3 * 2 * 2**20 * (2**21 // world_size) * 3584


TAUGHT = LossConfig(
    guide=GuideConfig(), distillation=DistillationConfig(documents="batch", temperature=0.05)
)
TEACHER_WIDTH = 128


def measured_peaks(*sizes: int) -> list[int]:
    """The peaks of a loss without a teacher and of one with all of its terms."""
    return [measured_peak(config, *sizes) for config in (LossConfig(), TAUGHT)]


def measured_peak(
    config: LossConfig, num_queries: int, num_documents: int, width: int, score_bytes: int
) -> int:
    """Most bytes that the loss held on this rank, without its arguments, by PyTorch's account."""
    world_size, rank = comm.world_size(), comm.rank()
    queries = torch.arange(rank, num_queries, world_size)
    documents = torch.arange(rank, num_documents, world_size)
    none = RaggedIndex(
        offsets=torch.zeros(num_queries + 1, dtype=torch.int64), values=torch.arange(0)
    )
    targets = Targets(
        num_queries=num_queries,
        num_documents=num_documents,
        query_index=queries,
        document_index=documents,
        positives=RaggedIndex(
            offsets=torch.arange(num_queries + 1), values=torch.arange(num_queries)
        ),
        negatives=none,
        masked=none,
        teacher_query=torch.randn(len(queries), TEACHER_WIDTH),
        teacher_document=torch.randn(len(documents), TEACHER_WIDTH),
    )
    rows = torch.randn(len(queries), width), torch.randn(len(documents), width)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        contrastive_loss(*rows, targets, config=config, score_bytes=score_bytes)
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


def test_planned_bytes_are_those_of_a_scaled_down_loss() -> None:
    # Documents by far the most, so that no part of the sum is small.
    shape = {"num_queries": 1024, "num_documents": 16384, "width": 192}
    terms = [TeacherTerms.of(config, width=TEACHER_WIDTH) for config in (LossConfig(), TAUGHT)]
    costs = [
        loss_cost(**shape, world_size=2, score_bytes=4 * 2**20, device="cpu", teacher=teacher)
        for teacher in terms
    ]
    # The vectors are counted as they arrive as well, which are arguments here.
    arguments = (1024 + 16384) // 2 * TEACHER_WIDTH * 4
    planned = [costs[0].peak_bytes, costs[1].peak_bytes - arguments]
    for peaks in run_ranks(2, measured_peaks, *shape.values(), 4 * 2**20):
        for peak, expected in zip(peaks, planned, strict=True):
            assert 0.85 * expected < peak < 1.1 * expected
