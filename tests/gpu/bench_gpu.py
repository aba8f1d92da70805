"""Speed and memory of the cached step of a 7B model on one GPU: python -m tests.gpu.bench_gpu.

Random weights in Dream's shape, bf16. Full fine-tuning runs without an optimizer, whose state would
not fit next to one GPU's activations. `--tiny` runs the same on the CPU in seconds.

    HFU  FLOPs done, second forwards included, over the GPU's peak
    MFU  FLOPs that training without any caching would need, over the peak
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import LoraConfig, ModelConfig
from pipeline.data.batch import GlobalBatch
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.planning.memory import RankWorkload, memory_terms
from pipeline.planning.shape import ModelShape
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.engine import ChunkOutOfMemoryError
from tests.benchmarks.bench_support import PlainEngine, draw_texts, make_batch, step_config

# Dream-v0-Base-7B's config.json, as far as it sets a shape.
DREAM_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
}
TINY = {
    **DREAM_7B,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
# By name: the schedule, and whether activations are checkpointed.
SCHEDULES = {"cache": ("cache", False), "sweep": ("sweep", False), "checkpointing": ("cache", True)}
STEP_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Device and model of all measurements.

    Args:
        chunk_tokens: budget of a chunk; a longer text is a whole chunk.
        step_tokens: tokens of a step, at least two texts.
        peak: dense bf16 FLOP/s of the device.
        repeats: timed steps of a cell.
        attention_backward: see `step_flops`.
        made_on: where weights are made, if not on the device.
        to_device: moves an encoder from there to the device.
    """

    device: torch.device
    dtype: str
    shape: dict[str, Any]
    lengths: tuple[int, ...]
    chunk_tokens: int
    step_tokens: int
    peak: float
    repeats: int = 3
    attention_backward: float = 2.0
    made_on: torch.device | None = None
    to_device: Callable[[Encoder], Encoder] = lambda encoder: encoder


def forward_flops(shape: dict[str, Any], length: int) -> tuple[float, float]:
    """FLOPs of one token's forward in linear layers (2 a weight) and in attention (4 S h L).

    The embedding is a look-up; attention is bidirectional, so no half of it is spared.
    """
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    shared = shape["num_key_value_heads"] / shape["num_attention_heads"]
    weights = layers * (width**2 * (2 + 2 * shared) + 3 * width * shape["intermediate_size"])
    return 2 * weights, 4 * length * width * layers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """FLOPs of one token.

    Attributes:
        done: of a cached step.
        plain: of a forward and backward, activations computed again where they are checkpointed.
        useful: of training without caching or checkpointing.
    """

    done: float
    plain: float
    useful: float


def step_flops(
    shape: dict[str, Any],
    length: int,
    *,
    lora: bool,
    checkpointing: bool,
    attention_backward: float = 2.0,
) -> Flops:
    """Count the FLOPs of a step.

    A linear layer's backward costs two forwards, one where its weights are frozen. Checkpointing
    adds a forward; torch stops it at the last tensor that the backward needs, which a full layer
    has before its last projection.

    Args:
        shape: of the model.
        length: tokens of a text.
        lora: whether the weights are frozen; the adapters' own products are not counted.
        checkpointing: of activations.
        attention_backward: forwards' worth of attention's backward: 2 by its definition, with
            frozen weights too; 2.5 in kernels that compute the scores again.
    """
    linear, attention = forward_flops(shape, length)
    backward = linear * (1 if lora else 2)
    spared = shape["num_hidden_layers"] * shape["hidden_size"] * shape["intermediate_size"]
    again = linear + attention - (0 if lora else 2 * spared)
    plain = linear + attention + backward + attention * attention_backward
    plain += again if checkpointing else 0
    return Flops(
        done=plain + linear + attention,
        plain=plain,
        useful=linear + attention + backward + 2 * attention,
    )


def build(setting: Setting, *, lora: bool, checkpointing: bool) -> Encoder:
    """The encoder with random weights, made on the device itself."""
    with tempfile.TemporaryDirectory() as folder:
        published = {"model_type": "Dream", **setting.shape}
        (Path(folder) / "config.json").write_text(json.dumps(published))
        model = ModelConfig(
            path=folder,
            dtype=setting.dtype,
            gradient_checkpointing=checkpointing,
            lora=LoraConfig(rank=16, dropout=0.0) if lora else None,
        )
        encoder = build_encoder(model, meta=True)
    if lora:
        # peft makes adapters in float32, which the trainer does not keep: every adapted layer would
        # save a copy of its input in float32.
        for parameter in encoder.parameters():
            parameter.data = parameter.data.to(next(encoder.parameters()).dtype)
    made_on = setting.made_on or setting.device
    encoder.to_empty(device=made_on)
    for name, parameter in encoder.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(std=0.02)
    # Its frequencies are a buffer that is computed, not drawn.
    rotary = encoder.model.rotary_emb
    encoder.model.rotary_emb = type(rotary)(encoder.model.config).to(made_on)
    encoder = setting.to_device(encoder)
    if checkpointing:  # transformers checkpoints only while training
        encoder.train()
    return encoder


