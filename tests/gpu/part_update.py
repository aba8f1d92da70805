"""Deterministic steps: their bits and their price; and the fused update against its definition."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from pipeline.config import OptimizerConfig
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.engine import build_optimizer
from pipeline.training.trainer import set_determinism
from tests.benchmarks.bench_support import (
    Gradients,
    PlainEngine,
    draw_texts,
    load,
    make_batch,
    step_config,
    take_gradients,
    tiny_qwen2,
)
from tests.gpu.contact import Place, Report

UPDATES = 20
FUSED_LIMIT = 1e-6
ADAMW = OptimizerConfig(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)


def run(place: Place, report: Report) -> None:
    """Measure steps first: they need cuBLAS's setting before its first use."""
    # As the trainer sets it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _compare_deterministic_steps(place, report)
    place.release()
    _compare_fused_update(place, report)


def _compare_deterministic_steps(place: Place, report: Report) -> None:
    """Compute one step's gradients twice, with and without a fixed order of sums."""
    size, tokens = (64, 400) if place.tiny else (2048, 65536)
    folder = tiny_qwen2(place.folder / "model", hidden_size=size, num_layers=4, vocab_size=500)
    encoder = place.to_device(load(folder), torch.bfloat16)
    texts = draw_texts(np.full(32, tokens // 32), 500)
    batch = make_batch(texts, 16, max_tokens=tokens // 4)
    engine = PlainEngine(encoder)
    config = step_config("cache")

    def gradients() -> Gradients:
        accumulate_gradients(engine, batch, config, device=place.device)
        return take_gradients(encoder)

    seconds = {}
    try:
        for wanted in (False, True):
            set_determinism(wanted)
            gradients()  # kernels are chosen and loaded
            with place.measured() as cost:
                first = gradients()
            seconds[wanted] = cost.seconds
            second = gradients()
            differ = [name for name in first if not torch.equal(first[name], second[name])]
            name = f"the same step twice, deterministic: {str(wanted).lower()}"
            found = f"{len(differ)} of {len(first)} gradients differ" if differ else "bit-equal"
            report(name, found, "bit-equal" if wanted else "", not differ if wanted else None)
    finally:
        set_determinism(False)
    price = seconds[True] / seconds[False]
    report("time of a deterministic step / of another", f"{price:.3f}", price=price)


def _compare_fused_update(place: Place, report: Report) -> None:
    """Follow AdamW's definition in float64, then time an update of many parameters."""
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 256, bias=False, device=place.device)
    optimizer = build_optimizer(model, ADAMW)
    assert optimizer.defaults["fused"]
    weight = model.weight.detach().double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    beta1, beta2 = ADAMW.betas
    for step in range(1, UPDATES + 1):
        gradient = torch.randn_like(model.weight) * 10.0 ** (step % 5 - 4)
        model.weight.grad = gradient.clone()
        optimizer.step()
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.double() ** 2
        weight -= ADAMW.lr * ADAMW.weight_decay * weight
        mean, square = first / (1 - beta1**step), second / (1 - beta2**step)
        weight -= ADAMW.lr * mean / (square.sqrt() + ADAMW.eps)
    error = float((model.weight.detach() - weight).abs().max())
    report.most(f"fused AdamW after {UPDATES} updates, against float64", error, FUSED_LIMIT)
    # As ZeRO has it: one flat partition of the masters.
    size = 1000 if place.tiny else 2 * 10**8
    parameter = torch.nn.Parameter(torch.zeros(size, device=place.device))
    parameter.grad = torch.full_like(parameter, 0.1)
    seconds = {kind: _update_seconds(parameter, kind, place) for kind in ("fused", "foreach")}
    ratio = seconds["foreach"] / seconds["fused"]
    report(
        f"an update of {size:,} parameters",
        f"{1e3 * seconds['fused']:.2f} ms, without fusion {ratio:.1f} times as long",
        seconds=seconds["fused"],
        ratio=ratio,
    )


def _update_seconds(parameter: torch.nn.Parameter, kind: str, place: Place) -> float:
    kinds: dict[str, Any] = {kind: True}
    optimizer = torch.optim.AdamW([parameter], **kinds)
    optimizer.step()  # makes the moments
    with place.measured() as cost:
        for _ in range(5):
            optimizer.step()
    return cost.seconds / 5
