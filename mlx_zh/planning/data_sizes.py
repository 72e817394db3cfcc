"""How many examples a recipe's data has and how long they are, before anything is downloaded or read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path

from mlx_zh.corpus.registry import Registry
from mlx_zh.planning.row_lengths import estimate_row_lengths
from mlx_zh.recipe import Select, Source, Sources
from mlx_zh.system.storage import visible_tree

_ROWS = 10_000  # assumed for a set that states no number
# Assumed for an example, a pair or a labelled answer of unknown length.
_TOKENS = {"sft": 200.0, "dpo": 700.0, "kto": 450.0}
_OF_PAIR = 2 / 3  # tokens of prompt and one answer, for a token of the pair
_BYTES_PER_TOKEN = 3.5  # of a folder's files in UTF-8, with their punctuation


@dataclass(frozen=True, slots=True)
class SourceSize:
    """Examples of a source with its `max_samples`, their mean length in tokens, and whether they were counted."""

    rows: int
    tokens: float
    counted: bool
    weight: float = 1.0
    stored: int = 0  # rows of the whole set, all of which are read
    raw: bool = False  # whether the rows are raw text, of which a long one becomes several examples


@dataclass(frozen=True, slots=True)
class DataSize:
    """The sizes of a stage's training sources, in the recipe's order."""

    sources: tuple[SourceSize, ...]
    mixing: str = "concat"

    @property
    def examples(self) -> float:
        """Training examples, weights applied, as `corpus.mixing.mix` takes them."""
        if self.mixing == "interleave":
            total = min((source.rows / source.weight for source in self.sources), default=0.0)
            return sum(min(total * source.weight, source.rows) for source in self.sources)
        return sum(source.rows * source.weight for source in self.sources)

    @property
    def rows(self) -> int:
        """Rows of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def tokens(self) -> float:
        """Mean length of an example in tokens."""
        total = sum(source.rows * source.weight for source in self.sources)
        return sum(s.rows * s.weight * s.tokens for s in self.sources) / total if total else 0.0

    @property
    def counted(self) -> bool:
        """Whether the number of rows of every source is known."""
        return all(source.counted for source in self.sources)


def data_size(
    sources: Sources, kind: str, registry: Registry, *, mixing: str, max_length: int, density: float = 1.0
) -> DataSize:
    """The size of a stage's data: local files are looked at, registered sets are not downloaded.

    `kind` is sft, dpo or kto, as `Recipe.kind` says. `density` is how many tokens the tokenizer makes of a text where
    Llama 3.1's makes one. Examples longer than `max_length` are counted as that long (pairs: one and a half times).
    """
    longest = 1.5 * max_length if kind == "dpo" else max_length
    sizes = (_source_size(source, kind, registry) for source in sources)
    return DataSize(tuple(_limited(size, size.tokens * density, longest) for size in sizes), mixing)


def _limited(size: SourceSize, tokens: float, longest: float) -> SourceSize:
    """The size with examples of `tokens` tokens in the mean, none longer than `longest`."""
    rows = round(size.rows * max(tokens / longest, 1)) if size.raw else size.rows
    return replace(size, rows=rows, tokens=min(tokens, longest))


def selected(size: DataSize, select: Select) -> DataSize:
    """The size after `select`: every source keeps its share of the rows, as far as is known before they are read."""
    wanted = size.rows * (select.fraction or 1.0)
    share = min(wanted, select.count or wanted) / size.rows if size.rows else 1.0
    sources = tuple(replace(source, rows=max(round(source.rows * share), 1)) for source in size.sources)
    return DataSize(sources, size.mixing)


def _source_size(source: Source, kind: str, registry: Registry) -> SourceSize:
    rows, tokens, counted, raw, pairs = _stored(source, kind, registry)
    stored = rows
    if kind == "kto" and pairs:  # each of them is two answers
        rows, tokens = 2 * rows, _OF_PAIR * tokens
    if source.max_samples is not None:
        rows, counted = min(rows, source.max_samples) if counted else source.max_samples, True
    return SourceSize(max(rows, 1), tokens, counted, source.weight, stored, raw)


def _stored(source: Source, kind: str, registry: Registry) -> tuple[int, float, bool, bool, bool]:
    """Rows, mean tokens, and whether the rows were counted, are raw text, are pairs; without `max_samples`."""
    path = None if source.path is None else Path(expanduser(source.path))
    if path is not None and path.exists():
        lengths = estimate_row_lengths(path, source.columns.values(), source.sheet) if path.is_file() else None
        if lengths is not None:
            raw = lengths.raw or "text" in source.columns
            return lengths.rows, lengths.tokens, True, raw, lengths.pairs or "chosen" in source.columns
        size = sum(
            file.stat().st_size for file in ([path] if path.is_file() else visible_tree(path)) if file.is_file()
        )
        return max(round(size / _BYTES_PER_TOKEN / _TOKENS[kind]), 1), _TOKENS[kind], False, False, False
    name = source.name or str(source.path)
    entry = registry.get(name)
    if entry is None:
        return _ROWS, _TOKENS[kind], False, False, False
    rows = entry.rows
    if entry.hub == "generated":  # made to measure: as many as are asked for
        rows = source.max_samples or rows or _ROWS
    tokens = float(entry.mean_tokens or _TOKENS["dpo" if entry.kind == "dpo" else kind])
    return rows or _ROWS, tokens, rows is not None, entry.format == "text", entry.kind == "dpo"
