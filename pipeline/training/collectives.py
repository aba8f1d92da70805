"""Gather ZeRO-3's parameters, and add up and reduce gradients, without DeepSpeed's hooks.

    hold, prefetch            a large parameter: gathered in place
                              several small ones: into one buffer, then copied out of it
    backward ... backward     fp32 sums (`GradientSums`), whole on this rank
    reduce(parameters)        rounded once, reduced over ranks; this rank keeps its share
    finish()                  the same for what is left; DeepSpeed's optimizer has all shares

So the peak of a gather is the whole parameters and one buffer (`buffer_bytes`), whatever the size
of the model. DeepSpeed's hooks would gather with every module, and reduce after every backward.
They are removed; its code to reduce, to partition and to accumulate is used unchanged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline import comm

# Estimated: a call in which every rank sends less takes as long as one in which it sends this much.
_SHARE_BYTES = 2 * 2**20


def buffer_bytes(world_size: int) -> int:
    """Return the most bytes that a gather needs in addition to the parameters it makes whole."""
    return world_size * _SHARE_BYTES if world_size > 1 else 0


class Gathering:
    """The parameters that are whole at present, and the gathers that are under way.

    Persistent parameters, which DeepSpeed keeps whole, are left alone. Without ZeRO-3 there is
    nothing to gather.
    """

    def __init__(self) -> None:
        self._under_way: deque[Any] = deque()

    @contextmanager
    def hold(self, parameters: Iterable[Any]) -> Iterator[None]:
        """Keep parameters whole until the context ends; a collective call."""
        # One that is whole already belongs to an outer context.
        gathered = [p for p in _partitioned(parameters) if p.ds_status.name != "AVAILABLE"]
        # hpZ's second copy outlives a step for frozen parameters only. Copies and partitions belong
        # to different groups of ranks, which must not be at work at the same time, nor in one call:
        # DeepSpeed gathers all of a call as it does the first.
        for copied in (False, True):
            for piece in _pieces(p for p in gathered if _has_copy(p) == copied):
                self._under_way.append(piece[0].all_gather_coalesced(piece))
                # The next gather runs while this piece is copied out of its buffer.
                while len(self._under_way) > 1:
                    self._under_way.popleft().wait()
            # Also for what `prefetch` started: it is in no piece, but this context releases it.
            self._wait()
        try:
            yield
        finally:
            self._release(gathered)

    def prefetch(self, parameters: Iterable[Any]) -> None:
        """Start to gather what the next `hold` asks for, without waiting; a collective call.

        Not hpZ's copies: within a node they arrive fast enough, and their group must not be at work
        at the same time as that of the reduction.
        """
        for piece in _pieces(p for p in _partitioned(parameters) if not _has_copy(p)):
            self._under_way.append(piece[0].all_gather_coalesced(piece))

    def discard(self, parameters: Iterable[Any]) -> None:
        """Release what was prefetched and is not needed any more."""
        self._wait()
        self._release(p for p in _partitioned(parameters) if p.ds_status.name == "AVAILABLE")

    def _wait(self) -> None:
        while self._under_way:
            self._under_way.popleft().wait()

    def _release(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            if not parameter.ds_persist:
                parameter.partition()


def _partitioned(parameters: Iterable[Any]) -> list[Any]:
    return [parameter for parameter in parameters if hasattr(parameter, "ds_id")]


def _has_copy(parameter: Any) -> bool:
    """Return true where hpZ keeps the parameter a second time, divided over a node's ranks."""
    return parameter.ds_secondary_tensor is not None


def _pieces(parameters: Iterable[Any]) -> Iterator[list[Any]]:
    """Divide the parameters that are neither whole nor under way into groups of one call each."""
    missing = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
    bound = buffer_bytes(comm.world_size())
    if not bound:  # on one rank nothing is copied
        yield from [missing] if missing else []
        return
    small: list[Any] = []
    size_of_small = 0
    for parameter in missing:
        size = parameter.ds_numel * parameter.element_size()
        if size >= bound:
            yield [parameter]
            continue
        if size_of_small + size > bound:  # so `small` is not empty
            yield small
            small, size_of_small = [], 0
        small.append(parameter)
        size_of_small += size
    if small:
        yield small


# DeepSpeed's number of the micro-step before a step's first, which is 0 and overwrites offloaded
# gradients; later ones would add to them.
_BEFORE_FIRST_REDUCTION = -1


