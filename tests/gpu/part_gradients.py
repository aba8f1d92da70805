"""Gradients of the trainer's engine on one rank against autograd on the CPU in fp32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import comm
from pipeline.config import LoraConfig, ModelConfig
from pipeline.launch import discover_world
from pipeline.model.encoder import build_encoder, compile_layers
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import build_optimizer
from pipeline.training.zero import ZeroEngine, placement_of
from tests.benchmarks.bench_support import (
    Gradients,
    draw_texts,
    gradient_error,
    load,
    make_batch,
    plain_loss,
    step_config,
    take_gradients,
    tiny_qwen2,
)
from tests.gpu.contact import Place, Report

VOCABULARY, PAIRS = 500, 16
# Of the norm of all gradients. In bf16 the rounding of a tiny random model is large; its direction
# is what training follows.
FP32_LIMIT, BF16_COSINE = 1e-4, 0.98


def run(place: Place, report: Report) -> None:
    """Compare both schedules at every stage, then the dropout of LoRA with and without caching."""
    comm.start(discover_world())
    width, layers = (64, 2) if place.tiny else (128, 3)
    folder = tiny_qwen2(
        place.folder / "model", hidden_size=width, num_layers=layers, vocab_size=VOCABULARY
    )
    oracle = load(folder)
    plain_loss(oracle, batch_of())[0].backward()
    wanted = take_gradients(oracle)
    for dtype in ("float32", "bfloat16"):
        for stage in (1, 2, 3):
            if place.tiny and dtype == "bfloat16" and stage < 3:
                continue  # a rehearsal need not judge numbers
            model = ModelConfig(path=str(folder), dtype=dtype)
            found = gradients_of(model, stage, [("cache", 0), ("sweep", 0)])
            for (schedule, _), ours in found.items():
                _judge(report, f"ZeRO-{stage}, {schedule}, {dtype}", ours, wanted)
    _compare_dropout(folder, report)


def _judge(report: Report, name: str, ours: Gradients, wanted: Gradients) -> None:
    if "float32" in name:
        report.most(name, gradient_error(ours, wanted), FP32_LIMIT)
        return
    flat = [torch.cat([g[name].flatten() for name in wanted]) for g in (ours, wanted)]
    cosine = float(torch.cosine_similarity(*flat, dim=0))
    report(name, f"cosine {cosine:.4f}", f">= {BF16_COSINE}", cosine >= BF16_COSINE, cosine=cosine)


def _compare_dropout(folder: Path, report: Report) -> None:
    """Replayed masks give the gradient of masks that were drawn once."""
    lora = LoraConfig(rank=8, dropout=0.2)
    model = ModelConfig(path=str(folder), dtype="float32", lora=lora)
    found = gradients_of(model, 2, [("plain", 0), ("cache", 0), ("cache", 1), ("sweep", 0)])
    drawn_once = found.pop(("plain", 0))
    for (schedule, kept), ours in found.items():
        error = gradient_error(ours, drawn_once)
        report.most(f"LoRA dropout replayed: {schedule}, {kept} graphs kept", error, FP32_LIMIT)


def batch_of() -> Any:
    """Pairs of texts in three chunks or more."""
    lengths = np.random.default_rng(0).integers(2, 90, size=2 * PAIRS)
    return make_batch(draw_texts(lengths, VOCABULARY), PAIRS, max_tokens=600, min_chunks=3)


def gradients_of(
    model: ModelConfig,
    stage: int,
    schedules: list[tuple[str, int]],
    *,
    backend: str | None = None,
) -> dict[tuple[str, int], Gradients]:
    """Return the gradients of one engine by schedule and kept graphs, whole and on the CPU.

    With a backend of `torch.compile`, its layers are compiled.
    """
    config = dataclasses.replace(step_config(), model=model)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    ds_config = resolve_ds_config({"zero_optimization": zero}, config, world_size=1)
    torch.manual_seed(0)
    encoder = build_encoder(model, placement=placement_of(ds_config)).train()
    if model.lora is not None:
        _lift_adapters(encoder)
    if stage < 3:
        encoder = encoder.to(comm.device())
    engine = ZeroEngine(encoder, build_optimizer(encoder, config.optimizer), ds_config)
    if backend is not None:
        compile_layers(engine.encoder, backend=backend)
    found = {}
    for schedule, kept in schedules:
        chosen = dataclasses.replace(
            config, schedule=schedule, chunks=step_config(keep_graphs=kept).chunks
        )
        accumulate_gradients(engine, batch_of(), chosen, device=comm.device())
        found[schedule, kept] = {
            name: engine.full_gradient(name).float().cpu().clone()
            for name in engine.parameter_names
        }
        engine.step(0.0)  # clears the gradients, and changes no weight
    engine.close()
    return found


def _lift_adapters(encoder: Any) -> None:
    """Give adapters an effect: as they start, their dropout would not matter."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
