"""The part of a parameter that one rank keeps, as arithmetic on its flat elements.

ZeRO-3:  [ rank 0 | rank 1 | rank 2 + padding ]    equal shares, the last ones padded with zeros
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def equal_share(num_elements: int, *, rank: int, share: int) -> range:
    """Return the elements of one rank where every rank has room for `share` of them.

    Ranks beyond the last element get an empty range.
    """
    start = min(rank * share, num_elements)
    return range(start, min(start + share, num_elements))


def padded(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return flat (K,) values, K <= size, followed by zeros: (size,)."""
    return torch.nn.functional.pad(values, (0, size - len(values)))


def covering_rows(shape: Sequence[int], elements: range) -> range:
    """Return the rows, along the first dimension, that hold these flat elements."""
    width = math.prod(shape[1:])
    return range(elements.start // width, -(-elements.stop // width))


def read_share(tensor: Any, elements: range) -> torch.Tensor:
    """Read flat elements of a tensor in a file, and of the file little more than these.

    Args:
        tensor: a slice as safetensors' `get_slice` returns it.
        elements: which ones; may be empty.
    """
    shape = tensor.get_shape()
    if not shape:  # a number, which has no rows
        return torch.as_tensor(tensor[...]).reshape(1)[elements.start : elements.stop]
    rows = covering_rows(shape, elements)
    read: torch.Tensor = tensor[rows.start : rows.stop].reshape(-1)
    before = rows.start * math.prod(shape[1:])
    return read[elements.start - before : elements.stop - before]
