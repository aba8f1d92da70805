"""What a vector depends on, as 16 bytes and as work: the same for the plan and for the store.

Letters: N texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import Template
from pipeline.errors import UserError
from pipeline.evaluation.tasks.texts import Role

# Characters of a token, at the dense end of what the benchmarks hold (mathematics 3.0, prose 4.3).
_BYTES_PER_TOKEN = 3.5
# Length at which attention costs as much as all else in a 7 B model with 28 layers of width 3584:
# 2 x parameters / (4 x layers x width).
_ATTENTION_TOKENS = 35_000
# What a template may add to a text, in bytes; tokens never outnumber bytes.
_TEMPLATE_BYTES = 128


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextKey:
    """What a vector depends on, beside the model."""

    role: Role
    instruction: str
    max_length: int
    text: str


def byte_sizes(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """(N,) bytes of each text; no text is touched."""
    return np.diff(_offsets(texts))


def effective_lengths(
    instruction: str, sizes_N: NDArray[np.int64], wanted: int, lengths: Sequence[int]
) -> NDArray[np.int32]:
    """(N,) the smallest length at which a text that is not cut at `wanted` is not cut either.

    A text that fits 512 tokens has the same vector at 32768, so both lengths share it. Tokens are
    bounded by bytes: no tokenizer is asked.

    Args:
        sizes_N: bytes of each text.
        lengths: all lengths of the evaluation, ascending.
    """
    bounds_N = sizes_N + len(instruction.encode()) + _TEMPLATE_BYTES
    choices = np.array([*lengths, np.iinfo(np.int32).max], dtype=np.int32)
    found_N = choices[np.searchsorted(choices, bounds_N)]
    return np.minimum(found_N, np.int32(wanted))


def require_short(template: Template, *, model: str) -> None:
    """Check that a template adds no more than `effective_lengths` allows for.

    Raises:
        UserError: it adds more: texts of two lengths that are cut differently would share a vector.
    """
    for role in ("query", "document"):
        frame = getattr(template, role).replace("{text}", "").replace("{instruction}", "")
        added = len(frame.encode())
        if added > _TEMPLATE_BYTES:
            raise UserError(
                f"{model}: the template of a {role} adds {added} bytes to a text",
                allowed=f"{_TEMPLATE_BYTES} where texts share vectors",
                fix="score this model with `diffembed evaluate run`, or shorten its template",
            )


def costs(
    instruction: str, sizes_N: NDArray[np.int64], lengths_N: NDArray[np.int32]
) -> NDArray[np.float64]:
    """(N,) work to embed each text, in tokens of a short text."""
    tokens_N = (sizes_N + len(instruction.encode())) / _BYTES_PER_TOKEN + 1
    tokens_N = np.minimum(tokens_N, lengths_N)
    return tokens_N * (1 + tokens_N / _ATTENTION_TOKENS)


def digests(
    role: Role, instruction: str, texts: pa.LargeStringArray, lengths_N: NDArray[np.int32]
) -> NDArray[np.uint64]:
    """(N, 2) 16 bytes that stand for role, instruction, length and text."""
    starts = {
        int(length): hashlib.sha256(f"{role}\0{instruction}\0{length}\0".encode())
        for length in np.unique(lengths_N)
    }
    bounds, data = _offsets(texts).tolist(), memoryview(texts.buffers()[2] or b"")
    found = bytearray()
    for row, length in enumerate(lengths_N.tolist()):
        digest = starts[length].copy()
        digest.update(data[bounds[row] : bounds[row + 1]])
        found += digest.digest()[:16]
    return np.frombuffer(bytes(found), dtype=np.uint64).reshape(-1, 2)


def _offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """(N + 1,) where each text begins in the array's bytes."""
    offsets: NDArray[np.int64] = np.frombuffer(texts.buffers()[1], dtype=np.int64)
    return offsets[texts.offset : texts.offset + len(texts) + 1]
