"""SplitMix64 (Steele et al., 2014): pseudo-random numbers that are equal on every machine and in every version."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: Words) -> Words:
    """SplitMix64's finalizer for each element; the shape stays."""
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def stream(*words: int) -> np.uint64:
    """One 64-bit hash of a sequence of integers."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = mix64(state ^ np.array([word & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return state[0]
