"""torch's variable-length attention kernel by its definition, forward and backward, on the CPU.

Shapes: T packed tokens, H query heads, G key/value heads, K head width, L tokens of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operators
from torch import Tensor


def _rows(boundaries: Tensor, *packed: Tensor) -> Iterator[list[Tensor]]:
    edges = boundaries.tolist()
    for start, end in itertools.pairwise(edges):
        yield [x[start:end].float() for x in packed]


def _weights(q: Tensor, k: Tensor, *, causal: bool, scale: float, window: Any) -> Tensor:
    """Return the (H, L, L) attention weights of one row; -1 in a window means no limit."""
    left, right = window if window is not None else (-1, -1)
    place = torch.arange(len(q))
    ahead = place[None, :] - place[:, None]
    seen = torch.ones(len(q), len(q), dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    scores = torch.einsum("ihk,jhk->hij", q, k) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _check(q: Tensor, boundaries: tuple[Tensor, Tensor], longest: int) -> None:
    """Refuse the inputs that the CUDA kernel refuses."""
    for each in boundaries:
        assert each.dtype == torch.int32, f"boundaries must be int32, not {each.dtype}"
    assert type(longest) is int, "the longest row must be a number of the host"
    assert longest == int(boundaries[0].diff().max())
    assert q.dtype in (torch.float16, torch.bfloat16), f"half precision only, not {q.dtype}"
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.stride(-1) == 1


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries_q: Tensor,
    boundaries_k: Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool = False,
    scale: float | None = None,
    window: Any = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, (boundaries_q, boundaries_k), longest_q)
    groups, scale = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    parts = []
    for row_q, row_k, row_v in _rows(boundaries_q, q, k, v):
        row_k, row_v = (x.repeat_interleave(groups, 1) for x in (row_k, row_v))
        weights = _weights(row_q, row_k, causal=causal, scale=scale, window=window)
        parts.append(torch.einsum("hij,jhk->ihk", weights, row_v))
    log_sums, random_state = torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)
    return torch.cat(parts).to(q.dtype), log_sums, random_state


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    boundaries_q: Tensor,
    boundaries_k: Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
    random_state: Tensor,
    scale: float | None = None,
    window: Any = None,
) -> tuple[Tensor, ...]:
    groups, scale = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    parts = []
    for row_grad, row_q, row_k, row_v in _rows(boundaries_q, grad, q, k, v):
        grouped = (len(row_k), k.shape[1], groups, k.shape[2])
        row_k, row_v = (x.repeat_interleave(groups, 1) for x in (row_k, row_v))
        weights = _weights(row_q, row_k, causal=causal, scale=scale, window=window)
        by_weight = torch.einsum("ihk,jhk->hij", row_grad, row_v)
        by_score = weights * (by_weight - (by_weight * weights).sum(-1, keepdim=True)) * scale
        by_q = torch.einsum("hij,jhk->ihk", by_score, row_k)
        by_k = torch.einsum("hij,ihk->jhk", by_score, row_q)
        by_v = torch.einsum("hij,ihk->jhk", weights, row_grad)
        # (L, H, K) -> (L, G, K): a key's gradient is the sum over the heads that share it.
        parts.append((by_q, by_k.reshape(grouped).sum(2), by_v.reshape(grouped).sum(2)))
    return tuple(torch.cat(x).to(q.dtype) for x in zip(*parts, strict=True))


VARLEN_KERNELS: dict[Any, Any] = {
    torch.ops.torch_attn._varlen_attn.default: _forward,
    torch.ops.torch_attn._varlen_attn_backward.default: _backward,
}
