"""Attention over packed rows: no padding, and no row sees another.

    lengths     (C,)          tokens of each row, in host memory
    query       (1, H, T, K)  T = sum of lengths, one row after another
    key, value  (1, G, T, K)  G divides H: each key/value head serves H / G query heads
    output      (1, T, H, K)

transformers calls `packed_attention` in every layer, under the name `PACKED`, and `choose_kernel`
picks for each call:

    flash-attn                      16-bit on a GPU, heads up to 256, dropout and capped scores
    torch's variable-length kernel  16-bit on a GPU, heads up to 256
    row by row                      everything else: CPU, float32, wide heads, GPUs before Ampere

The first two get all rows in one call, with (C + 1,) cumulative lengths as the boundaries between
them; (1, H, T, K) becomes (T, H, K) there. Row by row splits T and attends in each row of L tokens:

    C rows, T tokens of all rows, H query heads, G key/value heads, K head width, L tokens of a row
"""

from __future__ import annotations

import dataclasses
import importlib.util
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
# What both GPU kernels take.
_KERNEL_TYPES = (torch.float16, torch.bfloat16)
_WIDEST_HEAD = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """The extent of each row among the packed tokens; computed once per forward."""

    sizes: list[int]  # tokens of each row
    lengths: Tensor  # (C,) the same on the device
    boundaries: Tensor  # (C + 1,) int32 cumulative lengths
    longest: int
    causal: bool
    not_pooled: Tensor | None = None  # (C,) tokens at the front of each row

    @classmethod
    def of(
        cls,
        lengths: Tensor,
        *,
        causal: bool,
        not_pooled: Tensor | None = None,
        device: torch.device | None = None,
    ) -> PackedRows:
        """Describe rows.

        Args:
            lengths: (C,) tokens of each row, in host memory: reading a GPU means waiting for it.
            causal: whether a token sees only itself and earlier tokens.
            not_pooled: (C,) tokens at the front of each row that pooling leaves out, on the device.
            device: of the tokens; None: the device of the lengths.
        """
        sizes = lengths.tolist()
        if device is not None:
            lengths = lengths.to(device, non_blocking=True)
        return cls(
            sizes=sizes,
            lengths=lengths,
            boundaries=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),  # as the kernels take it
            longest=max(sizes),  # of the list, because kernels want a number on the host
            causal=causal,
            not_pooled=not_pooled,
        )

    @property
    def positions(self) -> Tensor:
        """(T,) position of each token in its row."""
        starts = self.per_token(self.boundaries[:-1])
        return torch.arange(len(starts), device=starts.device) - starts

    def per_token(self, values: Tensor) -> Tensor:
        """Repeat each row's value for its tokens: (C,) -> (T,)."""
        # Without `output_size`, torch would wait for the GPU to sum the lengths.
        return values.repeat_interleave(self.lengths, output_size=sum(self.sizes))


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: PackedRows,
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
        rows: how T is divided into rows; the model passes it through as a keyword.
        scaling: factor on the scores; K**-0.5 when None.
        dropout: probability of dropping an attention weight.
        sliding_window: not None in layers that see only near tokens.
        softcap: scores pass through softcap * tanh(score / softcap) (Gemma 2).

    Returns:
        (1, T, H, K), and None for the attention weights.
    """
    assert attention_mask is None, "a packed forward takes no attention mask"
    window = _window(module, sliding_window, rows)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = choose_kernel(
        query.device, query.dtype, query.shape[-1], dropout=dropout, softcap=softcap
    )
    if kernel is not None:
        # (1, H, T, K) -> (T, H, K), and the same for keys and values
        out = kernel.attend(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            rows=rows,
            scale=scale,
            dropout=dropout,
            window=window,
            softcap=softcap,
        )
        return out.unsqueeze(0), None
    outputs = []
    # `split`, not slices: the backward of each slice would fill a whole (T, ...) tensor.
    split = [torch.split(x, rows.sizes, dim=2) for x in (query, key, value)]
    for q, k, v in zip(*split, strict=True):
        out = _attend(q, k, v, rows.causal, window, scale, dropout, softcap)  # (1, H, L, K)
        outputs.append(out.transpose(1, 2))  # (1, L, H, K)
    return torch.cat(outputs, dim=1), None


def _window(module: Any, sliding_window: int | None, rows: PackedRows) -> tuple[int, int] | None:
    """Return the number of tokens that a token sees to its left and right; None for no window.

    In Hugging Face's masks a causal window includes the token itself, a two-sided one does not.
    """
    if sliding_window is None:
        return None
    # Not the argument itself: its meaning differs between models, by one token.
    reach = int(module.config.sliding_window)
    if reach >= rows.longest:
        return None  # every row fits, and kernels are faster without a window
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
    """Attend in one row: (1, H, L, K), (1, G, L, K), (1, G, L, K) -> (1, H, L, K)."""
    length = q.shape[2]
    mask = None
    if window is not None or (softcap is not None and causal):
        left, right = window or (length, 0)  # without a window, only the causal mask
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
            is_causal=causal and mask is None,  # torch refuses both; the mask holds the causal one
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    # torch's function cannot cap scores, so its steps are written out: scores are (1, H, L, L).
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, dim=1).transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    # The softmax in float32, as in transformers' own eager attention. Models pass a dropout of 0
    # outside of training, so `F.dropout` need not know the mode.
    weights = F.dropout(scores.float().softmax(dim=-1).to(q.dtype), dropout)
    return weights @ v.repeat_interleave(repeats, dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A GPU kernel that computes attention of all packed rows at once."""

    name: str
    attend: Callable[..., Tensor]
    takes_dropout: bool
    takes_softcap: bool