class Reduction:
    """The gradients of one step after another, up to DeepSpeed's optimizer.

    Args:
        zero: DeepSpeed's optimizer of ZeRO stage 1, 2 or 3.
        stage: its stage.
    """

    def __init__(self, zero: Any, stage: int) -> None:
        self._zero, self._stage = zero, stage
        groups = zero.fp16_groups if stage == 3 else zero.bit16_groups
        # In the order of the optimizer; the number is that of the parameter's group.
        self._group_of = {p: i for i, group in enumerate(groups) for p in group if p.requires_grad}
        self._reduced: set[Any] = set()
        self._sums = GradientSums(self._group_of)
        for hook in zero._grad_acc_hooks:
            hook.remove()

    def open(self) -> None:
        """Begin a step."""
        self._sums.open()

    def reduce(self, parameters: Iterable[Any]) -> None:
        """Reduce the complete gradients of these parameters; a collective call.

        On a GPU that DeepSpeed gives a stream for it (`overlap_comm`, which stage 3 has by
        default), the reduction overlaps later computing.
        """
        parameters = self._fill_bucket(parameters)
        zero = self._zero
        if not parameters:
            return
        if self._stage == 3:
            for dtype in zero.ipg_buckets:
                # Python's name of a private method: the public one that sends a bucket before it is
                # full also ends the step.
                zero._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
            return
        zero.reduce_ipg_grads()
        for bucket in zero.ipg_buckets.values():
            if zero.overlap_comm and zero.contiguous_gradients:
                bucket.index = 1 - bucket.index  # this buffer may still be sent
        # Stage 1 would keep every gradient whole until the update; what is still sent must stay.
        if self._stage == 1 and not zero.overlap_comm:
            for parameter in parameters:
                if not zero.is_param_in_current_partition[zero.get_param_id(parameter)]:
                    parameter.grad = None

    def fill(self, parameters: Iterable[Any]) -> None:
        """Give trainable parameters a gradient of zeros where they have none."""
        for parameter in parameters:
            if parameter not in self._group_of or parameter in self._reduced:
                continue
            self._sums.hand_back(parameter)
            if parameter.grad is None:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                _set_gradient(parameter, parameter.new_zeros(shape))

    def finish(self) -> None:
        """Reduce what is left, and hand everything to the optimizer; a collective call."""
        if self._stage < 3:
            # The epilogue reads buckets even where no parameter has a gradient.
            self._zero.setup_buckets()
        else:
            # Not at the other stages, where a reduced gradient stays in `grad`.
            late = [p for p in self._reduced if p.grad is not None]
            assert not late, "a gradient came after its reduction, and would be lost"
        self._fill_bucket(self._group_of)
        assert self._sums.is_empty, "a gradient came after its reduction, and would be lost"
        self._zero.overlapping_partition_gradients_reduce_epilogue()
        self._sums.close()
        self._reduced.clear()

    def discard(self) -> None:
        """Drop the gradients of a step that will not be finished."""
        zero = self._zero
        self._sums.close()
        self._reduced.clear()
        for parameter in self._group_of:
            parameter.grad = None
        zero.reset_cpu_buffers()  # of offloaded gradients
        if self._stage < 3:  # stage 3 overwrites its shares in the next step, these would add up
            zero._release_ipg_buffers()
            zero.averaged_gradients.clear()
            zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
            zero.micro_step_id = _BEFORE_FIRST_REDUCTION

    def _fill_bucket(self, parameters: Iterable[Any]) -> list[Any]:
        """Move gradients into DeepSpeed's bucket, which is sent whenever it is full; return whose.

        All ranks fill it in the same order.
        """
        zero, moved = self._zero, []
        for parameter in parameters:
            group = self._group_of.get(parameter)
            if group is None or parameter in self._reduced:  # frozen, or already there
                continue
            self._sums.hand_back(parameter)
            if parameter.grad is None:
                continue
            if self._stage == 3:
                zero.reduce_ready_partitions_and_remove_grads(parameter)
            else:
                zero.setup_buckets()
                zero.reduce_ready_partitions_and_remove_grads(parameter, group)
            moved.append(parameter)
        self._reduced.update(moved)
        return moved


class GradientSums:
    """Adds up in fp32 every gradient that autograd leaves in a low-precision parameter.

    autograd adds into `.grad` in the parameter's type. In bfloat16 a sum keeps 8 bits: after a
    hundred chunks most of a chunk's contribution is lost, and the number of chunks would change the
    gradient.

    Costs 4 bytes per element of those parameters from their first gradient to `hand_back`.

    Args:
        parameters: the trainable parameters; fp32 ones are left to autograd.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._is_open = False
        for parameter in parameters:
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def open(self) -> None:
        """Take every gradient from now on."""
        self._is_open = True

    def close(self) -> None:
        """Drop the sums, and take no more gradients."""
        self._is_open = False
        self._sums.clear()

    @property
    def is_empty(self) -> bool:
        """True if every sum was handed back."""
        return not self._sums

    def hand_back(self, parameter: torch.nn.Parameter) -> None:
        """Put a parameter's sum, rounded once, where autograd would have left it."""
        total = self._sums.pop(parameter, None)
        if total is None:
            return
        _set_gradient(parameter, total.to(parameter.dtype))

    def _take(self, parameter: torch.Tensor) -> None:
        if not self._is_open or parameter.grad is None:
            return
        assert isinstance(parameter, torch.nn.Parameter)
        if parameter in self._sums:
            self._sums[parameter].add_(parameter.grad)
        else:
            self._sums[parameter] = parameter.grad.float()
        parameter.grad = None


def _set_gradient(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    # A parameter that ZeRO-3 has partitioned has no shape: a gradient of its full shape can only be
    # set through `data`.
    parameter.grad = torch.empty_like(parameter)
    parameter.grad.data = gradient
