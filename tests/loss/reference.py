"""The loss written the naive way, in float64, one process: what the fast one is held to."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.loss.contrastive import RaggedIndex, Targets


def ragged(rows: list[list[int]]) -> RaggedIndex:
    """A ragged table from plain lists."""
    offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    return RaggedIndex(
        offsets=offsets, values=torch.tensor([v for row in rows for v in row], dtype=torch.int64)
    )


@dataclasses.dataclass
class Case:
    """A global batch: embeddings by global index, and lists of document indices per query."""

    query: Tensor
    document: Tensor
    positives: list[list[int]]
    negatives: list[list[int]]
    masked: list[list[int]]

    def targets(self, queries: Tensor, documents: Tensor) -> Targets:
        """As a rank that holds these rows is told."""
        return Targets(
            num_queries=len(self.query),
            num_documents=len(self.document),
            query_index=queries,
            document_index=documents,
            positives=ragged(self.positives),
            negatives=ragged(self.negatives),
            masked=ragged(self.masked),
        )


def make_case(
    *, num_queries: int = 37, num_documents: int = 101, width: int = 24, seed: int = 0
) -> Case:
    """Ragged everything: 1 to 3 positives, 0 to 4 negatives, 0 to 3 masked documents per query."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(width, generator=g)
    query = torch.randn(num_queries, width, generator=g) + 0.5 * base
    document = torch.randn(num_documents, width, generator=g) + 0.5 * base
    positives, negatives, masked = [], [], []
    for row in range(num_queries):
        order = torch.randperm(num_documents, generator=g).tolist()
        p, n, m = 1 + row % 3, row % 5, row % 4
        positives.append(order[:p])
        negatives.append(order[p : p + n])
        masked.append(order[p + n : p + n + m])
        document[order[0]] += 0.7 * query[row]
    return Case(query, document, positives, negatives, masked)


def naive_loss(case: Case, config: LossConfig) -> dict[str, Any]:
    """Loss and gradients by autograd over the whole score matrix, float64."""
    query = case.query.double().requires_grad_()
    document = case.document.double().requires_grad_()
    q, d = query, document
    if config.similarity == "cosine":
        q, d = F.normalize(q, dim=1), F.normalize(d, dim=1)
    score = q @ d.T / config.temperature
    loss = torch.zeros((), dtype=torch.float64)
    for row, positives in enumerate(case.positives):
        excluded = {*positives, *case.masked[row]}
        negatives = [j for j in range(len(document)) if j not in excluded]
        for p in positives:
            logits = torch.cat([score[row, p][None], score[row, negatives]])
            loss = loss - logits.log_softmax(0)[0] / len(positives) / len(query)
    query_grad, document_grad = torch.autograd.grad(loss, (query, document))
    return {"loss": loss.detach(), "query": query_grad, "document": document_grad}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((value.double() - reference).norm() / reference.norm())