def choose_kernel(
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Kernel | None:
    """Return this machine's fastest kernel for exactly this attention; None: row by row."""
    fits = dtype in _KERNEL_TYPES and head_width <= _WIDEST_HEAD
    if device.type != "cuda" or not fits or is_before_ampere(device):
        return None
    for kernel in (flash_attention(), torch_varlen()):
        if (
            kernel is not None
            and (kernel.takes_dropout or dropout == 0)
            and (kernel.takes_softcap or softcap is None)
        ):
            return kernel
    return None


def describe_kernel(
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> str:
    """Return a line for the log: how a run computes attention."""
    kernel = choose_kernel(device, dtype, head_width, dropout=dropout, softcap=softcap)
    if kernel is not None:
        return f"attention: {kernel.name}"
    if device.type != "cuda":
        return "attention: row by row (on a CPU)"
    if dtype not in _KERNEL_TYPES:
        return f"attention: row by row, because kernels take no {str(dtype).removeprefix('torch.')}"
    if head_width > _WIDEST_HEAD:
        most = f"heads of {_WIDEST_HEAD} at most"
        return f"attention: row by row, because kernels take {most}, not {head_width}"
    if is_before_ampere(device):
        name = torch.cuda.get_device_name(device)
        return f"WARNING: attention: row by row, which is slow; kernels need Ampere, not {name}"
    needs = "torch 2.11 or newer, or flash-attn"
    if dropout or softcap is not None:
        needs = f"flash-attn for {'attention dropout' if dropout else 'capped scores'}"
    return f"WARNING: attention: row by row, which is slow on a GPU; install {needs}"


@cache
def is_before_ampere(device: torch.device) -> bool:
    """Return True for a GPU on which both kernels would raise (Volta, Turing)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)


@cache
def flash_attention() -> Kernel | None:
    """Return flash-attn's kernel if the package is installed and fits this torch."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        # Built for another torch. Without this line it would silently not be used.
        print(f"WARNING: flash-attn is installed but cannot be imported ({error})", flush=True)
        return None
    # Older versions have no such argument.
    takes_softcap = "softcap" in inspect.signature(flash_attn_varlen_func).parameters

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rows: PackedRows,
        scale: float,
        dropout: float,
        window: tuple[int, int] | None,
        softcap: float | None,
    ) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q,
            k,
            v,
            rows.boundaries,  # of queries, then of keys
            rows.boundaries,
            rows.longest,
            rows.longest,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=rows.causal,
            window_size=window or (-1, -1),  # -1: no limit
            # Otherwise atomics add up the query's gradient, in any order.
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **({} if softcap is None else {"softcap": softcap}),
        )
        return out

    return Kernel(name="flash-attn", attend=attend, takes_dropout=True, takes_softcap=takes_softcap)


@cache
def torch_varlen() -> Kernel | None:
    """Return torch's own kernel, unless this torch is too old for the arguments that we need."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None  # before torch 2.11
    takes_groups = "enable_gqa" in parameters

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rows: PackedRows,
        scale: float,
        dropout: float,
        window: tuple[int, int] | None,
        softcap: float | None,
    ) -> Tensor:
        assert dropout == 0 and softcap is None, "choose_kernel picks another one"
        more: dict[str, Any] = {}
        if (groups := q.shape[1] // k.shape[1]) > 1:
            if takes_groups:
                more["enable_gqa"] = True
            else:  # torch 2.11 cannot share heads: (T, G, K) -> (T, H, K)
                k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out = varlen_attn(
            q,
            k,
            v,
            rows.boundaries,
            rows.boundaries,
            rows.longest,
            rows.longest,
            scale=scale,
            # It has no flag for a causal mask: a window that ends at the token itself is one.
            window_size=window or ((-1, 0) if rows.causal else (-1, -1)),
            **more,
        )
        assert isinstance(out, Tensor)  # a tuple only with the log-sum-exp
        return out

    return Kernel(
        name="torch's variable-length kernel",
        attend=attend,
        takes_dropout=False,
        takes_softcap=False,
    )


def check_lengths(input_ids: Tensor, rows: PackedRows) -> None:
    """Refuse lengths that do not cover the tokens exactly, which would silently mix texts.

    Raises:
        UserError: lengths do not sum to the number of tokens, or one is not positive.
    """
    if sum(rows.sizes) != len(input_ids) or min(rows.sizes) < 1:
        raise UserError(
            f"lengths sum to {sum(rows.sizes)}, shortest {min(rows.sizes)}",
            allowed=f"positive lengths that sum to the {len(input_ids)} packed tokens",
        )


AttentionInterface.register(PACKED, packed_attention)
