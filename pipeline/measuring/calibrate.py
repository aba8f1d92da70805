"""Measure the constants of a calibration on this machine: `diffembed plan calibrate`.

    calibrate            starts one rank, then all, as processes of this module
    measure_constants    the constants of one such number of ranks, all at work together
        layers.py            layers and their parts
        DeepSpeed's engine on many small and on few large weights    a tensor, a number
        the loss of a small and of a large batch                     a call, a FLOP
        the search of a mining in a small and in a large corpus      a query, a FLOP

Two sizes give the two numbers of a line. Of several ranks the slowest counts, because it is the one
that the others wait for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import comm
from pipeline.config import DataConfig, LossConfig, ModelConfig, TrainConfig
from pipeline.errors import DiffembedError, errors_end_the_process, several
from pipeline.exact_search import TILE, Corpus, VectorFile
from pipeline.files import read_record, save_vectors, write_json
from pipeline.launch import discover_world, run_ranks, share_cores
from pipeline.loss.contrastive import contrastive_loss
from pipeline.loss.targets import RaggedIndex, Targets
from pipeline.loss.tiles import loss_cost
from pipeline.measuring.layers import (
    ROW,
    Sizes,
    Timer,
    line_through,
    measure_dtype,
    reference,
)
from pipeline.planning.calibration import (
    VERSION,
    Calibration,
    Constants,
    EngineSpeed,
    Line,
)
from pipeline.planning.measured import num_tensors
from pipeline.planning.shape import ModelShape
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import build_optimizer
from pipeline.training.zero import ZeroEngine, placement_of

# Documents of a search: the 100 of a mining's default window, and its margin of 64.
_DEPTH = 164
# The smallest width of a grid is the rank of an adapter.
SIZES = {
    "cpu": Sizes(
        dtypes=("float32",),  # others take a CPU minutes
        tokens=(16, 128, 1024),
        widths=(16, 128, 512, 2048),
        lengths=(8, 32, 128, 512),
        head_widths=(32, 128),
        width=256,
        chunks=(32, 1024),
        engine=((8, 32, 64), (2, 512, 4096)),
        loss=((16, 128), (128, 512)),
        search=(512, 256, (2, 10)),
        bytes=32 * 2**20,
        seconds=0.02,
        model_seconds=1.0,
    ),
    "cuda": Sizes(
        dtypes=("bfloat16", "float32"),
        tokens=(512, 4096, 32768),
        widths=(16, 256, 1024, 4096, 8192),
        lengths=(64, 512, 4096, 16384),
        head_widths=(64, 128),
        width=2048,
        chunks=(64, 8192),
        engine=((8, 64, 64), (2, 2048, 32768)),
        loss=((64, 1024), (4096, 4096)),
        search=(2048, 1024, (4, 16)),
        bytes=512 * 2**20,
        seconds=0.04,
        model_seconds=0.4,
    ),
}


# --- ranks together --------------------------------------------------------------------------


def measure_engine(stage: int, timer: Timer, sizes: Sizes) -> EngineSpeed:
    """Measure gather, reduction and update of DeepSpeed; a collective call."""
    found = [_engine_times(stage, timer, *size) for size in sizes.engine]
    lines = {}
    # All ranks gather and reduce every number; each updates only its share.
    for part, numbers in (("gather", 1), ("reduce", 1), ("update", comm.world_size())):
        (few, small), (many, large) = ((shape, times[part]) for shape, times in found)
        lines[part] = _by_tensor_and_number(
            (num_tensors(few, trained=True), few.parameters / numbers, small),
            (num_tensors(many, trained=True), many.parameters / numbers, large),
        )
    return EngineSpeed(**lines)


def _by_tensor_and_number(small: tuple[int, float, float], large: tuple[int, float, float]) -> Line:
    """Solve tensors a + numbers b = seconds for two models; neither is below zero.

    Args:
        small: tensors, numbers and seconds of the model with many small weights.
        large: the same of the model with few large weights.
    """
    (n1, p1, t1), (n2, p2, t2) = small, large
    # By Cramer's rule. Where noise makes one below zero, the other takes all of the seconds.
    determinant = n1 * p2 - n2 * p1
    fixed, each = (t1 * p2 - t2 * p1) / determinant, (n1 * t2 - n2 * t1) / determinant
    if fixed < 0 or each < 0:
        return Line(fixed=0.0, each=t2 / p2) if fixed < 0 else Line(fixed=t1 / n1, each=0.0)
    return Line(fixed=fixed, each=each)


def _engine_times(
    stage: int, timer: Timer, num_layers: int, width: int, vocabulary: int
) -> tuple[ModelShape, dict[str, float]]:
    model = ModelConfig(path="reference", dtype="float32")
    config = _run_config(model)
    ds_config = resolve_ds_config(
        {"zero_optimization": {"stage": stage}}, config, world_size=comm.world_size()
    )
    encoder = reference("rms", num_layers, width, vocabulary, model).to(timer.device)
    shape = ModelShape.of(encoder, model)
    if stage == 3:
        placement_of(ds_config).take(list(encoder.parameters()))
    engine = ZeroEngine(encoder, build_optimizer(encoder, config.optimizer), ds_config)
    parameters = list(engine.encoder.parameters())

    def gather() -> None:
        with engine.hold(parameters):
            pass

    gathered, reductions, updates = timer.together(gather, 5), [], []
    ids, lengths = torch.arange(ROW, device=timer.device) % vocabulary, torch.tensor([ROW])
    for _ in range(6):
        with engine.hold(parameters):
            # Gradients are reduced when this context ends: ended by hand, to time that alone.
            stack = contextlib.ExitStack()
            stack.enter_context(engine.accumulation())
            engine.backward(engine.embed(ids, lengths).sum())
            comm.barrier()
            reductions.append(timer.once(stack.close))
        comm.barrier()
        updates.append(timer.once(lambda: engine.step(1e-6)))
    engine.close()
    # The first step makes buffers and the optimizer's state.
    times = {"gather": gathered, "reduce": min(reductions[1:]), "update": min(updates[1:])}
    return shape, times


def _run_config(model: ModelConfig) -> TrainConfig:
    """Return a config from which the engine takes the optimizer and the model's type."""
    nowhere = Path("unused")
    return TrainConfig(output_dir=nowhere, num_steps=1, model=model, data=DataConfig(path=nowhere))


