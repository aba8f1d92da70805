"""The attention kernels that this machine has, against attention row by row in fp32.

Shapes: T packed tokens, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from pipeline.model import attention
from pipeline.model.attention import Kernel, PackedRows, describe_kernel, packed_attention
from tests.benchmarks.bench_support import draw_texts, load, tiny_qwen2
from tests.gpu.contact import Place, Report

LENGTHS = [5, 1, 300, 64]
KERNELS = ("flash_attention", "torch_varlen")
# Of the largest value of output and of each gradient: a few roundings of bf16.
LIMIT = 0.03


def run(place: Place, report: Report) -> None:
    """Compare every kernel, then a whole encoder."""
    line = describe_kernel(place.device, torch.bfloat16, 128)
    ok = None if place.kind == "cpu" else "row by row" not in line
    report("attention in bf16, heads of 128", line, "a kernel", ok)
    lengths = [3, 1, 20] if place.tiny else LENGTHS
    widths = (64,) if place.tiny else (64, 128, 256)
    for name in KERNELS:
        kernel = getattr(attention, name)()
        if kernel is None:
            report(name, "not available")
            continue
        if place.kind == "cpu" or (name == "flash_attention" and place.kind != "cuda"):
            report(name, "available; needs a GPU")
            continue
        for width, causal, window in itertools.product(widths, (False, True), (None, 32)):
            what = f"{'causal' if causal else 'two-sided'}, window {window}, heads of {width}"
            try:
                error = kernel_error(
                    kernel, lengths, width, causal=causal, window=window, device=place.device
                )
            except RuntimeError as fault:  # one that refuses a width takes the others
                report(f"{kernel.name}: {what}", str(fault).splitlines()[0][:200], ok=False)
                continue
            report.most(f"{kernel.name}: {what}", error, LIMIT)
    _compare_encoders(place, report)


def kernel_error(
    kernel: Kernel,
    lengths: list[int],
    width: int,
    *,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> float:
    """Return the largest relative error of output and gradients of a kernel in bf16."""
    module = SimpleNamespace(config=SimpleNamespace(sliding_window=window))
    rows = PackedRows.of(torch.tensor(lengths), causal=causal, device=device)

    def outputs(dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        inputs: list[Any] = [
            torch.randn(1, sum(lengths), heads, width, generator=generator)
            .to(device)
            .to(dtype)
            .transpose(1, 2)
            .requires_grad_()
            for heads in (8, 2, 2)
        ]
        out, _ = packed_attention(module, *inputs, None, rows=rows, sliding_window=window)
        out.float().pow(2).sum().backward()
        return [x.float().cpu() for x in (out.detach(), *(x.grad for x in inputs))]

    exact = outputs(torch.float32)  # fp32 always goes row by row
    with mock.patch.object(attention, "choose_kernel", lambda *_, **__: kernel):
        found = outputs(torch.bfloat16)
    return max(
        float((ours - wanted).abs().max() / wanted.abs().max())
        for ours, wanted in zip(found, exact, strict=True)
    )


def _compare_encoders(place: Place, report: Report) -> None:
    """Embed packed texts in bf16, and each text alone on the CPU in fp32."""
    folder = tiny_qwen2(place.folder, hidden_size=64, num_layers=2, vocab_size=300)
    encoder = load(folder)
    texts = draw_texts(np.array([7, 1, 40, 23]), 300)
    with torch.no_grad():
        wanted = torch.cat(
            [encoder(torch.from_numpy(text), torch.tensor([len(text)])) for text in texts]
        )
        packed = torch.from_numpy(np.concatenate(texts)).to(place.device, non_blocking=True)
        lengths = torch.tensor([len(text) for text in texts])
        found = place.to_device(encoder, torch.bfloat16)(packed, lengths).cpu()
    least = float(torch.cosine_similarity(found, wanted).min())
    report(
        "packed in bf16 / alone in fp32 on the CPU: cosine",
        f"{least:.5f}",
        ">= 0.999",
        least >= 0.999,
    )
