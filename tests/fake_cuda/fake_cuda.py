"""A pretended CUDA device: real numbers, computed on the CPU under the rules of CUDA.

A `CudaTensor` wraps a CPU tensor and reports a CUDA device. Each ATen operation on one

- is refused if CUDA would refuse it (a CPU tensor next to a CUDA tensor, unless it is a scalar, an
  index or one side of a copy);
- runs on the CPU and returns wrapped results;
- is counted as one kernel launch, unless it only makes a view;
- is recorded as a synchronisation, with its place in `pipeline/`, if the host would have to wait
  for the device. Copies to the device wait too unless they are `non_blocking`: torch synchronises
  the stream after each (`memcpy_and_sync`), also after `torch.tensor(..., device="cuda")`;
- draws random numbers from a generator of the device, not from the CPU's.

`FakeCuda` is the context in which `device="cuda"` and `.to("cuda")` mean that device, and
`torch.cuda` and `torch.distributed` answer for it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pipeline
from tests.fake_cuda import streams
from tests.fake_cuda.varlen import VARLEN_KERNELS

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_PACKAGE = str(Path(pipeline.__file__).parent)

_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
# Operations whose result's size or value must be known on the host.
_WAITING = {
    *("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
    "isin",  # by `unique` where there are many
}
_NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"),
    *("_local_scalar_dense", "_unsafe_view", "_reshape_alias", "lift_fresh"),
}


@dataclasses.dataclass
class Record:
    """Counts of everything that the device was asked to do, by name or by place.

    Attributes:
        launches: kernels by name of the operation.
        syncs: waits of the host by place and operation.
        hot_syncs: the same, inside a block that must not wait, by the block's name too.
        collectives: names of the collective calls, in order.
    """

    launches: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    syncs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    hot_syncs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    collectives: list[str] = dataclasses.field(default_factory=list)
    _hot: str = ""

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    @property
    def num_syncs(self) -> int:
        return sum(self.syncs.values())

    def sync(self, operation: str) -> None:
        """Count a wait of the host."""
        found = f"{_place()}: {operation}"
        self.syncs[found] += 1
        if self._hot:
            self.hot_syncs[f"{self._hot}, {found}"] += 1

    @contextlib.contextmanager
    def never_waits(self, name: str) -> Iterator[None]:
        """Context of work in which the host must not wait for the device."""
        before, self._hot = self._hot, name
        try:
            yield
        finally:
            self._hot = before


# The device is one per process, as a real one is.
_record = Record()


class _Generator:
    """The device's random numbers: a separate state instead of the CPU generator's."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(0).get_state()

    def seed(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(before)


_generator = _Generator()
_NOTHING = contextlib.nullcontext()
_RANDOM_FACTORIES = {"rand", "randn", "randint", "randperm", "normal"}


def _place() -> str:
    """Return `file:line` of the innermost frame inside the package."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return f"{frame.f_code.co_filename[len(_PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


class WrongDeviceError(RuntimeError):
    """CUDA would say: expected all tensors to be on the same device."""


class CudaTensor(Tensor):
    """A CPU tensor in the role of a CUDA tensor; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Any:
        assert not isinstance(inner, CudaTensor)
        # The device below is meta, because a wrapper needs one that this build of torch has.
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
            requires_grad=requires_grad,
        )
        wrapper.inner = inner.detach()
        return wrapper

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.inner})"

    def tolist(self) -> Any:
        _record.sync("tolist")
        return self.inner.tolist()

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        _record.sync("cpu")
        return self.inner.clone()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a CUDA tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        facts = _facts(func)
        _refuse_mixed_devices(func, args, kwargs)
        plain_args, plain_kwargs = _map(_unwrap, args), _map(_unwrap, kwargs)
        target = kwargs.get("device")
        if target is not None:
            plain_kwargs["device"] = torch.device("cpu")
        with _generator.drawing() if facts.is_random else _NOTHING:
            out = (facts.kernel or func)(*plain_args, **plain_kwargs)
        _count(func, facts, args, kwargs)
        if target is not None and torch.device(target).type == "cpu":
            _record.sync(func.__name__)
            return out
        if not facts.written:
            return _map(_wrap, out)
        # An operation in place returns the tensors that it was given.
        given = [kwargs[w] if isinstance(w, str) else args[w] for w in facts.written]
        return given[0] if len(given) == 1 else tuple(given)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """Facts about an operation before it is called."""

    name: str
    kernel: Any  # its computation, if the CPU has none
    is_random: bool
    makes_view: bool
    written: tuple[int | str, ...]  # arguments that it changes and returns


