"""Which device of the machine a process embeds on, and an export loaded there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from pipeline.comm import discover_world
from pipeline.config import RopeScaling
from pipeline.evaluation.guard import tokens_that_fit
from pipeline.model.load import LoadedExport, load_export


def load_here(
    path: Path,
    *,
    max_tokens: int,
    dimensions: int | None = None,
    rope_scaling: RopeScaling | None = None,
    worker: int = 0,
) -> LoadedExport:
    """An export on this process's device: bfloat16 on a GPU, float32 elsewhere.

    Args:
        path: the export.
        max_tokens: packed tokens of one forward; fewer where the GPU has no room for them.
        dimensions: keep only so many of a vector's first numbers.
        rope_scaling: for texts longer than the export was trained on.
        worker: number of this process among those that share the machine without a launcher.
    """
    device, precision = _place(worker)
    # An adapter alone does not say how large its base model is.
    if device.type == "cuda" and (path / "config.json").is_file():
        free, _ = torch.cuda.mem_get_info(device)
        max_tokens = min(max_tokens, tokens_that_fit(path, free, bytes_per_value=2))
    return load_export(
        path,
        device=device,
        dtype=precision,
        max_tokens=max_tokens,
        dimensions=dimensions,
        rope_scaling=rope_scaling,
    )


def _place(worker: int) -> tuple[torch.device, Literal["float32", "bfloat16"]]:
    if torch.cuda.is_available():
        # One process per GPU where a step has several; Slurm may show each process only its own.
        number = (worker + discover_world().local_rank) % torch.cuda.device_count()
        return torch.device("cuda", number), "bfloat16"
    return torch.device("cpu"), "float32"
