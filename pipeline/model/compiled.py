"""Fuse the element-wise operations of layers by torch's compiler.

    layer   norm, projections, rotary positions | attention | projection, norm, feed-forward
            compiled                              as it is    compiled

All layers of a kind share their graphs, and a graph serves any number of tokens. There are a few
for each kind: with and without gradients, and for a chunk of one token.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AttentionInterface

from pipeline.errors import UserError
from pipeline.model.attention import PACKED, packed_attention

# Dropout draws from torch's generators, so that its masks are those of a run without compilation.
_OPTIONS = {"fallback_random": True}
# Beyond so many graphs of one function torch runs it as it is. Its default of 8 is too few for
# models that alternate two kinds of layers.
_MOST_GRAPHS = 32


def require_compiler(*, on_gpu: bool) -> None:
    """Check that this machine has what torch's compiler needs.

    Raises:
        UserError: there is no C++ compiler, or on a GPU no Triton or C compiler.
    """
    compilers = ("CC", "gcc", "clang", "cc") if on_gpu else ("CXX", "g++")
    chosen = os.environ.get(compilers[0])
    missing = None
    if on_gpu and find_spec("triton") is None:
        missing = "the package triton"
    elif not any(shutil.which(name) for name in (chosen, *compilers[1:]) if name):
        missing = "a C compiler (gcc)" if on_gpu else "a C++ compiler (g++)"
    if missing:
        raise UserError(
            f"compile: true, but this machine lacks {missing}",
            fix=f"install {missing.removeprefix('the package ')}, or set compile: false",
        )


def compile_layers(encoder: Any, *, backend: str = "inductor") -> str:
    """Have the layers of an encoder compiled when they first run; return a line for the log.

    Names, parameters and saved files stay as they are.

    Args:
        encoder: its layers are changed in place.
        backend: of `torch.compile`.
    """
    # Its number of rows is another in every chunk, and its kernels are written by hand.
    as_it_is = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(PACKED, as_it_is)
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    options = _OPTIONS if backend == "inductor" else None
    for layer in encoder.layers:
        layer.compile(backend=backend, dynamic=True, options=options)
    kinds = sorted({type(layer).__name__ for layer in encoder.layers})
    return f"compile: {len(encoder.layers)} layers of {', '.join(kinds)}, without their attention"


def num_graphs() -> int:
    """Return how many graphs this process has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