def measure_loss(timer: Timer, sizes: Sizes) -> Line:
    """Measure the loss of a small and of a large batch; a collective call."""
    points = []
    for pairs, width in sizes.loss:
        work = _loss_of(pairs, width, timer.device)
        cost = loss_cost(
            num_queries=pairs * comm.world_size(),
            num_documents=pairs * comm.world_size(),
            width=width,
            world_size=comm.world_size(),
            score_bytes=2**24,  # all scores of these sizes are kept, as the loss keeps them
        )
        points.append((float(cost.matmul_flops), timer.together(work, 5)))
    return line_through(points)


def _loss_of(pairs: int, width: int, device: torch.device) -> Callable[[], object]:
    """Return a call of the loss in which each of a rank's queries has one document, its own row."""
    number, first = pairs * comm.world_size(), pairs * comm.rank()
    rows = torch.nn.functional.normalize(torch.randn(pairs, width, device=device), dim=1)
    own = torch.arange(first, first + pairs, device=device)
    starts = torch.arange(number + 1, device=device)
    empty = RaggedIndex(offsets=torch.zeros_like(starts), values=starts[:0])
    targets = Targets(
        num_queries=number,
        num_documents=number,
        query_index=own,
        document_index=own,
        positives=RaggedIndex(offsets=starts, values=starts[:-1]),
        negatives=empty,
        masked=empty,
    )
    return lambda: contrastive_loss(rows, rows, targets, config=LossConfig())


def measure_search(timer: Timer, sizes: Sizes) -> Line:
    """Measure the exact search of a mining in a small and in a large corpus; a collective call."""
    num_queries, width, counts = sizes.search
    generator, points = np.random.default_rng(0), []
    # From files, because reading and converting their vectors is part of a mining's search.
    with tempfile.TemporaryDirectory(prefix="diffembed-") as folder:
        files = []
        for number in range(max(counts)):
            vectors = _unit_vectors(generator, TILE, width)
            path = Path(folder) / f"{number}.npy"
            save_vectors(path, vectors)
            files.append(VectorFile(path=path, start=number * TILE, rows=TILE))
        queries = _unit_vectors(generator, num_queries, width)
        for count in counts:
            corpus = Corpus(files[:count], device=timer.device)
            seconds = timer.together(functools.partial(corpus.search, queries, _DEPTH), 3)
            points.append((2.0 * num_queries * len(corpus) * width, seconds))
    return line_through(points, num_queries)


