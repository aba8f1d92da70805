"""Predict how long a machine takes to embed texts with a model, without torch.

config.json --PlannedModel.read--> counts of the model, checked against a GPU's memory
texts       --seconds--> FLOPs of forwards / (peak x UTILISATION), or a calibration's seconds
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import SENTENCE_CONFIGS, ModelConfig, Precision, local_file, model_fix
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.model.export_folder import backbone_folder
from pipeline.planning.architecture import BLOCKS, read_architecture
from pipeline.planning.calibration import Calibration, Machine
from pipeline.planning.describe import format_bytes
from pipeline.planning.measured import forward_seconds
from pipeline.planning.shape import NUMBER_BYTES, Dtype, ModelShape
from pipeline.planning.speed import UTILISATION, Gpu, forward_flops
from pipeline.planning.text_sizes import Texts

# Packed tokens of a forward on a CPU, which splits larger ones (`model/load_export.py`).
_CPU_TOKENS = 2048
_OTHER_MODEL = "export it first, or plan with a model of the same size: --model FOLDER"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlannedModel:
    """A model that embeds texts on a machine.

    Attributes:
        name: for the plan.
        shape: its counts; a forward costs the same whatever is trained.
        causal: a token sees only earlier ones.
        dtype: of its arithmetic.
        machine: with a known speed.
        max_tokens: packed tokens of a forward.
        longest: tokens after which its texts are cut at the latest; None for no limit.
    """

    name: str
    shape: ModelShape
    causal: bool
    dtype: Dtype
    machine: Machine
    max_tokens: int
    longest: int | None = None

    @classmethod
    def read(
        cls,
        path: str,
        *,
        name: str,
        key: str,
        precision: Precision,
        machine: Machine,
        max_tokens: int = 16384,
    ) -> PlannedModel:
        """Read config.json of an export, or of a model in the local cache.

        Raises:
            UserError: it is not on this machine, its layout cannot be counted, or its weights do
                not fit a GPU.
        """
        tree = _read_config(path, key)
        if (architecture := read_architecture(tree)).block is None:
            raise UserError(
                f"{key}: {path}: model_type {architecture.model_type!r}",
                allowed=", ".join(BLOCKS),
                fix="plan with a model of about the same size in its place",
            )
        on_gpu = machine.target.on_gpu
        auto: Dtype = "bfloat16" if on_gpu else "float32"
        dtype = auto if precision == "auto" else precision
        # With a pooling, so that none is looked for in the folder; a plan does not read it.
        shape = ModelShape.planned(tree, ModelConfig(path=path, pooling="mean"))
        weights = shape.parameters * NUMBER_BYTES[dtype]
        if weights > machine.target.available:
            raise UserError(
                f"{key}: {path}: {format_bytes(weights)} of weights in {dtype}",
                allowed=f"{format_bytes(machine.target.available)}, {machine.target.name}",
                fix="plan for a larger GPU: one GPU holds a model that embeds",
            )
        return cls(
            name=name,
            shape=shape,
            # Exports state it. A base model is planned as trainings take it by default.
            causal=bool(tree.get("is_causal", False)),
            dtype=dtype,
            machine=machine,
            max_tokens=max_tokens if on_gpu else min(max_tokens, _CPU_TOKENS),
            longest=_longest(path),
        )

    def seconds(self, texts: Texts) -> float:
        """Return the seconds that one GPU, or one rank of a CPU, takes to embed texts.

        Raises:
            UserError: the speed is not known, or a calibration lacks this type of numbers.
        """
        speed = self.machine.require_speed()
        if isinstance(speed, Gpu):
            peak = speed.bf16 if self.dtype == "bfloat16" else speed.fp32
            products, attention = forward_flops(
                self.shape, tokens=texts.tokens, squares=texts.squares, causal=self.causal
            )
            return (products + attention) / (peak * UTILISATION)
        pairs = zip(texts.lengths.tolist(), texts.counts.tolist(), strict=True)
        return float(sum(count * _measured(self, max(1, round(length))) for length, count in pairs))


# Called for every length of every task, many of which are equal.
@functools.lru_cache(maxsize=4096)
def _measured(model: PlannedModel, length: int) -> float:
    """Return the seconds of one text, in a full forward of such texts, on a calibrated machine."""
    speed, rows = model.machine.speed, max(1, model.max_tokens // length)
    assert isinstance(speed, Calibration)
    lengths = np.full(rows, length)
    seconds = forward_seconds(model.shape, lengths, speed, dtype=model.dtype, causal=model.causal)
    return seconds / rows


def _read_config(path: str, key: str) -> dict[str, Any]:
    folder = backbone_folder(Path(path)) if Path(path).is_dir() else None
    file = local_file(str(folder or path), "config.json")
    if file is None:
        raise UserError(
            f"{key}: {path}: no config.json on this machine",
            fix=_OTHER_MODEL if key.startswith("models.") else model_fix(path),
        )
    tree = read_json(file, fix=model_fix(path))
    if not isinstance(tree, dict):
        raise UserError(f"{file}: {type(tree).__name__} at the top", allowed="a JSON object")
    return tree


def _longest(path: str) -> int | None:
    """Return the length at which a sentence-transformers folder cuts texts, if it names one."""
    files = (local_file(path, name) for name in SENTENCE_CONFIGS)
    file = next((file for file in files if file is not None), None)
    tree = read_json(file, fix=model_fix(path)) if file else {}
    found = tree.get("max_seq_length") if isinstance(tree, dict) else None
    return found if isinstance(found, int) else None
