"""A pretended CUDA device: real numbers, computed on the CPU under the rules of CUDA.

A `CudaTensor` wraps a CPU tensor and reports a CUDA device. Each ATen operation on one

- is refused if CUDA would refuse it (a CPU tensor next to a CUDA tensor, unless it is a scalar, an
  index or one side of a copy);
- runs on the CPU and returns wrapped results;
- is counted as one kernel launch, unless it only makes a view;
- is recorded as a synchronisation, with its place in `pipeline/`, if the host would have to wait
  for the device.

`FakeCuda` is the context in which `device="cuda"` and `.to("cuda")` mean that device.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

import pipeline
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
}
_NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"),
    "_local_scalar_dense",
}


@dataclasses.dataclass
class Record:
    """Counts of everything that the device was asked to do, by name or by place."""

    launches: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    syncs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    @property
    def num_syncs(self) -> int:
        return sum(self.syncs.values())

    def sync(self, operation: str) -> None:
        self.syncs[f"{_place()}: {operation}"] += 1


# The device is one per process, as a real one is.
_record = Record()


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
        _refuse_mixed_devices(func, args, kwargs)
        plain_args, plain_kwargs = tree_map(_unwrap, args), tree_map(_unwrap, kwargs)
        target = kwargs.get("device")
        if target is not None:
            plain_kwargs["device"] = torch.device("cpu")
        kernel = VARLEN_KERNELS.get(func)
        out = (kernel or func)(*plain_args, **plain_kwargs)
        _count(func, args, kwargs)
        if target is not None and torch.device(target).type == "cpu":
            _record.sync(func.__name__)
            return out
        wrapped = tree_map(_wrap, out)
        if kernel is not None:
            return wrapped
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _unwrap(x: Any) -> Any:
    return x.inner if isinstance(x, CudaTensor) else x


def _wrap(x: Any) -> Any:
    return CudaTensor(x) if isinstance(x, Tensor) and not isinstance(x, CudaTensor) else x


def _refuse_mixed_devices(func: Any, args: Any, kwargs: Any) -> None:
    for x in tree_iter((args, kwargs)):
        if not isinstance(x, Tensor) or isinstance(x, CudaTensor):
            continue
        if x.dim() == 0 or func in _COPIES:
            continue
        if func in _INDEXING and x is not args[0]:
            _record.sync("index that lies on the host")
            continue
        raise WrongDeviceError(f"{func}: a CPU tensor {tuple(x.shape)} in {_place()}")


def _count(func: Any, args: Any, kwargs: Any) -> None:
    name = func.__name__.split(".")[0]
    if name in _WAITING:
        _record.sync(name)
    if func in _INDEXING and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        _record.sync("boolean index")
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        _record.sync("repeat_interleave without output_size")
    makes_view = any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in func._schema.returns
    )
    if not makes_view and name not in _NO_KERNEL:
        _record.launches[name] += 1


def _means_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


class _Factories(TorchDispatchMode):
    """Wrap what C++ code creates on the device of a wrapper, which is meta below."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        wrapped = any(isinstance(x, CudaTensor) for x in tree_iter((args, kwargs)))
        if not wrapped and device is not None and torch.device(device).type == "meta":
            kwargs["device"] = torch.device("cpu")
            _record.launches[func.__name__.split(".")[0]] += 1
            return tree_map(_wrap, func(*args, **kwargs))
        return func(*args, **kwargs)


class FakeCuda(TorchFunctionMode):
    """Context in which one CUDA device exists; yields the record of what it did."""

    def __enter__(self) -> Record:  # type: ignore[override]
        global _record
        _record = Record()
        self._factories = _Factories()
        self._factories.__enter__()
        super().__enter__()
        return _record

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._factories.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return _move(*args, **kwargs)
        if func is Tensor.cuda:
            return _move(args[0], CUDA)
        name = getattr(func, "__name__", "")
        # torch calls these of the wrapper's base class, which would look at the meta tensor.
        if name in ("tolist", "cpu") and args and isinstance(args[0], CudaTensor):
            return getattr(CudaTensor, name)(args[0])
        if kwargs.pop("pin_memory", False):
            args = tree_map(_unwrap, args)
        if _means_cuda(kwargs.get("device")):
            if any(isinstance(x, CudaTensor) for x in tree_iter(args)):
                del kwargs["device"]
                return func(*args, **kwargs)
            kwargs["device"] = "cpu"
            if func is not torch.tensor:
                _record.launches[name] += 1
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
        kwargs.pop("non_blocking", None)
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
