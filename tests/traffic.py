"""Bytes that DeepSpeed's collectives move, counted at the object through which all of them go."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

_GATHERS = ("all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced")
_REDUCTIONS = ("reduce", "reduce_scatter", "reduce_scatter_tensor", "all_reduce")


class Traffic:
    """Bytes of whole tensors, by phase and kind (`gathered` or `reduced`).

    Make it after DeepSpeed has started; set `phase` to tell parts of a step apart.
    """

    def __init__(self) -> None:
        self.phase = ""
        self.bytes: Counter[tuple[str, str]] = Counter()
        self._inside = False
        backend = sys.modules["deepspeed.comm.comm"].cdb
        for kind, names in (("gathered", _GATHERS), ("reduced", _REDUCTIONS)):
            for name in names:
                setattr(backend, name, self._wrap(getattr(backend, name), kind))

    def _wrap(self, collective: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # some are made of others
                return collective(*args, **kwargs)
            # Of input and output the larger is the whole.
            sizes = [_num_bytes(value) for value in (*args, *kwargs.values())]
            self.bytes[self.phase, kind] += max(sizes)
            self._inside = True
            try:
                return collective(*args, **kwargs)
            finally:
                self._inside = False

        return counted


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0
