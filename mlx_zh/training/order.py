"""The examples of each step: a pure function of seed, epoch and index."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_zh.system.splitmix import mix64, stream


@dataclass(frozen=True, slots=True)
class Order:
    """The examples of every step of a run over `size` examples.

    Every epoch visits every example once, in its own order. The last step of an epoch takes the remaining examples,
    so it may have fewer than `batch_size`.
    """

    size: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the data."""
        return math.ceil(self.size / self.batch_size)

    def epoch(self, number: int) -> npt.NDArray[np.int64]:
        """The permutation (size,) of epoch `number`."""
        keys = mix64(np.arange(self.size, dtype=np.uint64) ^ stream(self.seed, number))
        return np.argsort(keys, kind="stable")

    def steps(self, epochs: float, max_steps: int | None) -> int:
        """Steps of a run of `epochs` epochs; `max_steps`, where it is given, takes precedence."""
        return max_steps or math.ceil(epochs * self.steps_per_epoch - 1e-9)

    def visited(self, steps: int) -> npt.NDArray[np.int64]:
        """The examples of the first `steps` steps, in ascending order."""
        if steps >= self.steps_per_epoch:
            return np.arange(self.size)
        return np.sort(self.epoch(0)[: steps * self.batch_size])

    def step(self, number: int) -> npt.NDArray[np.int64]:
        """The examples of step `number`, counted from 0 over the whole run."""
        epoch, within = divmod(number, self.steps_per_epoch)
        start = within * self.batch_size
        return self.epoch(epoch)[start : start + self.batch_size]
