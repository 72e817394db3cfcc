"""Answers under the prompts of other rows, from which KTO estimates its KL term."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.rendered import RenderedAnswer, RenderedPair
from mlx_zh.errors import DataError
from mlx_zh.training.order import Order

Ints = npt.NDArray[np.int64]


class MismatchedAnswers(Sequence[RenderedPair]):
    """Labelled answers, each as a pair: its prompt, its own response, and the response of another row.

    As a pair it has the form in which reference log-probs are computed and stored. Without `others`, for a loss that
    has no KL term, the other response is the first token of its own, which costs nothing. `max_length` cuts the other
    response, so that no mismatched row is longer than the data may be.
    """

    def __init__(self, answers: Sequence[RenderedAnswer], others: Ints | None, max_length: int) -> None:
        self._answers, self._others, self._max_length = answers, others, max_length

    def __len__(self) -> int:
        return len(self._answers)

    @overload
    def __getitem__(self, index: int) -> RenderedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[RenderedPair]: ...
    def __getitem__(self, index: int | slice) -> RenderedPair | list[RenderedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        own = self._answers[index]
        if self._others is None:
            return RenderedPair(own.prompt, own.response, own.response[:1])
        other = self._answers[int(self._others[index])].response
        return RenderedPair(own.prompt, own.response, other[: max(self._max_length - len(own.prompt), 1)])

    def __iter__(self) -> Iterator[RenderedPair]:
        return (self[i] for i in range(len(self)))

    def label(self, index: int) -> bool:
        """Whether answer number `index` is good."""
        return self._answers[index].label


def other_rows(answers: Sequence[RenderedAnswer], seed: int) -> Ints:
    """For each answer (N,), the row whose response is put under its prompt: a function of rows and seed alone.

    It is the row before it in the first epoch's order, so that in this epoch the other responses of a step are those
    of the step itself, moved on by one (TRL moves them within a batch). Rows with the same prompt are passed over.
    Raises DataError if all prompts are the same.
    """
    order = Order(len(answers), 1, seed).epoch(0)
    prompts = [hashlib.blake2b(answers[int(i)].prompt.tobytes(), digest_size=16).digest() for i in order]
    changes = [k for k in range(len(order)) if prompts[k] != prompts[k - 1]]
    if not changes:
        raise DataError(
            "dpo.loss kto compares every answer with answers to other prompts, but all rows have the same prompt; "
            "add rows with other prompts, or use dpo.loss: apo_zero_unpaired, which needs none"
        )
    others = np.empty(len(order), dtype=np.int64)
    before = 0
    for k in range(changes[0], changes[0] + len(order)):
        k %= len(order)
        before = k - 1 if prompts[k] != prompts[k - 1] else before
        others[order[k]] = order[before]
    return others
