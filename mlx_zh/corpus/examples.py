"""Rendered examples on disk: memory-mapped Arrow files, read as NumPy views, one example at a time."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlx_zh.corpus.rendered import Rendered, RenderedAnswer, RenderedPair
from mlx_zh.system.digests import value_digest

Ints = npt.NDArray[np.int32]
Example = TypeVar("Example", Rendered, RenderedPair, RenderedAnswer)

_LIST = pa.list_(pa.int32())
SFT_SCHEMA = pa.schema(
    {
        "tokens": _LIST,
        "trained": _LIST,  # spans of trained tokens: start, end, start, end …
        "scored": pa.int32(),  # number of trained tokens without the first token, which nothing predicts
        "truncated": pa.bool_(),
        "source": pa.int32(),
        "row": pa.int32(),  # number of the row among the usable rows of the source
        "segments": _LIST,  # of a tree: first token, parent, first token, parent …; empty if there is only one
    }
)
DPO_SCHEMA = pa.schema({"prompt": _LIST, "chosen": _LIST, "rejected": _LIST, "source": pa.int32(), "row": pa.int32()})
KTO_SCHEMA = pa.schema(
    {"prompt": _LIST, "response": _LIST, "label": pa.bool_(), "source": pa.int32(), "row": pa.int32()}
)
SCHEMAS = {"sft": SFT_SCHEMA, "dpo": DPO_SCHEMA, "kto": KTO_SCHEMA}


@dataclass(frozen=True)
class _Lists:
    """A column of lists in F record batches, as views."""

    values: tuple[Ints, ...]  # for each batch: all values
    offsets: tuple[Ints, ...]  # for each batch: where each list begins, and the end of the last

    def row(self, file: int, index: int) -> Ints:
        offsets = self.offsets[file]
        return self.values[file][offsets[index] : offsets[index + 1]]

    def lengths(self) -> Ints:
        return np.concatenate([np.diff(offsets) for offsets in self.offsets])


class Shards:
    """The Arrow files of a prepared corpus, memory-mapped. Opening them reads no rows."""

    def __init__(self, paths: Sequence[Path]) -> None:
        tables = []
        for path in paths:
            with pa.memory_map(str(path)) as source:
                tables.append(pa.ipc.open_stream(source).read_all())
        self._batches = [batch for table in tables for batch in table.to_batches()]
        self.starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in self._batches])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, positions: npt.NDArray[np.int64]) -> pa.Table:
        """The rows at `positions`, copied."""
        file = np.searchsorted(self.starts, positions, side="right") - 1
        parts = [batch.take(pa.array(positions[file == i] - self.starts[i])) for i, batch in enumerate(self._batches)]
        return pa.Table.from_batches(parts)

    def lists(self, name: str) -> _Lists:
        """The column `name`, whose values are lists; empty ones in files of earlier versions that lack it."""
        columns = [batch.column(name) if name in batch.schema.names else None for batch in self._batches]
        none = np.empty(0, dtype=np.int32)
        return _Lists(
            tuple(none if column is None else _view(column.values) for column in columns),
            tuple(
                np.zeros(batch.num_rows + 1, dtype=np.int32) if column is None else _view(column.offsets)
                for batch, column in zip(self._batches, columns, strict=True)
            ),
        )

    def numbers(self, name: str) -> Ints:
        """The column `name` of numbers or booleans, for all rows (N,), as int32."""
        columns = [_view(batch.column(name)) for batch in self._batches]
        return np.concatenate([*columns, np.empty(0, dtype=np.int32)])


def _view(column: pa.Array) -> Ints:
    """An Arrow column as an array (N,). Arrow's own conversion would import Pandas, which takes a second."""
    data = column.buffers()[-1]
    if data is None:
        return np.empty(0, dtype=np.int32)
    first, last = column.offset, column.offset + len(column)
    if pa.types.is_boolean(column.type):
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=last, bitorder="little")
        return bits[first:].astype(np.int32)
    return np.frombuffer(data, dtype=np.int32)[first:last]


