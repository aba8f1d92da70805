"""Attention over packed rows: rows of any length one after another, no padding, none sees another.

Shapes: C rows, T tokens of all rows, H query heads, G key/value heads, K head width, L row tokens.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from pipeline.errors import UserError

# The name under which Hugging Face models find `packed_attention`.
PACKED = "diffembed_packed"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Where each row lies among the packed tokens; computed once per forward."""

    sizes: list[int]  # tokens of each row
    lengths: Tensor  # (C,) the same on the device
    boundaries: Tensor  # (C + 1,) int32 cumulative lengths
    longest: int
    causal: bool
    skipped: Tensor | None = None  # (C,) tokens at the front of each row that pooling leaves out

    @classmethod
    def of(
        cls,
        lengths: Tensor,
        *,
        causal: bool,
        skipped: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Rows:
        """Describe rows.

        Args:
            lengths: (C,) tokens of each row, in host memory: to ask a GPU is to wait for it.
            causal: whether a token sees only those before it.
            skipped: (C,) tokens at the front of each row that pooling leaves out, on the device.
            device: where the tokens are; None: where the lengths are.
        """
        sizes = lengths.tolist()
        if device is not None:
            lengths = lengths.to(device, non_blocking=True)
        return cls(
            sizes=sizes,
            lengths=lengths,
            boundaries=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            longest=max(sizes),
            causal=causal,
            skipped=skipped,
        )

    @property
    def positions(self) -> Tensor:
        """(T,) position of each token in its own row."""
        starts = self.per_token(self.boundaries[:-1])
        return torch.arange(len(starts), device=starts.device) - starts

    def per_token(self, values: Tensor) -> Tensor:
        """(C,) a value of each row to (T,) that of each token's row."""
        # Without the size of its output it would wait for the GPU to count.
        return values.repeat_interleave(self.lengths, output_size=sum(self.sizes))


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: Rows,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each row; the signature is Hugging Face's attention interface.

    Args:
        module: the attention module, for its config.
        query: (1, H, T, K), rotary positions applied.
        key: (1, G, T, K).
        value: (1, G, T, K).
        attention_mask: always None; the rows are the mask.
        rows: how T is cut into rows, handed through the model as a keyword.
        scaling: factor on the scores; K**-0.5 when None.
        dropout: probability of dropping an attention weight.
        sliding_window: not None in layers that only see near tokens.
        softcap: scores pass through softcap * tanh(score / softcap) (Gemma 2).

    Returns:
        (1, T, H, K), and None for the attention weights.
    """
    assert attention_mask is None, "a packed forward takes no attention mask"
    window = _window(module, sliding_window, rows)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = _varlen_kernel(query, dropout, softcap)
    if kernel is not None:
        out = kernel(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            rows=rows,
            scale=scale,
            dropout=dropout,
            window=window,
        )
        return out.unsqueeze(0), None
    parts = []
    # `split`, not slices: the backward of a slice fills a whole (T, ...) tensor per row.
    split = [torch.split(x, rows.sizes, dim=2) for x in (query, key, value)]
    for q, k, v in zip(*split, strict=True):
        out = _attend(q, k, v, rows.causal, window, scale, dropout, softcap)  # (1, H, L, K)
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def _window(module: Any, sliding_window: int | None, rows: Rows) -> tuple[int, int] | None:
    """How many tokens to the left and to the right a token sees; None for all it may.

    Hugging Face's masks count a causal window with the token itself and a two-sided one without.
    """
    if sliding_window is None:
        return None
    # Not the argument itself: some models pass the mask's width, some the kernel's.
    reach = int(module.config.sliding_window)
    if reach >= rows.longest:
        return None
    return (reach - 1, 0) if rows.causal else (reach, reach)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Attention of one row: (1, H, L, K), (1, G, L, K), (1, G, L, K) -> (1, H, L, K)."""
    length = q.shape[2]
    mask = None
    if window is not None or (softcap is not None and causal):
        left, right = window or (length, 0)
        ahead = torch.arange(length, device=q.device)
        ahead = ahead[None, :] - ahead[:, None]  # (L, L) key position minus query position
        mask = (ahead >= -left) & (ahead <= right)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, dim=1).transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = F.dropout(scores.float().softmax(dim=-1).to(q.dtype), dropout)
    return weights @ v.repeat_interleave(repeats, dim=1)


_Kernel = Callable[..., Tensor]


def _varlen_kernel(query: Tensor, dropout: float, softcap: float | None) -> _Kernel | None:
    """The fastest kernel of this machine that computes exactly what is asked; None: row by row."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if not query.is_cuda or not half or query.shape[-1] > 256 or softcap is not None:
        return None
    kernel = _flash_attention()
    if kernel is None and dropout == 0:
        kernel = _torch_varlen()
    return kernel


@cache
def _flash_attention() -> _Kernel | None:
    """flash-attn's kernel, where the package is installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rows: Rows,
        scale: float,
        dropout: float,
        window: tuple[int, int] | None,
    ) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q,
            k,
            v,
            rows.boundaries,
            rows.boundaries,
            rows.longest,
            rows.longest,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=rows.causal,
            window_size=window or (-1, -1),
        )
        return out

    return attend


@cache
def _torch_varlen() -> _Kernel | None:
    """torch's own kernel; the first releases lack the arguments that we need."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return None

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rows: Rows,
        scale: float,
        dropout: float,
        window: tuple[int, int] | None,
    ) -> Tensor:
        out = varlen_attn(
            q,
            k,
            v,
            rows.boundaries,
            rows.boundaries,
            rows.longest,
            rows.longest,
            scale=scale,
            window_size=window or ((-1, 0) if rows.causal else (-1, -1)),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
        return out

    return attend


def check_lengths(input_ids: Tensor, rows: Rows) -> None:
    """Refuse rows that do not tile the tokens, which would mix texts without a word.

    Raises:
        UserError: lengths do not sum to the number of tokens, or one is not positive.
    """
    if sum(rows.sizes) != len(input_ids) or min(rows.sizes) < 1:
        raise UserError(
            f"lengths sum to {sum(rows.sizes)}, shortest {min(rows.sizes)}",
            allowed=f"positive lengths that sum to the {len(input_ids)} packed tokens",
        )


AttentionInterface.register(PACKED, packed_attention)
