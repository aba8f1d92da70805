"""The loss written the naive way, in float64, one process: what the fast one is held to."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.loss.targets import RaggedIndex, Targets


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
    teacher: Tensor | None = None  # (N, M) a teacher's score of any pair
    vectors: tuple[Tensor, Tensor] | None = None  # (N, W), (M, W) a teacher's, of any length
    projection: Tensor | None = None  # (E, W)

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
            teacher_positives=self._teacher_scores(self.positives),
            teacher_negatives=self._teacher_scores(self.negatives),
            teacher_query=None if self.vectors is None else self.vectors[0][queries],
            teacher_document=None if self.vectors is None else self.vectors[1][documents],
        )

    def teacher_cosines(self) -> Tensor:
        """(N, M) float64."""
        assert self.vectors is not None
        query, document = (F.normalize(x.double(), dim=1) for x in self.vectors)
        return query @ document.T

    def _teacher_scores(self, table: list[list[int]]) -> Tensor | None:
        if self.teacher is None:
            return None
        return torch.stack([self.teacher[i, j] for i, row in enumerate(table) for j in row])


def make_case(
    *,
    num_queries: int = 37,
    num_documents: int = 101,
    width: int = 24,
    seed: int = 0,
    teacher: bool = False,
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
    masked[4].append(negatives[4][0])  # an own negative found to be a false one
    masked[5].append(positives[5][0])  # a positive stays a positive
    negatives[6].append(positives[6][0])  # also where it is listed as a negative
    scores = torch.randn(num_queries, num_documents, generator=g) if teacher else None
    case = Case(query, document, positives, negatives, masked, scores)
    if teacher:
        vectors = [
            torch.randn(len(side), _TEACHER_WIDTH, generator=g) for side in (query, document)
        ]
        for row, documents in enumerate(positives):
            vectors[1][documents[0]] += vectors[0][row]
        # A document exactly as close as the positive is a negative.
        vectors[1][negatives[3][0]] = vectors[1][positives[3][0]]
        case.vectors = (vectors[0], vectors[1])
        case.projection = torch.randn(width, _TEACHER_WIDTH, generator=g)
    return case


_TEACHER_WIDTH = 6  # narrow: many documents are closer than the positive


@dataclasses.dataclass
class Expected:
    """Loss and gradients by autograd over the whole score matrix."""

    loss: float
    query: Tensor
    document: Tensor
    temperature: float
    projection: Tensor | None = None


def naive_loss(case: Case, config: LossConfig) -> Expected:
    """Everything the config may ask for, one query and one positive at a time."""
    query = case.query.double().requires_grad_()
    document = case.document.double().requires_grad_()
    temperature = torch.tensor(config.temperature, dtype=torch.float64, requires_grad=True)
    dims = (*config.matryoshka_dims, query.shape[1])
    losses = [_at_width(query[:, :e], document[:, :e], temperature, case, config) for e in dims]
    loss = torch.stack(losses).mean()
    if config.projection is None:
        grads = torch.autograd.grad(loss, (query, document, temperature))
        return Expected(loss.item(), grads[0], grads[1], grads[2].item())
    assert case.projection is not None and case.vectors is not None
    matrix = case.projection.double().requires_grad_()
    rows, teacher = torch.cat([query, document]), F.normalize(torch.cat(case.vectors).double())
    if config.similarity == "cosine":
        rows = F.normalize(rows, dim=1)
    made = rows @ matrix
    distances = (
        1 - F.cosine_similarity(made, teacher)
        if config.projection.distance == "cosine"
        else (made - teacher).pow(2).sum(1)
    )
    loss = loss + config.projection.weight * distances.mean()
    grads = torch.autograd.grad(loss, (query, document, temperature, matrix))
    return Expected(loss.item(), grads[0], grads[1], grads[2].item(), grads[3])


def _at_width(q: Tensor, d: Tensor, temperature: Tensor, case: Case, config: LossConfig) -> Tensor:
    if config.similarity == "cosine":
        q, d = F.normalize(q, dim=1), F.normalize(d, dim=1)
    similarity = q @ d.T / (q.shape[1] if config.similarity == "scaled_dot" else 1)
    score = similarity / temperature
    allowed = torch.zeros(score.shape, dtype=torch.bool)
    for i, positives in enumerate(case.positives):
        own = case.negatives[i] if config.negatives == "own" else range(len(d))
        allowed[i, [j for j in own if j not in {*positives, *case.masked[i]}]] = True
        if config.false_negative_margin is not None:
            ceiling = similarity[i, positives].max() + config.false_negative_margin
            allowed[i] &= similarity[i] <= ceiling
        if config.guide is not None:
            cosine, margin = case.teacher_cosines()[i], config.guide.margin
            best = cosine[positives].max()
            below = margin if config.guide.margin_strategy == "absolute" else margin * best.abs()
            allowed[i] &= cosine <= best - below + 1e-5
    total = torch.zeros((), dtype=torch.float64)
    for i, positives in enumerate(case.positives):
        for p in positives:
            row = _cross_entropy(score[i, p], score[i, allowed[i]])
            column = _cross_entropy(score[i, p], score[allowed[:, p], p])
            term = (row + column) / 2 if config.symmetric else row
            total = total + term / len(positives) / len(q)
    if config.distillation is not None:
        total = (1 - config.distillation.weight) * total
        teacher = case.teacher
        if config.distillation.documents == "batch":
            teacher = case.teacher_cosines()
        assert teacher is not None
        for i, positives in enumerate(case.positives):
            listed = [*positives, *case.negatives[i]]
            if config.distillation.documents == "batch":
                listed = list(range(len(d)))
            target = (teacher[i, listed].double() / config.distillation.temperature).softmax(0)
            kl = F.kl_div(score[i, listed].log_softmax(0), target, reduction="sum")
            total = total + config.distillation.weight * kl / len(q)
    return total


def _cross_entropy(positive: Tensor, negatives: Tensor) -> Tensor:
    return -torch.cat([positive[None], negatives]).log_softmax(0)[0]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((value.double() - reference).norm() / reference.norm())
