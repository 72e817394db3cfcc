"""Packed batches: a row of tokens cut into segments that form trees, and the planner that fills rows.

A token attends causally to its own segment and to all of that segment's ancestors, and to nothing else. Position ids
continue from the parent. So each branch gives the same result as it would alone, while tokens that several sequences
share (a prompt, a few-shot prefix) are computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Tokens = Sequence[int] | npt.NDArray[np.int32]
Mask = Sequence[bool] | npt.NDArray[np.bool_]


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


@dataclass(frozen=True)
class PackedBatch:
    """One row of T tokens in segments, of which S tokens are scored.

    `scored[i]` is the row position whose hidden state predicts `targets[i]`; for the first token of a branch it is
    the last position of its parent. `owner[i]` is the index of the sequence, of `num_sequences`, that the score
    belongs to.
    """

    tokens: mx.array  # (T,) int32
    segments: tuple[Segment, ...]
    scored: mx.array  # (S,) int32
    targets: mx.array  # (S,) int32
    owner: mx.array  # (S,) int32
    num_sequences: int

    @cached_property
    def starts(self) -> list[int]:
        """Row position of each segment's first token. Segments have no gaps between them."""
        return [segment.start for segment in self.segments]

    @cached_property
    def positions(self) -> mx.array:
        """Position ids, (T,) int32."""
        ids = [np.arange(s.position, s.position + len(s), dtype=np.int32) for s in self.segments]
        return _joined(ids)

    def ancestors(self, index: int) -> tuple[int, ...]:
        """Indices of the segments that segment `index` continues, from the root down."""
        ancestors: list[int] = []
        parent = self.segments[index].parent
        while parent is not None:
            ancestors.append(parent)
            parent = self.segments[parent].parent
        return tuple(reversed(ancestors))


class RowBuilder:
    """Collects segments and scored tokens, and builds a `PackedBatch` from them."""

    def __init__(self) -> None:
        self._tokens: list[npt.NDArray[np.int32]] = []
        self._segments: list[Segment] = []
        self._scored: list[npt.NDArray[np.int32]] = []
        self._targets: list[npt.NDArray[np.int32]] = []
        self._owner: list[npt.NDArray[np.int32]] = []
        self._length = 0

    def add(self, tokens: Tokens, parent: int | None = None) -> int:
        """Append a segment that continues segment `parent`; returns its index. Raises ValueError without tokens."""
        row = np.asarray(tokens, dtype=np.int32)
        if row.size == 0:
            raise ValueError("a segment needs at least one token")
        position = 0
        if parent is not None:
            parent_segment = self._segments[parent]
            position = parent_segment.position + len(parent_segment)
        self._segments.append(Segment(self._length, self._length + row.size, parent, position))
        self._tokens.append(row)
        self._length += row.size
        return len(self._segments) - 1

    def score(self, segment: int, mask: Sequence[bool] | npt.NDArray[np.bool_], owner: int) -> None:
        """Score the tokens of `segment` where `mask` is true, for sequence `owner`.

        The first token of a root is never scored, because no token before it predicts it.
        """
        part = self._segments[segment]
        offsets = np.flatnonzero(np.asarray(mask, dtype=bool)).astype(np.int32)
        predictors = part.start + offsets - 1  # row positions whose hidden states predict the scored tokens
        if offsets.size and offsets[0] == 0:
            if part.parent is None:
                offsets, predictors = offsets[1:], predictors[1:]
            else:
                predictors[0] = self._segments[part.parent].stop - 1
        self._scored.append(predictors)
        self._targets.append(self._tokens[segment][offsets])
        self._owner.append(np.full(offsets.size, owner, dtype=np.int32))

    def score_token(self, segment: int, target: int, owner: int) -> None:
        """Score `target` as the token that would follow the last token of `segment`, for sequence `owner`."""
        self._scored.append(np.array([self._segments[segment].stop - 1], dtype=np.int32))
        self._targets.append(np.array([target], dtype=np.int32))
        self._owner.append(np.array([owner], dtype=np.int32))

    def build(self, num_sequences: int) -> PackedBatch:
        """The finished row, whose owners are sequences 0 to `num_sequences` - 1."""
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
    examples: Iterable[tuple[Tokens, Mask] | tuple[Tokens, Mask, npt.NDArray[np.int32] | None]],
) -> PackedBatch:
    """Pack examples (tokens (n,), trained (n,)), each as a root of its own. Sequence i is example i.

    The tokens where `trained` is true are scored. An example that is a tree has segments (B, 2) as its third part:
    the first token of each, and its parent among them, -1 for the root, which comes first.
    """
    row = RowBuilder()
    count = 0
    for tokens, trained, *tree in examples:
        if not tree or tree[0] is None:
            row.score(row.add(tokens), trained, owner=count)
        else:
            _add_tree(row, tokens, trained, tree[0], owner=count)
        count += 1
    return row.build(count)


