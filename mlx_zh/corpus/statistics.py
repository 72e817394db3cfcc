"""Statistics of a prepared corpus: rows by source and reason, token lengths, tokens per Chinese character."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import IO, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.choosing import Choice, ExamRow
from mlx_zh.corpus.examples import AnySplit
from mlx_zh.corpus.quality.rules import RuleReport
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.rendered import (
    ANSWER_OVERFLOW,
    CHOSEN_OVERFLOW,
    FIRST_EXCHANGE_OVERFLOW,
    OVERFLOW,
    PROMPT_OVERFLOW,
    REJECTED_OVERFLOW,
)
from mlx_zh.corpus.scan import Scan
from mlx_zh.corpus.selection import SelectionReport
from mlx_zh.corpus.shards import CUT_SHORT
from mlx_zh.corpus.sources import DataSource, Item

BINS = 24  # of the histogram of lengths
_SAMPLED = 512  # rows on which tokens per Chinese character are measured
_SAMPLED_CHARACTERS = 2000  # of each of them
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]{2,}")
_TOO_LONG = (
    OVERFLOW,
    FIRST_EXCHANGE_OVERFLOW,
    PROMPT_OVERFLOW,
    CHOSEN_OVERFLOW,
    REJECTED_OVERFLOW,
    ANSWER_OVERFLOW,
    CUT_SHORT,
)
_BARS = "▁▂▃▄▅▆▇█"


class SourceReport(TypedDict):
    """What became of the rows of one source."""

    name: str
    files: list[str]
    format: str
    rows: int  # read
    train: int  # examples for training
    validation: int
    dropped: dict[str, int]  # reason -> rows left out
    cut_short: int  # rows shortened to max_length
    examples: dict[str, list[str]]  # reason -> the first few rows
    unused: list[str]  # columns that nothing reads
    placeholders: list[str]  # names said as {{name}}; looked for if the recipe has variables
    quality: NotRequired[dict[str, RuleReport]]  # by rule; older corpora have none


class Histogram(TypedDict):
    """`counts[i]` examples have a length between `edges[i]` and `edges[i + 1]` tokens."""

    edges: list[float]
    counts: list[int]


class LengthReport(TypedDict):
    """The examples of a split; lengths in tokens."""

    examples: int
    tokens: int
    scored_tokens: int  # tokens that the loss is over
    shortest: int
    median: int
    p95: int
    longest: int
    histogram: Histogram


class ExamCheck(TypedDict):
    """Which exams the rows were compared with."""

    exams: list[str]
    missing: dict[str, str]  # exam -> why its questions could not be had
    questions: int
    checked: NotRequired[int]  # questions long enough to be looked for; not there without questions


class RowReport(TypedDict):
    """What became of all rows of a corpus."""

    sources: list[SourceReport]
    exam_rows: list[ExamRow]
    train: LengthReport
    validation: LengthReport | None
    over_long: int  # rows longer than max_length, dropped or cut short
    over_long_share: float  # of all rows that were to be rendered
    selection: NotRequired[SelectionReport]  # if rows were selected


class CorpusReport(RowReport):
    """The report of a prepared corpus, `report` in its manifest."""

    exam_questions: ExamCheck
    tokens_per_chinese_character: float | None  # None without Chinese text


def describe(
    sources: Sequence[DataSource],
    scans: Sequence[Scan],
    choice: Choice,
    rendering: Mapping[int, Counter[str]],
    train: AnySplit,
    validation: AnySplit,
) -> RowReport:
    """The report of a corpus, as values that JSON can hold.

    `rendering` counts, for each source, the rows that were dropped or cut short while rendering, by reason.
    """
    source_reports: list[SourceReport] = []
    for i, (source, scan) in enumerate(zip(sources, scans, strict=True)):
        reasons = Counter(scan.report.dropped) + choice.dropped[i] + rendering.get(i, Counter())
        cut = reasons.pop(CUT_SHORT, 0)
        source_reports.append(
            {
                "name": source.name,
                "files": list(source.files),
                "format": scan.report.format,
                "rows": scan.report.rows,
                "train": int((train.sources == i).sum()),
                "validation": int((validation.sources == i).sum()),
                "dropped": dict(reasons),
                "cut_short": cut,
                "examples": dict(scan.report.examples) | choice.examples[i],
                "unused": scan.report.unused,
                "placeholders": scan.report.placeholders,
                "quality": scan.quality,
            }
        )
    over_long = sum(count for reasons in rendering.values() for name, count in reasons.items() if name in _TOO_LONG)
    return {
        "sources": source_reports,
        "exam_rows": choice.exam_rows,
        "train": _lengths(train),
        "validation": _lengths(validation) if len(validation) else None,
        "over_long": over_long,
        "over_long_share": over_long / max(choice.tried, 1),
    }


def _lengths(examples: AnySplit) -> LengthReport:
    lengths = examples.lengths
    edges = np.linspace(0, int(lengths.max()), BINS + 1)
    counts, _ = np.histogram(lengths, edges)
    return {
        "examples": len(examples),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "scored_tokens": int(examples.scored.sum(dtype=np.int64)),
        "shortest": int(lengths.min()),
        "median": int(np.median(lengths)),
        "p95": int(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "histogram": {"edges": [round(float(edge), 1) for edge in edges], "counts": counts.tolist()},
    }


def sparkline(counts: Sequence[int]) -> str:
    """A histogram in one line of text; a blank is an empty bin."""
    top = max([*counts, 1])
    return "".join(_BARS[min(int(count / top * len(_BARS)), len(_BARS) - 1)] if count else " " for count in counts)


def tokens_per_character(scans: Sequence[Scan], choice: Choice, renderer: Renderer) -> float | None:
    """Mean tokens per Chinese character with this tokenizer, over a sample of rows; None if they have no Chinese.

    Only runs of two or more Chinese characters count.
    """
    rows = choice.rendered()
    sample = rows[np.linspace(0, len(rows) - 1, min(_SAMPLED, len(rows))).astype(int)] if len(rows) else rows
    runs: list[str] = []
    loaded: tuple[int, int] | None = None
    items: list[Item] = []
    for row in sample.tolist():
        source = int(np.searchsorted(choice.starts, row, side="right")) - 1
        number = row - int(choice.starts[source])
        scan = scans[source]
        part = int(scan.parts_of(number))
        if loaded != (source, part):
            loaded, items = (source, part), scan.items(part)
        runs += _HAN.findall("\n".join(_texts(items[number - int(scan.parts[part])]))[:_SAMPLED_CHARACTERS])
    characters = sum(map(len, runs))
    return sum(renderer.lengths(runs)) / characters if characters else None


def _texts(item: Item) -> list[str]:
    from mlx_zh.corpus.conversation import Document

    if isinstance(item, Document):
        return [item.text]
    return [text for message in item.messages for text in message.texts if text]


def write_histogram(lengths: npt.NDArray[np.int32], file: IO[bytes], title: str) -> None:
    """Write a PNG of the distribution of token lengths (N,). Raises ImportError if matplotlib is not installed."""
    from matplotlib.figure import Figure  # not pyplot, which needs a window system and has global state

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=60, color="#3b6ea5")
    axes.set(title=title, xlabel="tokens", ylabel="examples")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=144)
