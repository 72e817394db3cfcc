"""Packed batches: one row of tokens, cut into segments that form trees, and the planners that fill rows.

A token attends to its own segment causally and to all of that segment's ancestors, and to nothing else; position
ids continue from the parent. So a branch sees exactly what it would have seen alone, and what several sequences
share (a prompt, a few-shot prefix) is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Tokens = Sequence[int] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens in a row.

    `start` and `stop` are row positions, `parent` the index of the segment it continues (None for a root), and
    `position` the position id of its first token.
    """

    start: int
    stop: int
    parent: int | None
    position: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One row of T tokens in segments, and the S positions of it that are scored.

    `scored[i]` is the row position whose hidden state predicts `targets[i]`: for the first token of a branch that
    is the last position of its parent. `owner[i]` says which of the `num_sequences` sequences the score belongs to.
    """

    tokens: mx.array  # (T,) int32
    segments: tuple[Segment, ...]
    scored: mx.array  # (S,) int32
    targets: mx.array  # (S,) int32
    owner: mx.array  # (S,) int32
    num_sequences: int

    @property
    def starts(self) -> list[int]:
        """Row position of each segment's first token; segments follow one another without gaps."""
        return [segment.start for segment in self.segments]

    @property
    def positions(self) -> mx.array:
        """Position ids, (T,) int32."""
        ids = [np.arange(s.position, s.position + len(s), dtype=np.int32) for s in self.segments]
        return _joined(ids)

    def ancestors(self, index: int) -> tuple[int, ...]:
        """The segments that segment `index` continues, from the root down."""
        line: list[int] = []
        parent = self.segments[index].parent
        while parent is not None:
            line.append(parent)
            parent = self.segments[parent].parent
        return tuple(reversed(line))


class RowBuilder:
    """Collects segments and scored tokens, and makes the `PackedBatch`."""

    def __init__(self) -> None:
        self._tokens: list[npt.NDArray[np.int32]] = []
        self._segments: list[Segment] = []
        self._scored: list[npt.NDArray[np.int32]] = []
        self._targets: list[npt.NDArray[np.int32]] = []
        self._owner: list[npt.NDArray[np.int32]] = []
        self._length = 0

    def add(self, tokens: Tokens, parent: int | None = None) -> int:
        """Append a segment of at least one token that continues `parent`; returns its index."""
        row = np.asarray(tokens, dtype=np.int32)
        if row.size == 0:
            raise ValueError("a segment needs at least one token")
        position = 0
        if parent is not None:
            above = self._segments[parent]
            position = above.position + len(above)
        self._segments.append(Segment(self._length, self._length + row.size, parent, position))
        self._tokens.append(row)
        self._length += row.size
        return len(self._segments) - 1

    def score(self, segment: int, mask: Sequence[bool] | npt.NDArray[np.bool_], owner: int) -> None:
        """Score the tokens of `segment` where `mask` is true, for sequence `owner`.

        The first token of a root has nothing before it and cannot be scored.
        """
        part = self._segments[segment]
        offsets = np.flatnonzero(np.asarray(mask, dtype=bool)).astype(np.int32)
        before = part.start + offsets - 1
        if offsets.size and offsets[0] == 0:
            if part.parent is None:
                offsets, before = offsets[1:], before[1:]
            else:
                before[0] = self._segments[part.parent].stop - 1
        self._scored.append(before)
        self._targets.append(self._tokens[segment][offsets])
        self._owner.append(np.full(offsets.size, owner, dtype=np.int32))

    def score_token(self, segment: int, target: int, owner: int) -> None:
        """Score `target` as the token that would follow the last one of `segment`."""
        self._scored.append(np.array([self._segments[segment].stop - 1], dtype=np.int32))
        self._targets.append(np.array([target], dtype=np.int32))
        self._owner.append(np.array([owner], dtype=np.int32))

    def build(self, num_sequences: int) -> PackedBatch:
        """The finished row."""
        return PackedBatch(
            tokens=_joined(self._tokens),
            segments=tuple(self._segments),
            scored=_joined(self._scored),
            targets=_joined(self._targets),
            owner=_joined(self._owner),
            num_sequences=num_sequences,
        )


def _joined(parts: list[npt.NDArray[np.int32]]) -> mx.array:
    return mx.array(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32))


def pack_conversations(
    examples: Iterable[tuple[Tokens, Sequence[bool] | npt.NDArray[np.bool_]]],
) -> PackedBatch:
    """Pack (tokens (T,), trained (T,)) examples, one root each; sequence i is example i."""
    row = RowBuilder()
    count = 0
    for tokens, trained in examples:
        row.score(row.add(tokens), trained, owner=count)
        count += 1
    return row.build(count)


def pack_pairs(pairs: Iterable[tuple[Tokens, Tokens, Tokens]]) -> PackedBatch:
    """Pack (prompt, chosen, rejected) pairs, each a root with two branches; every response token is scored.

    The root is the prompt and what both responses begin with (`shared_beginning`), which is scored for both.
    Sequences are in the order chosen 0, rejected 0, chosen 1, ...; the scores of a sequence are in its own order.
    """
    row = RowBuilder()
    count = 0
    for prompt, chosen, rejected in pairs:
        shared = shared_beginning(chosen, rejected)
        root = row.add(np.concatenate([prompt, chosen[:shared]])) if shared else row.add(prompt)
        both = np.arange(len(prompt) + shared) >= len(prompt)
        for response in (chosen, rejected):
            branch = row.add(response[shared:], parent=root)
            row.score(root, both, owner=count)
            row.score(branch, np.ones(len(response) - shared, dtype=bool), owner=count)
            count += 1
    return row.build(count)


def shared_beginning(chosen: Tokens, rejected: Tokens) -> int:
    """How many tokens two responses begin with in common; less than either has, so that both keep a branch."""
    most = min(len(chosen), len(rejected)) - 1
    differ = np.flatnonzero(np.asarray(chosen[:most]) != np.asarray(rejected[:most]))
    return int(differ[0]) if differ.size else max(most, 0)


def pack_choices(prefix: Tokens, questions: Iterable[Tokens], choices: Sequence[int]) -> PackedBatch:
    """Pack questions that share a prefix, each a branch, scored on every single-token choice after it.

    Sequence `q * len(choices) + c` is choice c of question q; a prefix of no tokens makes each question a root.
    """
    row = RowBuilder()
    root = row.add(prefix) if len(prefix) else None
    count = 0
    for question in questions:
        branch = row.add(question, parent=root)
        for choice in choices:
            row.score_token(branch, choice, owner=count)
            count += 1
    return row.build(count)


def plan_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Distribute items over rows of at most `max_tokens` tokens: first-fit decreasing, deterministic.

    An item longer than `max_tokens` gets a row of its own. Within a row, items keep their order; rows are ordered
    by their first item. Returns the indices of each row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    room: list[int] = []
    for item in order:
        for index, left in enumerate(room):
            if lengths[item] <= left:
                rows[index].append(item)
                room[index] -= lengths[item]
                break
        else:
            rows.append([item])
            room.append(max_tokens - lengths[item])
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])