def _add_tree(row: RowBuilder, tokens: Tokens, trained: Mask, tree: npt.NDArray[np.int32], owner: int) -> None:
    """Add an example's segments, each after its parent."""
    indices: list[int] = []  # in the row
    starts = tree[:, 0].tolist()
    for start, stop, parent in zip(starts, [*starts[1:], len(tokens)], tree[:, 1].tolist(), strict=True):
        indices.append(row.add(tokens[start:stop], None if parent < 0 else indices[parent]))
        row.score(indices[-1], trained[start:stop], owner=owner)


def pack_pairs(pairs: Iterable[tuple[Tokens, Tokens, Tokens]]) -> PackedBatch:
    """Pack pairs (prompt, chosen, rejected), each as a root with two branches. Every response token is scored.

    The root holds the prompt and the common prefix of both responses, which is scored for both. Sequences are in the
    order chosen 0, rejected 0, chosen 1, ...; the scores of a sequence are in the order of its tokens.
    """
    row = RowBuilder()
    count = 0
    for prompt, chosen, rejected in pairs:
        shared = common_prefix_length(chosen, rejected)
        root = row.add(np.concatenate([prompt, chosen[:shared]])) if shared else row.add(prompt)
        in_response = np.arange(len(prompt) + shared) >= len(prompt)
        for response in (chosen, rejected):
            branch = row.add(response[shared:], parent=root)
            row.score(root, in_response, owner=count)
            row.score(branch, np.ones(len(response) - shared, dtype=bool), owner=count)
            count += 1
    return row.build(count)


def common_prefix_length(chosen: Tokens, rejected: Tokens) -> int:
    """Length in tokens of the longest common prefix of two responses.

    It is less than the length of either response, so that each keeps a branch of at least one token.
    """
    limit = min(len(chosen), len(rejected)) - 1
    differ = np.flatnonzero(np.asarray(chosen[:limit]) != np.asarray(rejected[:limit]))
    return int(differ[0]) if differ.size else max(limit, 0)


def pack_choices(prefix: Tokens, questions: Iterable[Tokens], choices: Sequence[int]) -> PackedBatch:
    """Pack questions as branches of one prefix. Each choice is one token, scored after every question.

    Sequence `q * len(choices) + c` is choice c of question q. With an empty prefix, each question is a root.
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
    """Distribute items over rows of at most `max_tokens` tokens by first-fit decreasing.

    Returns the indices of the items of each row. An item longer than `max_tokens` gets a row of its own. Items keep
    their order within a row, and rows are ordered by their first item. The result is deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    free: list[int] = []  # tokens that each row still has room for
    for item in order:
        for index, room in enumerate(free):
            if lengths[item] <= room:
                rows[index].append(item)
                free[index] -= lengths[item]
                break
        else:
            rows.append([item])
            free.append(max_tokens - lengths[item])
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])
