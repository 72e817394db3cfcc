"""Instruction-following difficulty (IFD): how much its question helps a reply (arXiv 2308.12032, equation 3).

IFD is the loss of the reply after its question, over the loss of the reply alone. Both come from one packed tree: the
conversation is one branch, and each of its replies alone is another, after the header with which every reply begins.
A small model orders rows much as a large one does (arXiv 2402.00530).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.logprobs import sequence_logprobs
from mlx_zh.core.packing import PackedBatch, RowBuilder, plan_rows
from mlx_zh.errors import ModelError
from mlx_zh.system.accelerator import accelerator_errors
from mlx_zh.training.stored_values import StoredValues, Values

Ints = npt.NDArray[np.int32]
WIDTH = 2  # values of a row: minus the log-prob of its replies after their questions, and alone
_BLOCK = 256  # rows that are packed together; what they give is written to disk at once


@dataclass(frozen=True, slots=True)
class Replies:
    """A conversation's tokens (T,) and the spans of its replies (R, 2); `opening` stands before a reply alone."""

    tokens: Ints
    spans: npt.NDArray[np.int64]
    opening: Ints

    @staticmethod
    def of(tokens: Ints, trained: npt.NDArray[np.bool_], opening: Sequence[int]) -> Replies | None:
        """The replies that are `trained` (T,); None if nothing of them can be scored both ways."""
        edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        if not len(opening):
            edges[:, 0] += 1  # nothing stands before a reply alone, so its first token cannot be scored
        elif len(edges) and edges[0, 0] == 0:
            edges = edges[1:]  # nothing stands before it in the conversation either
        edges = edges[edges[:, 0] < edges[:, 1]]
        if not len(edges):
            return None
        return Replies(np.asarray(tokens, np.int32), edges, np.asarray(opening, np.int32))

    @property
    def shared(self) -> int:
        """How many tokens the conversation and a reply alone begin with in common, before the first reply."""
        limit = min(len(self.opening), int(self.spans[0, 0]), len(self.tokens) - 1)
        differ = np.flatnonzero(self.opening[:limit] != self.tokens[:limit])
        return int(differ[0]) if len(differ) else limit

    @property
    def size(self) -> int:
        """Tokens of the tree."""
        alone = (len(self.opening) - self.shared) * len(self.spans) + int(np.diff(self.spans).sum())
        return len(self.tokens) + alone + len(self.spans) * (not len(self.opening))

    def digest(self) -> str:
        """A digest of everything that the values depend on apart from the model, 32 hex digits."""
        digest = hashlib.blake2b(digest_size=16)
        for values in (self.tokens, self.spans, self.opening):
            digest.update(struct.pack("<q", values.size))
            digest.update(np.ascontiguousarray(values, dtype="<i4").tobytes())
        return digest.hexdigest()


def pack_replies(rows: Sequence[Replies]) -> PackedBatch:
    """Pack rows into trees. Sequence 2i is the replies of row i after their questions, 2i + 1 the same alone."""
    builder = RowBuilder()
    for number, row in enumerate(rows):
        shared = row.shared
        root = builder.add(row.tokens[:shared]) if shared else None
        asked = np.zeros(len(row.tokens) - shared, dtype=bool)
        for start, stop in row.spans - shared:
            asked[start:stop] = True
        builder.score(builder.add(row.tokens[shared:], parent=root), asked, owner=2 * number)
        for start, stop in row.spans:
            # Without an opening, the token before the span is the reply's own first one.
            before = row.opening[shared:] if len(row.opening) else row.tokens[start - 1 : start]
            alone = np.concatenate([before, row.tokens[start:stop]])
            scored = np.arange(len(alone)) >= len(before)
            builder.score(builder.add(alone, parent=root), scored, owner=2 * number + 1)
    return builder.build(2 * len(rows))


def losses(model: nn.Module, rows: Sequence[Replies], chunk: int | None = None) -> Values:
    """Minus the log-probs of each row's replies after their questions, and alone: (N, 2). Forward only."""
    with accelerator_errors():
        values = -sequence_logprobs(model, pack_replies(rows), chunk=chunk)
        return np.array(values, np.float32).reshape(-1, WIDTH)


def ifd(values: Values) -> Values:
    """The IFD of each row (N,), of its two losses (N, 2); NaN where they are not known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(values[:, 0] / values[:, 1], np.float32)


class IfdScores:
    """The losses of rows under a model, from its file or computed."""

    def __init__(self, store: StoredValues) -> None:
        self._store = store
        self._entries = store.read()

    def missing(self, rows: Sequence[Replies | None]) -> list[Replies]:
        """The rows whose losses are not in the file, each once."""
        by_digest = {row.digest(): row for row in rows if row is not None}
        return [row for digest, row in by_digest.items() if digest not in self._entries]

    def compute(
        self, model: nn.Module, rows: Sequence[Replies], *, row_tokens: int, chunk: int | None = None
    ) -> Iterator[int]:
        """Compute the losses of `rows` and store them, block by block; yields the tokens of each packed row.

        Raises ModelError when a loss is NaN or infinite, AcceleratorError; what earlier blocks gave is kept.
        """
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            entries: dict[str, Values] = {}
            for members in plan_rows([row.size for row in block], row_tokens):
                values = losses(model, [block[m] for m in members], chunk)
                if not np.isfinite(values).all():
                    raise ModelError(
                        "the losses of the model that scores rows are not finite (NaN or infinity): set "
                        "model.dtype: bfloat16, or another data.sft.select.model."
                    )
                entries |= {block[m].digest(): value for m, value in zip(members, values, strict=True)}
                yield sum(block[m].size for m in members)
            self._store.append(entries)
            self._entries |= entries

    def ifd(self, rows: Sequence[Replies | None]) -> Values:
        """The IFD of each row (N,); NaN for one that cannot be scored or is not computed yet."""
        unknown = np.full(WIDTH, np.nan, np.float32)
        values = [unknown if row is None else self._entries.get(row.digest(), unknown) for row in rows]
        return ifd(np.stack(values)) if values else np.empty(0, np.float32)
