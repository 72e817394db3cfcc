"""The selection of training rows in a corpus: the candidates with what the methods need of them, and its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.choosing import NOT_SELECTED, Choice, ChoiceSettings
from mlx_zh.corpus.clusters import Sides, clusters
from mlx_zh.corpus.conversation import Conversation, Preference, with_system
from mlx_zh.corpus.examples import Conversations, Pairs, Shards, positions_of
from mlx_zh.corpus.scan import Scan, sides_of
from mlx_zh.corpus.selecting import SCORES, Candidates, Floats, Indices, SelectSettings, ordered, quotas
from mlx_zh.corpus.shards import Chosen, RenderSettings, chosen_batches, take_rows
from mlx_zh.corpus.sources import DataSource, Item

NOT_SCORED = "no IFD: raw text, or no reply that fits"
NO_HELP = "question does not help the reply (IFD of 1 or more)"
_BINS = 24
_SHOWN = 3  # rows from the top, the middle and the bottom
_CHARACTERS = 200  # of a row's question and answer in the report


class Scorer(Protocol):
    """A model that scores conversations."""

    name: str

    def __call__(self, batches: Iterator[Sequence[Conversation]], count: int) -> Floats:
        """The IFD of each of `count` conversations, which come in batches; NaN for one that cannot be scored."""


class SelectedSource(TypedDict):
    """What was selected of a source."""

    name: str
    candidates: int
    kept: int


class ScoreHistogram(TypedDict):
    """`candidates[i]` rows, and `kept[i]` of them, have a score between `edges[i]` and `edges[i + 1]`."""

    score: str  # the method
    edges: list[float]
    candidates: list[int]
    kept: list[int]


class ShownRow(TypedDict):
    """A row in the report."""

    row: str  # file and row
    score: float | None
    asked: str
    answered: str


class SelectionReport(TypedDict):
    """How the training rows were selected."""

    methods: list[str]
    model: NotRequired[str]  # that scored the rows
    candidates: int
    wanted: int
    kept: int
    sources: list[SelectedSource]
    histograms: list[ScoreHistogram]
    top: list[ShownRow]  # the first rows of the order
    middle: list[ShownRow]
    bottom: list[ShownRow]


@dataclass(frozen=True)
class Selecting:
    """Everything that a selection depends on, apart from the rows."""

    settings: SelectSettings
    choice: ChoiceSettings
    render: RenderSettings
    scorer: Scorer | None  # needed for `ifd`


def select(
    by: Selecting,
    sources: Sequence[DataSource],
    scans: Sequence[Scan],
    choice: Choice,
    paths: Sequence[Path],
    folder: Path,
) -> tuple[SelectionReport | None, list[Path]]:
    """Keep in `choice` only the selected training rows, among those that could be rendered into the files `paths`.

    Returns the report, and files in `folder` with the selected rows and the validation rows. There is no report if
    no row could be rendered.
    """
    shards, kind = Shards(paths), by.render.kind
    rendered = choice.starts[shards.numbers("source")] + shards.numbers("row")
    positions = positions_of(np.unique(np.concatenate(list(choice.picked.values()))), rendered)
    if not len(positions):
        return None, list(paths)
    examples = Conversations(shards, positions) if kind == "sft" else Pairs(shards, positions)
    rows, row_of = np.unique(rendered[positions], return_inverse=True)  # a long document has several examples
    report = _select(by, sources, scans, choice, np.bincount(row_of, examples.replies), rows)
    kept = np.unique(positions_of(choice.rendered(), rendered))
    return report, take_rows(paths, kept, kind, folder)


def _select(
    by: Selecting,
    sources: Sequence[DataSource],
    scans: Sequence[Scan],
    choice: Choice,
    replies: npt.NDArray[Any],
    rendered: Indices,
) -> SelectionReport:
    """Select among the rows with the numbers `rendered` (N,), in rising order, of `replies` (N,) tokens."""
    candidates = _candidates(by, scans, choice, replies, rendered)
    source_of = np.searchsorted(choice.starts, rendered, side="right") - 1
    groups = {source: np.flatnonzero(source_of == source) for source in choice.picked}
    orders, wanted = _orders(by, sources, candidates, groups)
    kept = np.sort(np.concatenate([np.empty(0, np.int64), *(order[:count] for order, count in orders)]))
    for source, group in groups.items():
        rows = kept[source_of[kept] == source]
        ifd = candidates.scores.get("ifd", np.zeros(len(rendered), np.float32))[group]
        unfit = {NOT_SCORED: int(np.isnan(ifd).sum()), NO_HELP: int((ifd >= 1).sum())}
        choice.dropped[source].update(unfit | {NOT_SELECTED: len(group) - len(rows) - sum(unfit.values())})
        choice.picked[source] = rendered[rows]
    choice.mix(_weights(by, sources, choice), scans, by.choice)
    shown = _shown(scans, choice, rendered, candidates, _merged([order for order, _ in orders]))
    report: SelectionReport = {
        "methods": list(by.settings.methods),
        "candidates": len(rendered),
        "wanted": wanted,
        "kept": len(kept),
        "sources": [
            {"name": sources[i].name, "candidates": len(group), "kept": len(choice.picked[i])}
            for i, group in groups.items()
        ],
        "histograms": [_histogram(name, scores, kept) for name, scores in candidates.scores.items()],
        "top": shown["top"],
        "middle": shown["middle"],
        "bottom": shown["bottom"],
    }
    if by.scorer is not None:
        report["model"] = by.scorer.name
    return report


def _weights(by: Selecting, sources: Sequence[DataSource], choice: Choice) -> list[float]:
    """The weights with which the selected rows of each source are mixed."""
    if by.choice.mixing == "interleave":  # the counts are the shares
        return [float(max(len(rows), 1)) for rows in choice.picked.values()]
    return [max(sources[i].weight, 1.0) for i in choice.picked]  # one below 1 has made the source's count smaller


def _candidates(
    by: Selecting, scans: Sequence[Scan], choice: Choice, replies: npt.NDArray[Any], rendered: Indices
) -> Candidates:
    source_of = np.searchsorted(choice.starts, rendered, side="right") - 1
    chosen = Chosen(source_of, rendered - choice.starts[source_of])
    hashes = np.concatenate([scan.rows.exact[:, 0] for scan in scans])[rendered]
    scores: dict[str, Floats] = {}
    if "longest" in by.settings.methods:
        scores["longest"] = replies.astype(np.float32)
    if "ifd" in by.settings.methods:
        assert by.scorer is not None
        scores["ifd"] = _ifd(by.scorer, by.render.system, scans, chosen)

    def sides() -> Iterator[list[Sides]]:
        for _, _, items in chosen_batches(scans, chosen):
            yield [_sides(item) for item in items]

    return Candidates(hashes, clusters(hashes, sides()) if "diverse" in by.settings.methods else None, scores)


def _ifd(scorer: Scorer, system: str | None, scans: Sequence[Scan], chosen: Chosen) -> Floats:
    """The IFD of each row (K,); NaN for raw text, which answers no question."""
    is_conversation: list[bool] = []

    def conversations() -> Iterator[list[Conversation]]:
        for _, _, items in chosen_batches(scans, chosen):
            is_conversation.extend(isinstance(item, Conversation) for item in items)
            yield [with_system(item, system) for item in items if isinstance(item, Conversation)]

    scores = scorer(conversations(), len(chosen))
    ifd = np.full(len(chosen), np.nan, np.float32)
    ifd[is_conversation] = scores
    return ifd


def _sides(item: Item) -> Sides:
    asked, said = sides_of(item)
    return "\n".join(asked), "\n".join([item.chosen] if isinstance(item, Preference) else said)


def _orders(
    by: Selecting,
    sources: Sequence[DataSource],
    candidates: Candidates,
    groups: dict[int, Indices],
) -> tuple[list[tuple[Indices, int]], int]:
    """The order of each group of rows that is chosen from, with how many are kept; and how many were wanted."""
    settings, weights = by.settings, [sources[i].weight for i in groups]
    sizes = [len(group) for group in groups.values()]
    if by.choice.mixing == "interleave":
        total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        sizes = [min(round(total * weight), size) for size, weight in zip(sizes, weights, strict=True)]
    else:
        sizes = [round(min(weight, 1.0) * size) for size, weight in zip(sizes, weights, strict=True)]
    wanted = sum(sizes)
    if settings.fraction is not None:
        wanted = max(round(settings.fraction * wanted), 1)
    wanted = min(wanted, settings.count or wanted)

    def order(group: Indices) -> Indices:
        return ordered(candidates, group, settings.methods, by.choice.seed)

    if not settings.per_source:
        return [(order(np.concatenate(list(groups.values()))), wanted)], wanted
    return list(zip(map(order, groups.values()), quotas(wanted, sizes), strict=True)), wanted


def _merged(orders: Sequence[Indices]) -> Indices:
    """The rows of all orders, by how far in front they are in their own."""
    places = [(np.arange(len(order)) + 0.5) / max(len(order), 1) for order in orders]
    rows: Indices = np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")]
    return rows


def _histogram(name: str, scores: Floats, kept: Indices) -> ScoreHistogram:
    known = scores[np.isfinite(scores)]
    low, high = (float(np.quantile(known, at)) for at in (0.005, 0.995)) if len(known) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    inside = [np.histogram(np.clip(values, low, high), edges)[0] for values in (known, scores[kept])]
    return {
        "score": name,
        "edges": [round(float(edge), 4) for edge in edges],
        "candidates": inside[0].tolist(),
        "kept": inside[1].tolist(),
    }


class _Shown(TypedDict):
    top: list[ShownRow]
    middle: list[ShownRow]
    bottom: list[ShownRow]


def _shown(
    scans: Sequence[Scan], choice: Choice, rendered: Indices, candidates: Candidates, order: Indices
) -> _Shown:
    """Rows from the top, the middle and the bottom of the order."""
    middle = max((len(order) - _SHOWN) // 2, 0)
    score = next((candidates.scores[name] for name in reversed(SCORES) if name in candidates.scores), None)

    def rows(part: Indices) -> list[ShownRow]:
        return [
            _shown_row(scans, choice, int(rendered[row]), None if score is None else float(score[row]))
            for row in part.tolist()
        ]

    return {
        "top": rows(order[:_SHOWN]),
        "middle": rows(order[middle : middle + _SHOWN]),
        "bottom": rows(order[-_SHOWN:]),
    }


def _shown_row(scans: Sequence[Scan], choice: Choice, row: int, score: float | None) -> ShownRow:
    source = int(np.searchsorted(choice.starts, row, side="right")) - 1
    scan, number = scans[source], row - int(choice.starts[source])
    part = int(scan.parts_of(number))
    item = scan.items(part)[number - int(scan.parts[part])]
    asked, answered = (side[:_CHARACTERS] for side in _sides(item))
    return {
        "row": item.source,
        "score": None if score is None else round(score, 4),
        "asked": asked,
        "answered": answered,
    }