def positions_of(rows: npt.NDArray[np.int64], rendered: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The positions of the chosen rows in the files: none of a row that was dropped, several of a long document.

    `rendered` (R,) holds the row number at each position, in rising order.
    """
    first, last = np.searchsorted(rendered, rows, "left"), np.searchsorted(rendered, rows, "right")
    counts = last - first
    before = np.cumsum(counts) - counts  # positions of the rows before each row
    positions: npt.NDArray[np.int64] = np.repeat(first - before, counts) + np.arange(counts.sum())
    return positions


class Examples(Sequence[Example], Generic[Example]):
    """The examples of a split, in the order in which they were mixed. `rows` (N,): the row of each in the files."""

    texts = 1  # of the columns, how many hold tokens; they come first

    def __init__(self, shards: Shards, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> None:
        self.rows = rows
        self._starts = shards.starts
        self._file = np.searchsorted(shards.starts, rows, side="right").astype(np.int32) - 1
        self._index = (rows - shards.starts[self._file]).astype(np.int32)
        self._columns = [shards.lists(name) for name in columns]
        self.sources = shards.numbers("source")[rows]  # (N,) index of the source of each example

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.example(i) for i in range(*index.indices(len(self)))]
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        return self.example(number % len(self))

    def __iter__(self) -> Iterator[Example]:
        return (self.example(i) for i in range(len(self)))

    def example(self, index: int) -> Example:
        """The example number `index`; its token arrays are views of the files."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 of the examples in their order, 64 hex digits; it does not depend on how they lie in files."""
        digest = hashlib.sha256(self.sources.astype("<i4").tobytes())
        for index in range(len(self)):
            for values in self._digested(index):
                digest.update(len(values).to_bytes(8, "little"))
                digest.update(values.astype("<i4", copy=False).tobytes())
        return digest.hexdigest()

    def batches(self) -> Iterator[tuple[int, list[tuple[Ints, Ints]]]]:
        """For each record batch, also with rows of other splits: the number of its first row, and for each column of
        tokens all values and where each row begins (R + 1,)."""
        for number, first in enumerate(self._starts[:-1].tolist()):
            yield first, [(column.values[number], column.offsets[number]) for column in self._columns[: self.texts]]

    def _digested(self, index: int) -> list[Ints]:
        """The lists of an example that its digest is over."""
        return self._lists(index)

    def _lists(self, index: int) -> list[Ints]:
        return [column.row(int(self._file[index]), int(self._index[index])) for column in self._columns]


class Conversations(Examples[Rendered]):
    """Rendered conversations."""

    def __init__(self, shards: Shards, rows: npt.NDArray[np.int64]) -> None:
        super().__init__(shards, rows, ("tokens", "trained", "segments"))
        self.lengths: Ints = self._columns[0].lengths()[rows]  # (N,) tokens
        self.scored: Ints = shards.numbers("scored")[rows]  # (N,) tokens whose loss is scored
        self.replies: Ints = self.scored  # (N,) tokens that are learned
        self.truncated: Ints = shards.numbers("truncated")[rows]  # (N,) 1: turns were cut from its end

    def example(self, index: int) -> Rendered:
        """The conversation number `index`."""
        tokens, spans, segments = self._lists(index)
        trained = np.zeros(len(tokens), dtype=bool)
        for start, end in spans.reshape(-1, 2):
            trained[start:end] = True
        return Rendered(
            tokens, trained, bool(self.truncated[index]), segments.reshape(-1, 2) if len(segments) else None
        )

    def _digested(self, index: int) -> list[Ints]:
        """The lists without the segments of an example that is no tree, as before there were trees."""
        lists = self._lists(index)
        return lists if len(lists[-1]) else lists[:-1]


class Pairs(Examples[RenderedPair]):
    """Rendered preference pairs."""

    texts = 3

    def __init__(self, shards: Shards, rows: npt.NDArray[np.int64]) -> None:
        super().__init__(shards, rows, ("prompt", "chosen", "rejected"))
        prompt, chosen, rejected = (column.lengths()[rows] for column in self._columns)
        self.lengths: Ints = prompt + chosen + rejected  # (N,) tokens; both responses share one prompt
        self.scored: Ints = chosen + rejected  # (N,) tokens whose log-probs are summed
        self.replies: Ints = chosen  # (N,) tokens that are preferred

    def example(self, index: int) -> RenderedPair:
        """The pair number `index`."""
        return RenderedPair(*self._lists(index))


class Answers(Examples[RenderedAnswer]):
    """Rendered labelled answers."""

    texts = 2

    def __init__(self, shards: Shards, rows: npt.NDArray[np.int64]) -> None:
        super().__init__(shards, rows, ("prompt", "response"))
        prompt, response = (column.lengths()[rows] for column in self._columns)
        self.lengths: Ints = prompt + response  # (N,) tokens
        self.scored: Ints = response  # (N,) tokens whose log-probs are summed
        self.replies: Ints = response
        self.labels: Ints = shards.numbers("label")[rows]  # (N,) 1: the answer is good

    def example(self, index: int) -> RenderedAnswer:
        """The answer number `index`."""
        prompt, response = self._lists(index)
        return RenderedAnswer(prompt, response, bool(self.labels[index]))

    def _digested(self, index: int) -> list[Ints]:
        return [*self._lists(index), self.labels[index : index + 1]]


AnySplit = Conversations | Pairs | Answers
OPENED: dict[str, type[Conversations] | type[Pairs] | type[Answers]] = {
    "sft": Conversations,
    "dpo": Pairs,
    "kto": Answers,
}


def content_digest(splits: Mapping[str, AnySplit]) -> str:
    """SHA-256 of the examples of all splits, 64 hex digits."""
    return value_digest({split: examples.digest() for split, examples in splits.items()})
