"""Record every collective call of a rank over gloo, and check it by the rules of NCCL.

    Recorder()             wraps torch.distributed; made before DeepSpeed looks its functions up
    recorder.calls         one line per call, equal on all ranks: "cache: main all_reduce ..."
    recorder.faults        what NCCL would not take, or might hang in
    first_difference(...)  compares the calls of all ranks

gloo takes what NCCL does not: tensors with gaps, 16-bit integers, calls from several threads, and
two groups at work at the same time, in which ranks can wait for each other.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

OBJECTS = {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}
NAMES = {
    *OBJECTS,
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_coalesced"),
    *("all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier"),
    *("broadcast", "gather", "irecv", "isend", "monitored_barrier", "recv", "reduce"),
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "send"),
}
UNEVEN = {"all_to_all_single"}
NCCL_TYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
}
CONTROL = "control"


class Recorder:
    """Wraps the functions of torch.distributed in this process until `stop`.

    Set `phase` to name the part of the test that runs.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self.calls: list[str] = []
        self.faults: list[str] = []
        self._inside = threading.local()
        # By group: the number of the last call, and of the last one that is known to be done.
        self._last: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._replaced: list[tuple[Any, str, Any]] = []
        for module, name in itertools.product((dist, dist.distributed_c10d), sorted(NAMES)):
            if hasattr(module, name):
                real = getattr(module, name)
                self._replaced.append((module, name, real))
                setattr(module, name, self._wrap(name, real))

    def stop(self) -> None:
        """Put torch's own functions back."""
        for module, name, real in self._replaced:
            setattr(module, name, real)

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(real)

        @functools.wraps(real)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "depth", 0):  # some are made of others
                return real(*args, **kwargs)
            given = dict(signature.bind(*args, **kwargs).arguments)
            group, number = self._begin(name, given)
            self._inside.depth = 1
            try:
                work = real(*args, **kwargs)
            finally:
                self._inside.depth = 0
            if not given.get("async_op") and name not in ("isend", "irecv"):
                self._done[group] = number
                return work
            return _Work(work, lambda: self._finish(group, number))

        return recorded

    def _begin(self, name: str, given: dict[str, Any]) -> tuple[str, int]:
        """Note a call and its faults; return the name of its group and the call's number in it."""
        group = _name_of(given.get("group"))
        tensors = [] if name in OBJECTS else _tensors_in(list(given.values()))
        # Of uneven parts, every rank has its own sizes.
        shapes = [
            f"{str(x.dtype).removeprefix('torch.')}{'' if name in UNEVEN else list(x.shape)}"
            for x in tensors
        ]
        details = [f"{key}={given[key]}" for key in ("op", "src", "dst") if key in given]
        call = " ".join([f"{self.phase}: {group} {name}", *shapes, *details])
        self.calls.append(call)
        if threading.current_thread() is not threading.main_thread():
            self._fault(call, f"in thread {threading.current_thread().name}")
        if group == CONTROL:
            if any(x.device.type != "cpu" or x.numel() > 64 for x in tensors):
                self._fault(call, "tensors belong in the main group")
        else:
            self._check_main(call, name, group, tensors)
        self._last[group] = self._last.get(group, 0) + 1
        return group, self._last[group]

    def _check_main(self, call: str, name: str, group: str, tensors: list[torch.Tensor]) -> None:
        """Check a call by the rules for groups that are NCCL's on GPUs."""
        # DeepSpeed uses its own barriers while it starts.
        if name in OBJECTS or (name == "barrier" and not _called_by_deepspeed()):
            self._fault(call, "belongs in the control group")
        for other in self._last.keys() - {group, CONTROL}:
            if self._done.get(other, 0) < self._last[other]:
                self._fault(call, f"while {other} is at work")
        for x in tensors:
            if not x.is_contiguous():
                self._fault(call, f"strides {x.stride()}")
            if x.dtype not in NCCL_TYPES:
                self._fault(call, f"NCCL has no {x.dtype}")

    def _finish(self, group: str, number: int) -> None:
        # A group's calls are done in their order, so this one's end is the end of those before.
        self._done[group] = max(self._done.get(group, 0), number)

    def _fault(self, call: str, fault: str) -> None:
        self.faults.append(f"{call}: {fault}")


class _Work:
    """A call that is not waited for yet."""

    def __init__(self, work: Any, finish: Callable[[], None]) -> None:
        self._work, self._finish = work, finish

    def wait(self, *args: Any) -> Any:
        result = self._work.wait(*args)
        self._finish()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _name_of(group: Any) -> str:
    if group is None or group is dist.group.WORLD:
        return "main"
    return CONTROL if group.group_desc == CONTROL else f"group {group.group_name}"


def timeouts() -> dict[str, float]:
    """Return the seconds that each group of this process waits in a call."""
    groups = dist.distributed_c10d._world.pg_map
    return {
        _name_of(group): group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group in groups
    }


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in _tensors_in(item)] if isinstance(value, list) else []


def _called_by_deepspeed() -> bool:
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if "/deepspeed/" in frame.f_code.co_filename:
            return True
    return False


def first_difference(ranks: Sequence[Sequence[str]]) -> str:
    """Describe the first call that is not the same on all ranks; empty without one."""
    for number, calls in enumerate(itertools.zip_longest(*ranks, fillvalue="(none)")):
        if len(set(calls)) > 1:
            before = ranks[0][max(0, number - 3) : number]
            return "\n".join([*before, *(f"rank {r}: {call}" for r, call in enumerate(calls))])
    return ""
