"""What one rank holds in memory during a cached step, as a pure function of the model's shape."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The counts that memory depends on."""

    parameters: int
    trainable: int
    num_layers: int
    hidden_size: int
    intermediate_size: int

    @classmethod
    def of(cls, encoder: Any) -> ModelShape:
        """Read the counts off an encoder, which may be on the meta device."""
        config = encoder.backbone.config
        counts = [(p.numel(), p.requires_grad) for p in encoder.parameters()]
        return cls(
            parameters=sum(n for n, _ in counts),
            trainable=sum(n for n, trained in counts if trained),
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
        )


def memory_per_rank(
    shape: ModelShape,
    *,
    world_size: int,
    stage: int,
    dtype: Literal["float32", "bfloat16"],
    chunk_tokens: int,
    gradient_checkpointing: bool,
) -> dict[str, float]:
    """Bytes per rank by purpose.

    Weights, fp32 master copies and moments follow the ZeRO paper (Rajbhandari et al.,
    arXiv 1910.02054, section 3); gradients are whole on every rank until the one reduction of the
    step. Activations are those of one chunk with its graph: per token and layer about
    18 h + 4 i saved elements (attention, norms kept in fp32, gated MLP), or one layer's worth and
    an h-wide input per layer with activation checkpointing. An estimate: real kernels save less.
    """
    width = 4 if dtype == "float32" else 2
    sharded = world_size if stage == 3 else 1
    per_layer = (18 * shape.hidden_size + 4 * shape.intermediate_size) * width
    if gradient_checkpointing:
        per_token = per_layer + shape.num_layers * shape.hidden_size * width
    else:
        per_token = per_layer * shape.num_layers
    return {
        "weights": shape.parameters * width / sharded,
        "gradients": shape.trainable * width,
        "fp32 master and AdamW moments": 12 * shape.trainable / world_size,
        "activations of one chunk": float(per_token * chunk_tokens),
    }
