"""Where and how exactly a process embeds, how many share a machine, and an export loaded so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from pipeline.config import Precision, RopeScaling
from pipeline.data.crew import child_number, num_children, num_cores
from pipeline.evaluation.models.guard import num_parameters, tokens_that_fit
from pipeline.model.load import LoadedExport, load_export
from pipeline.world import discover_world

# What torch, transformers and the tensors of a forward take beside the weights.
_PROCESS_BYTES = 2**30


def load_here(
    path: Path,
    *,
    max_tokens: int,
    precision: Precision = "auto",
    dimensions: int | None = None,
    rope_scaling: RopeScaling | None = None,
) -> LoadedExport:
    """An export on this process's GPU, or on its share of the cores.

    Args:
        path: the export.
        max_tokens: packed tokens of one forward; fewer where the GPU has no room for them.
        precision: of weights and arithmetic; see `resolve`.
        dimensions: keep only so many of a vector's first numbers.
        rope_scaling: for texts longer than the export was trained on.
    """
    device, dtype = _device(), resolve(precision)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fits = tokens_that_fit(path, free, bytes_per_value=4 if dtype == "float32" else 2)
        max_tokens = max_tokens if fits is None else min(max_tokens, fits)
    share_cores()
    return load_export(
        path,
        device=device,
        dtype=dtype,
        max_tokens=max_tokens,
        dimensions=dimensions,
        rope_scaling=rope_scaling,
    )


def share_cores() -> None:
    """Take no more threads than this process's share, where children share the work."""
    if num_children() > 1:
        share = max(1, num_cores() // num_children())
        torch.set_num_threads(min(torch.get_num_threads(), share))


def resolve(precision: Precision) -> Literal["float32", "bfloat16"]:
    """What `auto` is on this machine: bfloat16 on a GPU, float32 elsewhere."""
    if precision != "auto":
        return precision
    # A CPU that multiplies bfloat16 is 1.7 times as fast with it, but small corpora of near ties
    # show it: p-MRR moved by 0.028 on a replica of FollowIR.
    return "bfloat16" if torch.cuda.is_available() else "float32"


def processes_here(exports: Sequence[Path]) -> int:
    """How many processes embed fastest on this machine: one per GPU, else one per core.

    On a quiet CPU that is as fast as many threads of one process, on a busy one four times as
    fast: threads wait for each other in every small product. There are fewer processes where
    copies of the largest export would fill half the memory.
    """
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    largest = max(_PROCESS_BYTES + 4 * num_parameters(export) for export in exports)
    # Torch's own number of threads: it respects OMP_NUM_THREADS and the cores of a Slurm job.
    return max(1, min(torch.get_num_threads(), int(memory // largest)))


def _device() -> torch.device:
    if torch.cuda.is_available():
        # One process per GPU where a step has several; Slurm may show each process only its own.
        number = (child_number() + discover_world().local_rank) % torch.cuda.device_count()
        return torch.device("cuda", number)
    return torch.device("cpu")
