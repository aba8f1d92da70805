"""Whether one forward fits a GPU: told before an array starts, not by its first crash."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError, blame
from pipeline.evaluation.tasks.elements import list_elements
from pipeline.limits import limits_of
from pipeline.model.parts import backbone_folder, read_settings

# The names of the two widths in config.json: those of most models, GPT-2's, LLaDA's.
_WIDTH = ("hidden_size", "n_embd", "d_model")
_INNER_WIDTH = ("intermediate_size", "n_inner", "mlp_hidden_size")
# Room for the CUDA context, fragmentation and what a kernel needs for itself.
_USABLE = 0.85


def tokens_that_fit(export: Path, memory: int, bytes_per_value: int) -> int | None:
    """Packed tokens of the largest forward without gradients; 0 if not even the weights fit.

    None where the backbone is not here yet: to be exported, or an adapter's to be fetched.

    Per token the widest moment of a layer holds the residual stream, its norm, and the gate, up and
    product of the feed-forward: 2 x width + 3 x inner width values. Attention adds nothing of the
    square of the length, because its kernels keep no score matrix.

    Args:
        memory: free bytes of the GPU before the weights are loaded.
        bytes_per_value: 2 for bfloat16, 4 for float32.
    """
    backbone = backbone_folder(export)
    if backbone is None or not (backbone / "config.json").is_file():
        return None
    tree = read_settings(backbone, "config.json", dict[str, Any])
    with blame(f"{backbone}/config.json: no width", fix=f"fetch {backbone} again"):
        width = next(int(tree[key]) for key in _WIDTH if key in tree)
        inner = next((int(tree[key]) for key in _INNER_WIDTH if tree.get(key)), 4 * width)
    left = memory * _USABLE - num_parameters(export) * bytes_per_value
    return max(0, int(left // ((2 * width + 3 * inner) * bytes_per_value)))


def check_fit(config: EvaluateConfig) -> None:
    """Refuse a plan whose longest text a model has no positions for, or the named GPU no room.

    Raises:
        UserError: with the length that would fit.
    """
    longest = max(element.max_length for element in list_elements(config))
    for model in config.models:
        backbone = backbone_folder(model.path)
        if backbone is not None and (backbone / "config.json").is_file():
            hf_config = read_settings(backbone, "config.json", dict[str, Any])
            limits = limits_of(hf_config, model.name)
            limits.require_length({f"{model.name}: max_length or lengths": longest})
        if config.gpu_memory_gib is None:
            continue
        size = 4 if model.precision == "float32" else 2
        fits = tokens_that_fit(model.path, int(config.gpu_memory_gib * 2**30), bytes_per_value=size)
        if fits is not None and fits < longest:
            raise UserError(
                f"{model.name}: one text of {longest} tokens on a GPU of "
                f"{config.gpu_memory_gib:g} GiB",
                allowed=f"at most {fits} tokens" if fits else "a GPU that holds the weights",
                fix="shorten max_length or lengths, or use a larger GPU",
            )


def num_parameters(export: Path) -> int:
    """Parameters by the headers of the weight files; their values are not read.

    Those of an adapter alone with its base model's, where that is on this machine.
    """
    folders = {export, backbone_folder(export) or export}
    total = 0
    for path in [file for folder in folders for file in folder.glob("*.safetensors")]:
        with path.open("rb") as file, blame(f"{path}: damaged", fix=f"fetch {path.parent} again"):
            # Of a file that is no safetensors, the first bytes may be any number.
            size = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
            header = json.loads(file.read(size))
            total += sum(
                math.prod(tensor["shape"])
                for name, tensor in header.items()
                if name != "__metadata__"
            )
    return total
