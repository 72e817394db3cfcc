"""Which examples make which step: a pure function of seed, epoch and index."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele et al., 2014), element by element: the same on every machine and version."""
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def stream(*words: int) -> np.uint64:
    """One 64-bit number that stands for a sequence of integers."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = mix(state ^ np.array([word & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return state[0]


@dataclass(frozen=True, slots=True)
class Order:
    """The examples of every step of a run over `size` examples.

    Every epoch visits every example once, in an order of its own; the last step of an epoch takes what is left,
    so it may be smaller than `batch_size`.
    """

    size: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps that one pass over the data takes."""
        return math.ceil(self.size / self.batch_size)

    def epoch(self, number: int) -> npt.NDArray[np.int64]:
        """The permutation (size,) of epoch `number`."""
        keys = mix(np.arange(self.size, dtype=np.uint64) ^ stream(self.seed, number))
        return np.argsort(keys, kind="stable")

    def steps(self, epochs: float, max_steps: int | None) -> int:
        """Steps of a run of `epochs`, or of `max_steps` where that is given."""
        return max_steps or math.ceil(epochs * self.steps_per_epoch - 1e-9)

    def visited(self, steps: int) -> npt.NDArray[np.int64]:
        """The examples that the first `steps` steps see, in rising order."""
        if steps >= self.steps_per_epoch:
            return np.arange(self.size)
        return np.sort(self.epoch(0)[: steps * self.batch_size])

    def step(self, number: int) -> npt.NDArray[np.int64]:
        """The examples of step `number`, counted from 0 over the whole run."""
        epoch, within = divmod(number, self.steps_per_epoch)
        start = within * self.batch_size
        return self.epoch(epoch)[start : start + self.batch_size]
