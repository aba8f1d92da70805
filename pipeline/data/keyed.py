"""Chance without state: keyed hashes and permutations that are functions of their inputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import IntArray


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


_STEP = np.uint64(0x9E3779B97F4A7C15)


def make_key(*parts: int) -> int:
    """One 64-bit key from several integers; every part and its place matter."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix(key * _STEP + np.uint64(part & 0xFFFFFFFFFFFFFFFF) + 1)
    return int(key[0])


def uniform(key: int, *parts: IntArray) -> NDArray[np.float64]:
    """Numbers from 0 up to 1, each a function of the key and of its own integers in `parts`.

    Args:
        key: from `make_key`.
        parts: arrays of one shape (N,), values 0 and above.

    Returns:
        (N,) multiples of 2**-53.
    """
    word = np.full(parts[0].shape, key, dtype=np.uint64)
    for part in parts:
        word = mix(word * _STEP + part.astype(np.uint64) + np.uint64(1))
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: IntArray, size: int, key: int) -> IntArray:
    """Map indices through a keyed bijection of 0..size-1 without storing it.

    A four-round Feistel network (Luby and Rackoff, 1988) on the smallest even number of bits that
    holds `size`, walked until it lands inside (Black and Rogaway, 2002).

    Args:
        index: any shape, values 0..size-1.
        size: number of elements permuted, at least 1.
        key: selects the permutation.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(make_key(key, number)) for number in range(4)]
    flat = np.asarray(index, dtype=np.uint64).ravel().copy()
    outside = np.arange(len(flat))
    while len(outside):
        left, right = flat[outside] >> half, flat[outside] & low
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & low)
        flat[outside] = (left << half) | right
        outside = outside[flat[outside] >= size]
    return flat.astype(np.int64).reshape(np.shape(index))
