"""The contrastive loss of a global batch that no rank holds, and its exact gradients.

Each (query i, positive p) is contrasted with the query's negatives alone,

    l_ip = -log( exp(s_ip) / (exp(s_ip) + sum_j exp(s_ij)) ),   j over the negatives of i,

which is InfoNCE (van den Oord et al., arXiv 1807.03748, eq. 4) once per positive; the other
positives stand in no denominator, as masked false negatives do not. The loss is the mean over
queries of the mean over their positives; symmetric, half of it plus half of the same with the roles
exchanged: document p against the queries that have it as a negative.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.errors import UserError
from pipeline.loss.layout import Layout
from pipeline.loss.one_width import OneWidth
from pipeline.loss.targets import LossOutput, RaggedIndex, Targets
from pipeline.loss.tiles import DEFAULT_SCORE_BYTES

__all__ = ["LossOutput", "RaggedIndex", "Targets", "check_loss", "contrastive_loss"]


@torch.no_grad()
def contrastive_loss(
    query_BE: Tensor,
    document_KE: Tensor,
    targets: Targets,
    *,
    config: LossConfig,
    temperature: float | None = None,
    score_bytes: int | None = None,
) -> LossOutput:
    """The loss over all queries and documents of all ranks; a collective call.

    Args:
        query_BE: embeddings of this rank's queries.
        document_KE: embeddings of this rank's documents.
        targets: where these rows belong and which pairs are positive.
        config: similarity, temperature, and the rest of the recipe.
        temperature: the present value of a learned temperature; given exactly where
            `config.learn_temperature` is set.
        score_bytes: memory for scores; by default what suits the device.

    Raises:
        UserError: a Matryoshka width is not below that of the embeddings, or distillation is
            configured and there are no teacher scores.
    """
    assert (temperature is not None) == config.learn_temperature, "temperature: learned, or fixed"
    width = query_BE.shape[1]
    check_loss(config, width=width, has_scores=targets.teacher_positives is not None)
    layout = Layout(targets)
    outputs = []
    with _float32_products(query_BE.device):
        for dim in (*config.matryoshka_dims, width):
            one_width = OneWidth(
                query_BE[:, :dim],
                document_KE[:, :dim],
                layout,
                config,
                temperature=config.temperature if temperature is None else temperature,
                score_bytes=score_bytes or DEFAULT_SCORE_BYTES[query_BE.device.type],
            )
            outputs.append(one_width.run())
    return outputs[0] if len(outputs) == 1 else _mean(outputs)


def check_loss(config: LossConfig, *, width: int, has_scores: bool) -> None:
    """Refuse a loss that the model or the data cannot have; asked before a run starts.

    Args:
        config: the loss section.
        width: of the embeddings.
        has_scores: whether the data hold a teacher's scores.

    Raises:
        UserError: see `contrastive_loss`.
    """
    for dim in config.matryoshka_dims:
        if dim >= width:
            raise UserError(
                f"loss.matryoshka_dims: {dim}",
                allowed=f"widths below that of the embeddings ({width}), which is always trained",
            )
    if config.distillation is not None and not has_scores:
        raise UserError(
            "loss.distillation is set but the data set holds no teacher scores",
            fix="prepare the data with scores, or remove loss.distillation",
        )


@contextlib.contextmanager
def _float32_products(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: bfloat16 scores put 1e-2 of error into the gradients."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _mean(outputs: list[LossOutput]) -> LossOutput:
    """The mean over Matryoshka widths (Kusupati et al., arXiv 2205.13147, eq. 1, equal weights).

    The last output is the full width's; the metrics are its own.
    """
    full, share = outputs[-1], 1 / len(outputs)
    for side in ("query_grad", "document_grad"):
        total = getattr(full, side)
        for output in outputs[:-1]:
            part = getattr(output, side)
            total[:, : part.shape[1]] += part
        total *= share
    slopes = [o.temperature_grad for o in outputs if o.temperature_grad is not None]
    return dataclasses.replace(
        full,
        loss=torch.stack([output.loss for output in outputs]).mean(),
        temperature_grad=sum(slopes) * share if slopes else None,
    )
