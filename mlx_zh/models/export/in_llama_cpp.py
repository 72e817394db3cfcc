"""The predictions of a GGUF file as llama.cpp computes them, where the package `llama_cpp` is installed.

On a CPU and with CUDA, llama.cpp rounds the activations to 8 bits too wherever the weights are Q8_0. The fidelity of
the weights alone does not show that.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_zh.core.packing import PackedBatch
from mlx_zh.models.export.fidelity import Distance, HeldOut, Predictions, distance

# Mean KL, in nats a token, that 8-bit activations add in small models; measured with llama.cpp on a CPU.
USUAL_KL = 0.005


def is_installed() -> bool:
    """Whether the package `llama_cpp` is there."""
    return find_spec("llama_cpp") is not None


def measure(path: Path, text: HeldOut, tuned: Predictions) -> Distance:
    """How far llama.cpp's predictions of a GGUF file are from `tuned` on `text`.

    Raises what the package raises: RuntimeError, ValueError or OSError for a file or a machine that it cannot use.
    """
    llama_cpp = import_module("llama_cpp")
    longest = max(len(segment) for row in text.rows for segment in row.segments)
    model = llama_cpp.Llama(str(path), n_ctx=longest, n_batch=longest, logits_all=True, verbose=False)
    try:
        return distance(tuned, _Compared(model, text.rows), text.targets)
    finally:
        model.close()


class _Compared:
    """The logits of llama.cpp before every scored token, computed row by row; the last row's are held."""

    def __init__(self, model: Any, rows: Sequence[PackedBatch]) -> None:
        self._model, self._rows = model, rows
        self._starts = [0, *accumulate(int(row.targets.size) for row in rows)]
        self._held: tuple[int, npt.NDArray[np.float32] | None] = (-1, None)

    def logits(self, start: int, stop: int) -> mx.array:
        """The logits of the scored tokens from `start` to `stop`: (stop - start, V), float32."""
        parts = []
        for index, (first, end) in enumerate(pairwise(self._starts)):
            if first < stop and start < end:
                parts.append(self._row(index)[max(start - first, 0) : stop - first])
        return mx.array(np.concatenate(parts))

    def _row(self, index: int) -> npt.NDArray[np.float32]:
        """The logits of one row's scored tokens (S, V). Its segments are roots, so each is a text of its own."""
        held, logits = self._held
        if held == index and logits is not None:
            return logits
        row = self._rows[index]
        tokens, scored = np.array(row.tokens), np.array(row.scored)
        parts = []
        for segment in row.segments:
            self._model.reset()
            self._model.eval(tokens[segment.start : segment.stop].tolist())
            own = scored[(scored >= segment.start) & (scored < segment.stop)]
            parts.append(np.array(self._model.scores[own - segment.start], np.float32))
        logits = np.concatenate(parts)
        self._held = (index, logits)
        return logits
