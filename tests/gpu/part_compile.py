"""Compiled layers: what they gain, what they cost at the start, and that gradients stay."""

from __future__ import annotations

import dataclasses
import os

import torch

from pipeline import comm
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.launch import discover_world
from pipeline.model.encoder import compile_layers, num_graphs, require_compiler
from tests.benchmarks.bench_support import gradient_error, tiny_qwen2
from tests.gpu import bench_gpu
from tests.gpu.contact import GIB, Place, Report
from tests.gpu.part_gradients import FP32_LIMIT, gradients_of
from tests.gpu.part_speed import make_setting

MAX_GRAPHS = 16


def run(place: Place, report: Report) -> None:
    """Measure speed first, on a few layers of 7B, whose graphs are those of all layers."""
    # Empty, so that the first step shows what a first run waits.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place.folder / "inductor")
    if not place.tiny:
        try:
            require_compiler(on_gpu=place.kind == "cuda")
        except UserError as error:
            report("torch's compiler", str(error))
            return
    # A rehearsal only finds the graphs, and once: to make code of them takes a CPU minutes.
    backend = "eager" if place.tiny else "inductor"
    with torch.compiler.set_stance("force_eager" if place.tiny else "default"):
        for lora in (False,) if place.tiny else (False, True):
            _compare_speed(place, report, backend, lora=lora)
            place.release()
    _compare_gradients(place, report, backend)


def _compare_speed(place: Place, report: Report, backend: str, *, lora: bool) -> None:
    whole = make_setting(place)
    setting = dataclasses.replace(whole, shape={**whole.shape, "num_hidden_layers": 4})
    encoder = bench_gpu.build(setting, lora=lora, checkpointing=False)
    batch = bench_gpu.batch_of(setting, setting.lengths[0], setting.step_tokens)

    def step() -> None:
        bench_gpu.step(encoder, batch, "cache", setting.device)
        encoder.zero_grad(set_to_none=True)

    plain, extra = bench_gpu.timed(step, setting)
    compile_layers(encoder, backend=backend)
    with place.measured() as first:
        step()
    fused, fused_extra = bench_gpu.timed(step, setting)
    report(
        f"{'LoRA' if lora else 'full'}, 4 layers of 7B: time of a compiled step / of another",
        f"{fused / plain:.3f}; extra memory {fused_extra / GIB:.1f} instead of {extra / GIB:.1f} "
        f"GiB; first step {first.seconds:.0f} s",
        ratio=fused / plain,
        first_seconds=first.seconds,
    )


def _compare_gradients(place: Place, report: Report, backend: str) -> None:
    """Compare both schedules at ZeRO-3 with the uncompiled ones, and count graphs."""
    comm.start(discover_world())
    folder = tiny_qwen2(place.folder / "model", hidden_size=64, num_layers=2, vocab_size=500)
    model = ModelConfig(path=str(folder), dtype="float32")
    # A rehearsal leaves out the graphs without gradients.
    cases = [("plain", 0)] if place.tiny else [("cache", 0), ("sweep", 0)]
    wanted = gradients_of(model, 3, cases)
    before = num_graphs()
    found = gradients_of(model, 3, cases, backend=backend)
    for schedule, kept in cases:
        error = gradient_error(found[schedule, kept], wanted[schedule, kept])
        report.most(f"ZeRO-3, {schedule}, float32, compiled", error, FP32_LIMIT)
    graphs = num_graphs() - before
    report(
        f"graphs for chunks of all sizes, {' and '.join(schedule for schedule, _ in cases)}",
        str(graphs),
        f"1 to {MAX_GRAPHS}",
        1 <= graphs <= MAX_GRAPHS,
    )