def batch_of(setting: Setting, length: int, tokens: int) -> GlobalBatch:
    """Pairs of texts of one length, together about `tokens`."""
    pairs = max(1, tokens // (2 * length))
    texts = draw_texts(np.full(2 * pairs, length), setting.shape["vocab_size"])
    return make_batch(texts, pairs, max_tokens=max(setting.chunk_tokens, length))


def timed(work: Callable[[], Any], setting: Setting, *, warm: bool = True) -> tuple[float, int]:
    """Least seconds of a call, and the peak bytes it allocated on top.

    Args:
        work: what is called.
        setting: device and repeats.
        warm: call it once before.
    """
    on_gpu = setting.device.type == "cuda"
    if warm:
        work()
    seconds, extra = [], 0
    for _ in range(setting.repeats):
        if on_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
            extra = max(extra, torch.cuda.max_memory_allocated() - before)
        seconds.append(time.perf_counter() - began)
    return min(seconds), extra


def plain(encoder: Encoder, batch: GlobalBatch, device: torch.device) -> None:
    """Forward and backward of every chunk with some gradient: what the GC factor is measured by."""
    for chunk in batch.chunks:
        ids = torch.from_numpy(chunk.input_ids).to(device)
        encoder(ids, torch.from_numpy(chunk.lengths)).sum().backward()


def step(encoder: Encoder, batch: GlobalBatch, schedule: str, device: torch.device) -> None:
    """The trainer's step without the update; gradients stay where they are and add up."""
    accumulate_gradients(PlainEngine(encoder), batch, step_config(schedule), device=device)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One line of the table; no numbers where it did not fit into memory."""

    train: str
    schedule: str
    length: int
    tokens_per_second: float = 0.0
    hfu: float = 0.0
    mfu: float = 0.0
    factor: float = 0.0  # cached step / plain forward and backward, if that was measured
    theory: float = 0.0
    extra_gib: float = 0.0  # on top of weights and gradients
    chunk_tokens: int = 0
    planned_gib: float = 0.0  # the planner's prediction of extra_gib

    @property
    def line(self) -> str:
        """A line of Markdown."""
        name = f"| {self.train} | {self.schedule} | {self.length:,} |"
        if not self.tokens_per_second:
            return f"{name} out of memory | | | | {self.planned_gib:.1f} planned | | |"
        factor = f"{self.factor:.3f}" if self.factor else "-"
        return (
            f"{name} {self.tokens_per_second:,.0f} | {self.hfu:.1%} | {self.mfu:.1%} | "
            f"{factor} / {self.theory:.3f} | {self.extra_gib:.1f} / {self.planned_gib:.1f} | "
            f"{self.extra_gib * 1024 / self.chunk_tokens:.2f} | "
            f"{self.tokens_per_second * STEP_SECONDS / (2 * self.length):,.0f} |"
        )


HEAD = """
| trained | schedule | tokens a text | tokens/s | HFU | MFU | factor, measured / theory | \
extra memory GiB, measured / planned | MiB a chunk token | pairs in 60 s |
|---|---|---|---|---|---|---|---|---|---|"""


def measure(setting: Setting, *, lora: bool, name: str, length: int) -> Cell:
    """Measure one cell, on its own encoder."""
    schedule, checkpointing = SCHEDULES[name]
    empty = Cell(train="LoRA" if lora else "full", schedule=name, length=length)
    try:
        encoder = build(setting, lora=lora, checkpointing=checkpointing)
        batch = batch_of(setting, length, setting.step_tokens)
        planned = planned_bytes(setting, encoder, batch, schedule, checkpointing)
        empty = dataclasses.replace(empty, planned_gib=planned / 2**30)
        work = functools.partial(step, encoder, batch, schedule, setting.device)
        # A step of long texts takes so long that starting the kernels does not show.
        warm = length < setting.lengths[-1]
        seconds, extra = timed(work, setting, warm=warm)
        base = 0.0
        if warm:
            base, _ = timed(functools.partial(plain, encoder, batch, setting.device), setting)
    except (torch.OutOfMemoryError, ChunkOutOfMemoryError):
        return empty
    flops = step_flops(
        setting.shape,
        length,
        lora=lora,
        checkpointing=checkpointing,
        attention_backward=setting.attention_backward,
    )
    return dataclasses.replace(
        empty,
        tokens_per_second=batch.tokens / seconds,
        hfu=flops.done * batch.tokens / seconds / setting.peak,
        mfu=flops.useful * batch.tokens / seconds / setting.peak,
        factor=seconds / base if base else 0.0,
        theory=flops.done / flops.plain,
        extra_gib=extra / 2**30,
        chunk_tokens=max(len(chunk.input_ids) for chunk in batch.chunks),
    )


# Memory of a step in addition to weights, gradients and the optimizer's state.
_EXTRA = ("activations", "boundaries", "loss")


def workload_of(setting: Setting, batch: GlobalBatch, *, checkpointing: bool) -> RankWorkload:
    """Describe the step of one rank to the planner."""
    return RankWorkload(
        world_size=1,
        stage=1,
        dtype=setting.dtype,  # type: ignore[arg-type]
        rank_tokens=batch.tokens,
        chunk_tokens=max(len(chunk.input_ids) for chunk in batch.chunks),
        gradient_checkpointing=checkpointing,
    )


def planned_bytes(
    setting: Setting, encoder: Encoder, batch: GlobalBatch, schedule: str, checkpointing: bool
) -> float:
    """Return what `diffembed plan run` predicts for the extra memory of a step's passes."""
    workload = workload_of(setting, batch, checkpointing=checkpointing)
    shape = ModelShape.of(encoder, encoder.config)
    terms = memory_terms(shape, workload, schedule)  # type: ignore[arg-type]
    return sum(term.size for term in terms if term.part in _EXTRA and "passes" in term.moments)


def release(setting: Setting) -> None:
    """Give the memory of the last cell back."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def confirm(setting: Setting, best: Cell) -> str:
    """One real step of the size that the rate promises for 60 seconds."""
    schedule, checkpointing = SCHEDULES[best.schedule]
    encoder = build(setting, lora=best.train == "LoRA", checkpointing=checkpointing)
    tokens = int(best.tokens_per_second * STEP_SECONDS)
    batch = batch_of(setting, best.length, tokens)
    once = dataclasses.replace(setting, repeats=1)
    seconds, extra = timed(functools.partial(step, encoder, batch, schedule, setting.device), once)
    return (
        f"one step of {batch.num_queries:,} pairs of {best.length}-token texts ({best.train}, "
        f"{best.schedule}): {seconds:.1f} s, {extra / 2**30:.1f} GiB extra"
    )


def settings(
    *,
    tiny: bool,
    peak_tflops: float,
    device: torch.device | None = None,
    repeats: int = 3,
    step_tokens: int = 65536,
) -> Setting:
    """A 7B model on the GPU, or something that a CPU runs in seconds."""
    if tiny:
        return Setting(
            device=device or torch.device("cpu"),
            dtype="float32",
            shape=TINY,
            lengths=(16, 64, 256),
            chunk_tokens=128,
            step_tokens=512,
            peak=peak_tflops * 1e12,
            repeats=1,
        )
    return Setting(
        device=device or torch.device("cuda"),
        dtype="bfloat16",
        shape=DREAM_7B,
        lengths=(512, 4096, 32768),
        chunk_tokens=8192,
        step_tokens=step_tokens,
        peak=peak_tflops * 1e12,
        repeats=repeats,
        attention_backward=2.5,
    )


def all_cells(setting: Setting) -> list[str]:
    """Names of all cells, short texts first: they tell most in the least time."""
    return [
        f"{train}/{name}/{length}"
        for length in setting.lengths
        for name in SCHEDULES
        for train in ("LoRA", "full")
    ]


def run_cells(setting: Setting, names: list[str]) -> Iterator[Cell]:
    """Measure the named cells, one after another."""
    for cell in names:
        train, name, length = cell.split("/")
        yield measure(setting, lora=train == "LoRA", name=name, length=int(length))
        release(setting)


def main(argv: list[str] | None = None) -> None:
    """The whole table, then one step of the largest batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--peak-tflops", type=float, default=989, help="H100 and H200: 989")
    parser.add_argument("--cells", nargs="+", metavar="LoRA/cache/512", help="default: all 18")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a cell")
    parser.add_argument("--step-tokens", type=int, default=65536)
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs the same on the CPU")
    setting = settings(
        tiny=arguments.tiny,
        peak_tflops=arguments.peak_tflops,
        repeats=arguments.repeats,
        step_tokens=arguments.step_tokens,
    )
    known = all_cells(setting)
    if unknown := set(arguments.cells or ()) - set(known):
        parser.error(f"unknown cells: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    print(HEAD)
    cells = []
    for cell in run_cells(setting, arguments.cells or known):
        cells.append(cell)
        print(cell.line, flush=True)
    measured = [cell for cell in cells if cell.tokens_per_second]
    shortest = [cell for cell in measured if cell.length == setting.lengths[0]]
    if shortest:
        fastest = max(shortest, key=lambda cell: cell.tokens_per_second)
        print(f"\nHFU where linear layers dominate: {fastest.hfu:.1%} (asked >= 55 %)")
    if compared := [cell for cell in measured if cell.factor]:
        worst = max(compared, key=lambda cell: abs(cell.factor / cell.theory - 1))
        print(f"factor furthest from theory: {worst.factor / worst.theory:.3f} (asked within 3 %)")
    if shortest and not arguments.tiny and not arguments.cells:
        print(confirm(setting, fastest))


if __name__ == "__main__":
    main()