def _unit_vectors(generator: np.random.Generator, rows: int, width: int) -> NDArray[np.float16]:
    vectors = generator.standard_normal((rows, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16)


def _table(timer: Timer, sizes: Sizes) -> float:
    """Return the seconds of a byte of a token table's gradient, added to an earlier one."""
    # Of `bytes` bytes in fp32: (bytes / 1024) x 256 x 4.
    weight = torch.randn(sizes.bytes // 1024, 256, device=timer.device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    ids = torch.arange(ROW, device=timer.device)

    def backward() -> None:
        torch.nn.functional.embedding(ids, weight).sum().backward()  # type: ignore[no-untyped-call]

    return timer.kernels(backward) / sizes.bytes


def _add(timer: Timer, sizes: Sizes) -> float:
    """Return the seconds of a byte that is read or written while two tensors are added up."""
    total, more = (torch.ones(sizes.bytes // 4, device=timer.device) for _ in range(2))
    # Two are read and one is written.
    return timer.kernels(lambda: total.add_(more)) / (3 * sizes.bytes)


def _host(timer: Timer, sizes: Sizes) -> float:
    """Return the bytes a second between device and pinned host memory."""
    # Only from pinned memory does a GPU copy while it computes, as boundaries are copied.
    on_gpu = timer.device.type == "cuda"
    there = torch.ones(sizes.bytes, dtype=torch.uint8, device=timer.device)
    here = torch.empty(sizes.bytes, dtype=torch.uint8, pin_memory=on_gpu)
    return sizes.bytes / timer.kernels(lambda: here.copy_(there, non_blocking=True))


def measure_constants(sizes: Sizes, timer: Timer) -> Constants:
    """Measure everything on the ranks that have joined; a collective call."""
    dtypes = {dtype: measure_dtype(dtype, timer, sizes) for dtype in sizes.dtypes}
    return Constants(
        ranks=comm.world_size(),
        dtypes=dtypes,
        add=_add(timer, sizes),
        table=_table(timer, sizes),
        host=_host(timer, sizes),
        engine={str(stage): measure_engine(stage, timer, sizes) for stage in (2, 3)},
        agreement=timer.together(lambda: comm.max_over_ranks(0.0, 0.0), 20),
        loss=measure_loss(timer, sizes),
        search=measure_search(timer, sizes),
    )


# --- processes -------------------------------------------------------------------------------


def calibrate(ranks: int) -> Calibration:
    """Measure with one rank, and with `ranks` if they are more; each in processes of their own.

    Raises:
        DiffembedError: the ranks failed.
    """
    parts = []
    with tempfile.TemporaryDirectory(prefix="diffembed-") as scratch:
        for number in sorted({1, ranks}):
            path = Path(scratch) / f"{number}.json"
            command = [sys.executable, "-m", __name__, str(path)]
            print(f"measuring with {several(number, 'rank')}", flush=True)
            if code := run_ranks(command, number):
                raise DiffembedError(
                    f"plan calibrate: {several(number, 'rank')} ended with exit code {code}"
                )
            parts.append(read_record(path, Calibration, fix="run it again"))
    # Of the other fields only `threads` may differ; the file says how many the most ranks had.
    return dataclasses.replace(
        parts[-1], constants=[constants for part in parts for constants in part.constants]
    )


def _measure_here(path: Path) -> None:
    """Measure as one rank, and write a calibration of this number of ranks on rank 0."""
    world = discover_world()
    share_cores(world)
    comm.start(world)
    device = comm.device()
    sizes = SIZES[device.type]
    own = measure_constants(sizes, Timer(device, sizes.seconds))
    slowest = _slowest(comm.all_gather_object(dataclasses.asdict(own)))
    if comm.rank() == 0:
        write_json(path, {**describe_machine(device), "constants": [slowest]})


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the fields of a `Calibration` except its constants."""
    on_gpu = device.type == "cuda"
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "version": VERSION,
        "device": comm.device_name(),
        "on_gpu": on_gpu,
        "memory": float(torch.cuda.get_device_properties(device).total_memory if on_gpu else ram),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _slowest(values: list[Any]) -> Any:
    """Return the largest of each number of equal trees; of bandwidths, the smallest."""
    first = values[0]
    if isinstance(first, dict):
        # `host` is the only bandwidth; everything else is seconds, or equal on all ranks.
        merged = {key: _slowest([value[key] for value in values]) for key in first}
        return {**merged, "host": min(v["host"] for v in values)} if "host" in first else merged
    if isinstance(first, list):
        return [_slowest(list(items)) for items in zip(*values, strict=True)]
    return max(values)


def main(arguments: list[str]) -> None:
    """Run one rank of a measurement."""
    parser = argparse.ArgumentParser(prog="measure", description="Measure as one rank.")
    parser.add_argument("output", type=Path)
    path = parser.parse_args(arguments).output
    with errors_end_the_process():
        _measure_here(path)
    comm.leave(0, gracefully=True)


if __name__ == "__main__":
    main(sys.argv[1:])
