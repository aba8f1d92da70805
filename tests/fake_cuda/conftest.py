from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import comm
from tests.benchmarks.bench_support import tiny_qwen2
from tests.fake_cuda import streams
from tests.fake_cuda.fake_cuda import CUDA, NCCL_TYPES, CudaTensor


@pytest.fixture
def on_fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package compute on the pretended device; collectives refuse what NCCL refuses."""

    def checked(name: str) -> Callable[..., Any]:
        real = getattr(comm, name)

        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            assert isinstance(x, CudaTensor), f"{name} of a CPU tensor"
            assert x.inner.is_contiguous(), f"{name} of a tensor that is not contiguous"
            assert x.dtype in NCCL_TYPES, f"{name} of {x.dtype}"
            return real(x, *args, **kwargs)

        return call

    monkeypatch.setattr(comm, "device", lambda: CUDA)
    for name in ("all_reduce_", "all_gather_rows", "all_gather_stack", "broadcast_", "reduce_"):
        monkeypatch.setattr(comm, name, checked(name))
    streams.install(monkeypatch)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose heads are as wide as the kernels require."""
    folder = tmp_path_factory.mktemp("qwen2")
    return tiny_qwen2(folder, hidden_size=64, num_layers=2, vocab_size=300)
