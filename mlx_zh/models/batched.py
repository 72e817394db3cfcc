"""Several answers to each of many prompts, generated together.

A prompt is computed once, and its keys and values are copied into the slots of its answers. A finished answer leaves
its slot to the next one.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mlx_zh.models.drawing import draw
from mlx_zh.models.generate import Sampling
from mlx_zh.models.slot_cache import SlotCache, StateSlots
from mlx_zh.system import device

Report = Callable[[int], None]  # called with the number of tokens that were just generated


@dataclass(frozen=True)
class Question:
    """The tokens of a prompt, the seed of each answer to it, and the most tokens that an answer may have."""

    tokens: Sequence[int]
    seeds: Sequence[int]
    max_tokens: int


@dataclass
class Reply:
    """The tokens of an answer; one that the model ended has the end token last."""

    tokens: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"


@dataclass
class _Asked:
    """A question whose prompt is computed, and its answers. `logits` (1, V) are those of the first token."""

    number: int
    question: Question
    caches: list[Any]
    logits: mx.array
    unfinished: int
    begun: int = 0  # answers that have or had a slot
    replies: list[Reply] = field(default_factory=list)


@dataclass
class _Row:
    """The answer in a slot. `position` is that of the last drawn token, whose key is not in the slot yet."""

    asked: _Asked
    index: int
    position: int
    drawn: int = 1  # tokens drawn so far

    @property
    def reply(self) -> Reply:
        return self.asked.replies[self.index]

    @property
    def seed(self) -> int:
        return self.asked.question.seeds[self.index]

    @property
    def is_full(self) -> bool:
        return self.drawn >= self.asked.question.max_tokens


class BatchedGeneration:
    """Answers questions in up to `rows` slots. Where MLX computes on the CPU, the result does not depend on `rows`.

    On an accelerator, a product of other shape may round differently, so the shape stays the same to the end.
    """

    def __init__(
        self,
        model: nn.Module,
        ends: Collection[int],
        sampling: Sampling,
        *,
        rows: int,
        chunk: int = 512,
        report: Report = lambda _: None,
    ) -> None:
        self._model, self._ends, self._sampling = model, frozenset(ends), sampling
        self._chunk, self._report = chunk, report
        self._rows: list[_Row | None] = [None] * rows
        self._caches = [
            StateSlots(rows, len(cache.cache)) if isinstance(cache, ArraysCache) else SlotCache(rows)
            for cache in self._prompt_caches()
        ]
        self._tokens = mx.zeros((rows,), mx.uint32)  # the last drawn token of each slot
        self._waiting: deque[_Asked] = deque()  # computed questions with answers that have not begun

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, list[Reply]]]:
        """Yield the number of each question with its replies, as soon as all of these are finished."""
        ahead = deque(enumerate(questions))
        with _wired(self._model):
            self._enter(ahead)
            while any(row is not None for row in self._rows):
                drawn = self._tokens
                self._step()
                yield from self._take(drawn)
                self._enter(ahead)

    def _enter(self, ahead: deque[tuple[int, Question]]) -> None:
        """Give every free slot to the next answer."""
        while free := [slot for slot, row in enumerate(self._rows) if row is None]:
            if not self._waiting:
                if not ahead:
                    self._shrink()
                    return
                self._waiting.append(self._prefill(*ahead.popleft()))
            asked = self._waiting[0]
            self._begin(asked, free[: len(asked.question.seeds) - asked.begun])
            if asked.begun == len(asked.question.seeds):
                self._waiting.popleft()
                asked.caches = []

    def _prompt_caches(self) -> list[Any]:
        """mlx-lm's caches for one prompt; a layer with a window too keeps all keys, and the mask leaves some out."""
        caches = make_prompt_cache(self._model)
        return [cache if isinstance(cache, ArraysCache) else KVCache() for cache in caches]

    def _prefill(self, number: int, question: Question) -> _Asked:
        caches = self._prompt_caches()
        tokens = mx.array(list(question.tokens))[None]
        last = tokens.shape[1] - 1
        for start in range(0, last, self._chunk):
            self._model(tokens[:, start : min(start + self._chunk, last)], cache=caches)
            mx.eval([_arrays(cache) for cache in caches])
        logits = self._model(tokens[:, last:], cache=caches)[:, -1]
        return _Asked(number, question, caches, logits, len(question.seeds))

    def _begin(self, asked: _Asked, slots: Sequence[int]) -> None:
        question, size = asked.question, len(asked.question.tokens)
        seeds = question.seeds[asked.begun : asked.begun + len(slots)]
        logits = mx.broadcast_to(asked.logits, (len(slots), asked.logits.shape[-1]))
        tokens = draw(logits, self._sampling, seeds, [0] * len(slots)).astype(mx.uint32)
        self._tokens = mx.put_along_axis(self._tokens, mx.array(list(slots)), tokens, axis=0)
        for cache, prompt in zip(self._caches, asked.caches, strict=True):
            cache.fill(slots, *_arrays(prompt))
        mx.eval(self._tokens, [cache.state for cache in self._caches])
        for slot in slots:
            self._rows[slot] = _Row(asked, asked.begun, size)
            asked.replies.append(Reply())
            asked.begun += 1

    def _step(self) -> None:
        """Compute the last drawn token of every row, and begin to draw the next one."""
        rows = self._rows
        positions = [0 if row is None else row.position for row in rows]
        offset, length = mx.array(positions, mx.int32), max(positions) + 1
        for cache in self._caches:
            cache.reserve(length)
            if isinstance(cache, SlotCache):
                cache.offset, cache.length = offset, length
        logits = self._model(self._tokens[:, None], cache=self._caches)[:, -1]
        seeds = [0 if row is None else row.seed for row in rows]
        drawn = [0 if row is None else row.drawn for row in rows]
        self._tokens = draw(logits, self._sampling, seeds, drawn).astype(mx.uint32)
        mx.async_eval(self._tokens, [cache.state for cache in self._caches])

    def _take(self, drawn: mx.array) -> Iterator[tuple[int, list[Reply]]]:
        """Add the tokens `drawn` before the last step to their answers, and free the slots of finished ones."""
        active = 0
        for slot, (row, token) in enumerate(zip(self._rows, map(int, np.array(drawn)), strict=True)):
            if row is None:
                continue
            active += 1
            row.reply.tokens.append(token)
            if token in self._ends:
                row.reply.finish = "stop"
            elif not row.is_full:
                row.position += 1
                row.drawn += 1
                continue
            self._rows[slot] = None
            row.asked.unfinished -= 1
            if not row.asked.unfinished:
                yield row.asked.number, row.asked.replies
        self._report(active)

    def _shrink(self) -> None:
        """When no answer waits, drop free slots on a CPU, where the number of rows changes no product."""
        used = [slot for slot, row in enumerate(self._rows) if row is not None]
        if not device.is_cpu() or not 0 < 2 * len(used) <= len(self._rows):
            return
        self._rows = [self._rows[slot] for slot in used]
        self._tokens = self._tokens[mx.array(used)]
        for cache in self._caches:
            cache.keep(used)


def _arrays(cache: Any) -> list[mx.array]:
    """What a prompt left behind in a layer: a state, or keys and values."""
    return list(cache.cache) if isinstance(cache, ArraysCache) else list(cache.keys_and_values())


@contextlib.contextmanager
def _wired(model: nn.Module) -> Iterator[None]:
    from mlx_lm.generate import wired_limit

    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm's warning
            stack.enter_context(wired_limit(model))
        yield
