"""Time and memory of the loss of a large batch, next to other ways to compute it.

Shapes: N queries and as many documents, E width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.config import LossConfig
from pipeline.loss.contrastive import contrastive_loss
from pipeline.loss.targets import Targets
from tests.benchmarks.bench_loss import one_to_one
from tests.gpu.contact import Place, Report

TEMPERATURE = 0.02
ERROR_LIMIT = 1e-3  # of the gradients, against the naive loss in the same fp32
ROWS = 4096  # of a block, in the peer that computes blocks again
Loss = Callable[[Tensor, Tensor], list[Tensor]]


def run(place: Place, report: Report) -> None:
    """Measure each, ours first; a peer that does not fit or compile is a line, not a failure."""
    size, width = (256, 64) if place.tiny else (65_536, 3_584)
    torch.manual_seed(0)
    query = F.normalize(torch.randn(size, width, device=place.device), dim=1)
    noise = torch.randn(size, width, device=place.device)
    document = F.normalize(noise + 0.1 * query, dim=1)
    del noise
    targets = targets_on(place.device, size)
    works: dict[str, Loss] = {
        "ours": lambda q, d: tiled(q, d, targets),
        "naive autograd": naive,
        "blocks of queries, computed again": blockwise,
    }
    if place.kind == "cuda":
        works["torch.compile of the naive loss"] = torch.compile(naive, dynamic=False)
        works |= _liger()
    ours: list[Tensor] = []
    compared = False
    for name, work in works.items():
        place.release()
        if place.seconds_left < 8:
            report(f"{name}, N = {size:,}", "not measured, for lack of time")
            continue
        try:
            if name == "ours" or "compile" in name:
                work(query[:size], document[:size])  # kernels are loaded, or made
            with place.measured() as cost:
                found = work(query, document)
        except Exception as error:
            report(f"{name}, N = {size:,}, width {width:,}", f"failed: {type(error).__name__}")
            if name == "ours":
                raise
            continue
        report(
            f"{name}, N = {size:,}, width {width:,}",
            f"{cost.seconds:.2f} s, {cost.gib:.1f} GiB extra, loss {float(found[0]):.5f}",
            seconds=cost.seconds,
            gib=cost.gib,
        )
        if name == "ours":
            ours = [x.cpu() for x in found]
        elif not compared:  # with the first peer that fits
            compared = True
            for side, mine, theirs in zip(
                ("queries", "documents"), ours[1:], found[1:], strict=True
            ):
                error = float((mine - theirs.cpu()).norm() / theirs.norm())
                report.most(f"gradient of the {side}: ours / {name}", error, ERROR_LIMIT)
        del found


def targets_on(device: torch.device, size: int) -> Targets:
    """Query i has document i as its positive."""
    host = one_to_one(size)

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if dataclasses.is_dataclass(value):
            fields = {f.name: moved(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return type(value)(**fields)  # type: ignore[call-arg]
        return value

    targets: Targets = moved(host)
    return targets


def tiled(query: Tensor, document: Tensor, targets: Targets) -> list[Tensor]:
    """This project's loss."""
    config = LossConfig(temperature=TEMPERATURE, similarity="dot")
    out = contrastive_loss(query, document, targets, config=config)
    return [out.loss, out.query_grad, out.document_grad]


def naive(query: Tensor, document: Tensor) -> list[Tensor]:
    """Autograd through the whole (N, N) scores."""
    q, d = query.clone().requires_grad_(), document.clone().requires_grad_()
    labels = torch.arange(len(q), device=q.device)
    loss = F.cross_entropy(q @ d.T / TEMPERATURE, labels)
    return [loss.detach(), *torch.autograd.grad(loss, (q, d))]


def blockwise(query: Tensor, document: Tensor) -> list[Tensor]:
    """Scores of a block of queries at a time, computed again in the backward."""
    q, d = query.clone().requires_grad_(), document.clone().requires_grad_()

    def block(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(rows @ d.T / TEMPERATURE, labels, reduction="sum")

    labels = torch.arange(len(q), device=q.device)
    parts = [
        checkpoint(block, rows, wanted, use_reentrant=False)
        for rows, wanted in zip(q.split(ROWS), labels.split(ROWS), strict=True)
    ]
    loss = torch.stack(parts).sum() / len(q)
    return [loss.detach(), *torch.autograd.grad(loss, (q, d))]


def _liger() -> dict[str, Loss]:
    """Return Liger's fused linear cross-entropy, where it is installed: documents are the head."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return {}

    def fused(query: Tensor, document: Tensor) -> list[Tensor]:
        q = (query / TEMPERATURE).requires_grad_()
        d = document.clone().requires_grad_()
        loss = liger_fused_linear_cross_entropy(q, d, torch.arange(len(q), device=q.device))
        by_query, by_document = torch.autograd.grad(loss, (q, d))
        return [loss.detach(), by_query / TEMPERATURE, by_document]

    return {"Liger's fused linear cross-entropy": fused}