@functools.cache
def _facts(func: Any) -> _Facts:
    schema = func._schema
    written: list[int | str] = []
    for result in schema.returns:
        if result.alias_info is not None and result.alias_info.is_write:
            for place, argument in enumerate(schema.arguments):
                alias = argument.alias_info
                if alias is not None and alias.before_set == result.alias_info.before_set:
                    written.append(argument.name if argument.kwarg_only else place)
    return _Facts(
        name=func.__name__.split(".")[0],
        kernel=VARLEN_KERNELS.get(func),
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        makes_view=any(
            result.alias_info is not None and not result.alias_info.is_write
            for result in schema.returns
        ),
        written=tuple(written),
    )


def _unwrap(x: Any) -> Any:
    return x.inner if isinstance(x, CudaTensor) else x


def _wrap(x: Any) -> Any:
    return CudaTensor(x) if isinstance(x, Tensor) and not isinstance(x, CudaTensor) else x


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to all leaves; several times as fast as `torch.utils._pytree`."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_map(function, x) for x in value])
    if kind is dict:
        return {name: _map(function, x) for name, x in value.items()}
    return function(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Find all tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for x in value:
            yield from _tensors(x)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _refuse_mixed_devices(func: Any, args: Any, kwargs: Any) -> None:
    for x in _tensors((args, kwargs)):
        if isinstance(x, CudaTensor):
            continue
        if x.dim() == 0 or func in _COPIES:
            continue
        if func in _INDEXING and x is not args[0]:
            _record.sync("index that lies on the host")
            continue
        raise WrongDeviceError(f"{func}: a CPU tensor {tuple(x.shape)} in {_place()}")


def _count(func: Any, facts: _Facts, args: Any, kwargs: Any) -> None:
    name = facts.name
    if name in _WAITING:
        _record.sync(name)
    # One number at a boolean index is `masked_fill`.
    fills = len(args) > 2 and isinstance(args[2], Tensor) and args[2].dim() == 0
    if (
        func in _INDEXING
        and not fills
        and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    ):
        _record.sync("boolean index")
    if func is _aten.copy_.default and isinstance(args[0], CudaTensor) != isinstance(
        args[1], CudaTensor
    ):
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if args[1].dim() > 0 and not non_blocking:
            _record.sync("copy_ between host and device without non_blocking")
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        _record.sync("repeat_interleave without output_size")
    if not facts.makes_view and name not in _NO_KERNEL:
        _record.launches[name] += 1


def _dropout_arguments(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool]:
    assert not inplace
    return x, p, training


def _count_item_of_host(index: Any) -> None:
    """Count `x[index] = number`: where tensors index, the number is copied to the device first."""
    indices = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, Tensor) and i.dtype not in (torch.bool, torch.uint8) for i in indices):
        _record.sync("a number of the host at an index")


def _means(device: Any, kind: str) -> bool:
    if isinstance(device, torch.device):
        return device.type == kind
    return isinstance(device, str) and device.partition(":")[0] == kind


def _means_cuda(device: Any) -> bool:
    return _means(device, "cuda")


class _Factories(TorchDispatchMode):
    """Wrap what C++ code creates on the device of a wrapper, which is meta below."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = False

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Context of a call that asks for the meta device itself."""
        before, self._passes = self._passes, True
        try:
            yield
        finally:
            self._passes = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        wrapped = any(isinstance(x, CudaTensor) for x in _tensors((args, kwargs)))
        if self._passes or wrapped or device is None:
            return func(*args, **kwargs)
        if torch.device(device).type == "meta":
            kwargs["device"] = torch.device("cpu")
            _record.launches[func.__name__.split(".")[0]] += 1
            return _map(_wrap, func(*args, **kwargs))
        return func(*args, **kwargs)


# Types that NCCL can send.
NCCL_TYPES = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int8, torch.uint8, torch.int32, torch.int64),
}


def _checked(name: str) -> Callable[..., Any]:
    """Return a collective of torch that refuses what NCCL refuses, and computes by gloo.

    A group that is named is one for control, which uses gloo even with NCCL and takes CPU tensors.
    """
    real = getattr(dist, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors((args, kwargs)))
        if "group" not in kwargs:
            for x in tensors:
                assert isinstance(x, CudaTensor), f"{name} of a CPU tensor in {_place()}"
                assert x.inner.is_contiguous(), f"{name} of strided {x.shape} in {_place()}"
                assert x.dtype in NCCL_TYPES, f"{name} of {x.dtype} in {_place()}"
            assert len({x.dtype for x in tensors}) == 1, f"{name} of several types in {_place()}"
        _record.collectives.append(name)
        return real(*_map(_unwrap, args), **_map(_unwrap, kwargs))

    return call


_COLLECTIVES = {
    name: _checked(name)
    for name in (
        *("all_reduce", "all_gather", "broadcast", "reduce", "all_gather_into_tensor"),
        *("reduce_scatter_tensor", "all_to_all_single"),
    )
}


def _rng_state(*_: Any) -> Tensor:
    return _generator.state.clone()


