"""Whether one forward fits a GPU: told before an array starts, not by its first crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.tasks.elements import list_elements

# Room for the CUDA context, fragmentation and what a kernel needs for itself.
_USABLE = 0.85


def tokens_that_fit(export: Path, memory: int, bytes_per_value: int) -> int:
    """Packed tokens of the largest forward without gradients; 0 if not even the weights fit.

    Per token the widest moment of a layer holds the residual stream, its norm, and the gate, up and
    product of the feed-forward: 2 x width + 3 x inner width values. Attention adds nothing of the
    square of the length, because its kernels keep no score matrix.

    Args:
        memory: free bytes of the GPU before the weights are loaded.
        bytes_per_value: 2 for bfloat16, 4 for float32.
    """
    tree = json.loads((export / "config.json").read_text())
    width = tree.get("hidden_size") or tree["n_embd"]
    inner = tree.get("intermediate_size") or tree.get("n_inner") or 4 * width
    left = memory * _USABLE - num_parameters(export) * bytes_per_value
    return max(0, int(left // ((2 * width + 3 * inner) * bytes_per_value)))


def check_fit(config: EvaluateConfig) -> None:
    """Refuse a plan whose longest text does not fit the GPU that the config names.

    Raises:
        UserError: with the length that would fit.
    """
    if config.gpu_memory_gib is None:
        return
    longest = max(element.max_length for element in list_elements(config))
    for model in config.models:
        size = 4 if model.precision == "float32" else 2
        fits = tokens_that_fit(model.path, int(config.gpu_memory_gib * 2**30), bytes_per_value=size)
        if fits < longest:
            raise UserError(
                f"{model.name}: one text of {longest} tokens on a GPU of "
                f"{config.gpu_memory_gib:g} GiB",
                allowed=f"at most {fits} tokens" if fits else "a GPU that holds the weights",
                fix="shorten max_length or lengths, or use a larger GPU",
            )


def num_parameters(export: Path) -> int:
    """Parameters by the headers of the weight files; their values are not read."""
    total = 0
    for path in sorted(export.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(
            math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
        )
    return total
