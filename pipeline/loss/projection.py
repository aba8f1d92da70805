"""Distance of projected embeddings to a teacher's vectors: a term of the loss, row by row.

    z_W = x_E @ projection_EW       x: a text's embedding, of length 1 under cosine similarity
    cosine     1 - u . v            d / dz = (u (u . v) - v) / |z|,    u = z / |z|
    squared    |z - v|^2            d / dz = 2 (z - v)

v is the teacher's vector of the same text, of length 1. The term is the mean over all queries and
documents of the global batch (Romero et al., "FitNets", arXiv 1412.6550, equation 3, for vectors of
texts). A row needs no other row, so ranks only add up their sums and the gradient of the matrix.

All products are float64: they are few next to the scores of all pairs.

Shapes: B queries and K documents of this rank, R rows of a slice, E embedding width, W width of the
teacher's vectors.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pipeline import comm
from pipeline.config import LossConfig
from pipeline.loss.targets import LossOutput, Targets
from pipeline.loss.tiles import SLICE_ROWS

# As torch.nn.functional.normalize: a zero row stays zero instead of becoming nan.
_SMALLEST_NORM = 1e-12


@torch.no_grad()
def add_projection_term(
    output: LossOutput,
    query_BE: Tensor,
    document_KE: Tensor,
    targets: Targets,
    *,
    projection_EW: Tensor,
    config: LossConfig,
) -> LossOutput:
    """Add the term to a loss, whose gradients are changed in place; a collective call.

    Args:
        output: the loss without the term.
        query_BE: embeddings of this rank's queries.
        document_KE: embeddings of this rank's documents.
        targets: with the teacher's vectors of these texts.
        projection_EW: the matrix, the same on every rank.
        config: distance, weight and similarity.
    """
    assert config.projection is not None
    assert targets.teacher_query is not None and targets.teacher_document is not None
    matrix_EW = projection_EW.double()
    matrix_grad_EW = torch.zeros_like(matrix_EW)
    total = matrix_EW.new_zeros(1)
    share = config.projection.weight / (targets.num_queries + targets.num_documents)
    for rows, teacher, grad in (
        (query_BE, targets.teacher_query, output.query_grad),
        (document_KE, targets.teacher_document, output.document_grad),
    ):
        for start in range(0, rows.shape[0], SLICE_ROWS):
            part = slice(start, start + SLICE_ROWS)
            x_RE, norm_R1 = _unit(rows[part].double())
            if config.similarity != "cosine":
                x_RE, norm_R1 = rows[part].double(), torch.ones_like(norm_R1)
            v_RW, _ = _unit(teacher[part].double())
            distance_R, slope_RW = _distance(x_RE @ matrix_EW, v_RW, config.projection.distance)
            total += share * distance_R.sum()
            matrix_grad_EW.addmm_(x_RE.T, slope_RW, alpha=share)
            grad_RE = share * (slope_RW @ matrix_EW.T)
            if config.similarity == "cosine":
                # A unit row does not change along itself.
                grad_RE -= x_RE * (x_RE * grad_RE).sum(1, keepdim=True)
            grad[part] += (grad_RE / norm_R1).to(grad.dtype)
    term = float(comm.all_reduce_(total))
    return dataclasses.replace(
        output,
        loss=output.loss + term,
        projection_grad=comm.all_reduce_(matrix_grad_EW).to(projection_EW.dtype),
        metrics={**output.metrics, "teacher_distance": term / config.projection.weight},
    )


def _unit(x_RE: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of length 1, and (R, 1) their lengths before."""
    norm_R1 = x_RE.norm(dim=1, keepdim=True).clamp_min(_SMALLEST_NORM)
    return x_RE / norm_R1, norm_R1


def _distance(z_RW: Tensor, v_RW: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return (R,) distances of projected rows to the teacher's, and their derivatives by `z_RW`."""
    if kind == "squared":
        gap_RW = z_RW - v_RW
        return (gap_RW**2).sum(1), 2 * gap_RW
    u_RW, norm_R1 = _unit(z_RW)
    cosine_R1 = (u_RW * v_RW).sum(1, keepdim=True)
    return 1 - cosine_R1[:, 0], (u_RW * cosine_R1 - v_RW) / norm_R1