def _set_rng_state(state: Tensor, *_: Any) -> None:
    _generator.state = state.clone()


# Queries of product code and of torch itself about a GPU.
_CUDA_MODULE: dict[str, Any] = {
    "_initialized": True,
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda *_: None,
    "device": lambda *_: contextlib.nullcontext(),
    "synchronize": lambda *_: _record.sync("synchronize"),
    "empty_cache": lambda: None,
    "mem_get_info": lambda *_: (60 * 2**30, 80 * 2**30),
    "memory_allocated": lambda *_: 2**30,
    "max_memory_allocated": lambda *_: 2 * 2**30,
    "max_memory_reserved": lambda *_: 3 * 2**30,
    "reset_peak_memory_stats": lambda *_: None,
    "get_device_name": lambda *_: "pretended GPU",
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: mock.Mock(
        total_memory=80 * 2**30, multi_processor_count=132
    ),
    "get_rng_state": _rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": _generator.seed,
    "manual_seed_all": _generator.seed,
}


_real_backward = torch.autograd.graph._engine_run_backward


class FakeCuda(TorchFunctionMode):
    """Context in which one CUDA device exists; yields the record of what it did."""

    def __enter__(self) -> Record:  # type: ignore[override]
        global _record
        _record = Record()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(torch.cuda, **_CUDA_MODULE))
            streams.install(stack.enter_context(pytest.MonkeyPatch.context()))
            for name, checked in _COLLECTIVES.items():
                stack.enter_context(mock.patch.object(dist, name, checked))
            # torch leaves the context while it handles `backward`.
            stack.enter_context(
                mock.patch.object(torch.autograd, "_engine_run_backward", self._run_backward)
            )
            self._factories = stack.enter_context(_Factories())
            self._stack = stack.pop_all()
        super().__enter__()
        return _record

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """Run a backward inside the context: checkpointed layers run forward again in it."""
        super().__enter__()
        try:
            return _real_backward(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(_means(device, "meta") for device in (*args, kwargs.get("device"))):
            with self._factories.passing():
                return func(*args, **kwargs)
        if func is Tensor.to:
            return _move(*args, **kwargs)
        if func is Tensor.cuda:
            return _move(args[0], CUDA)
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], CudaTensor):
            if func is Tensor.get_device:
                return 0
            if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
                _count_item_of_host(args[1])
        if name == "dropout" and args and isinstance(args[0], CudaTensor):
            x, p, training = _dropout_arguments(*args, **kwargs)
            # One kernel on a GPU, three operations on a CPU.
            return torch.native_dropout(x, p, True)[0] if training and p > 0 else x
        # torch calls these of the wrapper's base class, which would look at the meta tensor.
        if name in ("tolist", "cpu") and args and isinstance(args[0], CudaTensor):
            return getattr(CudaTensor, name)(args[0])
        if kwargs.pop("pin_memory", False):
            args = _map(_unwrap, args)
        if _means_cuda(kwargs.get("device")):
            if any(isinstance(x, CudaTensor) for x in _tensors(args)):
                del kwargs["device"]
                return func(*args, **kwargs)
            kwargs["device"] = "cpu"
            if func in (torch.tensor, torch.as_tensor):
                _record.sync(f"{name} of host numbers")
            else:
                _record.launches[name] += 1
            random = name in _RANDOM_FACTORIES
            with _generator.drawing() if random else _NOTHING:
                return CudaTensor(func(*args, **kwargs))
        return func(*args, **kwargs)


def _move(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do what `Tensor.to` does, with one CUDA device."""
    target, rest = kwargs.pop("device", None), []
    for argument in args:
        if isinstance(argument, str | torch.device):
            target = argument
        elif isinstance(argument, Tensor):
            target, kwargs["dtype"] = argument.device, argument.dtype
        else:
            rest.append(argument)
    if target is None or (_means_cuda(target) and isinstance(x, CudaTensor)):
        return x.to(*rest, **kwargs) if rest or "dtype" in kwargs else x
    if _means_cuda(target):
        if not kwargs.pop("non_blocking", False):
            _record.sync("to(cuda) without non_blocking")
        return CudaTensor(Tensor.to(x.clone(), *rest, **kwargs))
    if isinstance(x, CudaTensor):
        _record.sync("to(cpu)")
        x = x.inner.clone()
    return Tensor.to(x, target, *rest, **kwargs)


def to_cuda(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Move a module's parameters and buffers to the device, in place.

    Args:
        module: any module.
        dtype: of the parameters; buffers keep theirs, as DeepSpeed keeps them.
    """
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                data = parameter.data if dtype is None else parameter.data.to(dtype)
                child._parameters[name] = nn.Parameter(
                    CudaTensor(data.clone()), requires_grad=parameter.requires_grad
                )
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = CudaTensor(buffer.clone())
    return module
