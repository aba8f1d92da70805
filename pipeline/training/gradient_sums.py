"""Gradients of many backwards added up in fp32, whatever the parameters' own type.

autograd adds into `.grad` in the parameter's type. In bfloat16 a sum keeps 8 bits: after a hundred
chunks most of what a chunk adds is lost, and more chunks would mean another gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class GradientSums:
    """Takes every gradient that autograd leaves in a low-precision parameter, while it is open.

    Costs 4 bytes per element of those parameters between `open` and `hand_back`.

    Args:
        parameters: the trainable parameters; those in fp32 are left to autograd.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._is_open = False
        for parameter in parameters:
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def open(self) -> None:
        """Begin; every gradient is taken from now on."""
        self._is_open = True

    def _take(self, parameter: torch.Tensor) -> None:
        if not self._is_open or parameter.grad is None:
            return
        assert isinstance(parameter, torch.nn.Parameter)
        if parameter in self._sums:
            self._sums[parameter].add_(parameter.grad)
        else:
            self._sums[parameter] = parameter.grad.float()
        parameter.grad = None

    def discard(self) -> None:
        """Forget the sums."""
        self._is_open = False
        self._sums.clear()

    def hand_back(self) -> None:
        """Put each sum, rounded once, where autograd would have left it."""
        self._is_open = False
        while self._sums:
            parameter, total = self._sums.popitem()
            # A parameter that ZeRO-3 has partitioned has no shape, and takes no gradient of its
            # real one but through `data`.
            parameter.grad = torch.empty_like(parameter)
            parameter.grad.data = total.to(parameter.dtype)
