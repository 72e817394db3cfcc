"""The training data: its sources and what became of their rows, the lengths, and the files' digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_zh.reporting.charts import Histogram
from mlx_zh.reporting.findings import Findings, is_finite, listed, mapped
from mlx_zh.reporting.messages import Text, joined, named, say


@dataclass(frozen=True, slots=True)
class StageData:
    """The data of a training stage, from the report that `prepare` wrote."""

    title: Text
    facts: list[tuple[Text, Text]]
    sources: list[tuple[Text, ...]]  # a row for each source, with the columns of `source_columns`
    lengths: Histogram | None
    scores: list[Histogram]  # of the rows among which was selected
    selected: list[tuple[Text, ...]]  # rows from the top, the middle and the bottom of the selection's order


def stages(findings: Findings) -> list[StageData]:
    """The data of each training stage."""
    shown = []
    for stage, report in findings.data.items():
        if isinstance(report, Mapping):
            title = named(f"data_{stage}")
            selection = mapped(report.get("selection"))
            shown.append(
                StageData(
                    title,
                    [*_facts(report), *_selection_facts(selection)],
                    _source_rows(report),
                    _lengths(title, report),
                    _scores(title, selection),
                    _selected_rows(selection),
                )
            )
    return shown


def digests(findings: Findings) -> list[tuple[str, str]]:
    """(path, first 16 digits of the digest) of every data file."""
    return [(path, str(digest)[:16]) for path, digest in mapped(findings.manifest.get("data")).items()]


def source_columns() -> list[Text]:
    """The column heads of the table of sources."""
    return [say(key) for key in ("source", "rows", "for_training", "for_validation", "removed")]


def selected_columns() -> list[Text]:
    """The column heads of the table of selected rows."""
    return [say(key) for key in ("place", "score", "row", "question", "reply")]


def _selection_facts(selection: Mapping[str, object]) -> list[tuple[Text, Text]]:
    """How the rows were selected, and how many of each source were kept."""
    if not selection:
        return []
    counts = {name: _number(selection.get(name)) for name in ("kept", "candidates")}
    methods = " + ".join(map(str, listed(selection.get("methods"))))
    facts = [(say("selected"), say("selected_by", methods=methods, **counts))]
    if selection.get("model"):
        facts.append((say("scored_by"), Text.same(selection["model"])))
    for source in map(mapped, listed(selection.get("sources"))):
        kept = say("kept_of", kept=_number(source.get("kept")), candidates=_number(source.get("candidates")))
        facts.append((say("selected_of", name=str(source.get("name"))), kept))
    return facts


def _selected_rows(selection: Mapping[str, object]) -> list[tuple[Text, ...]]:
    rows: list[tuple[Text, ...]] = []
    for place in ("top", "middle", "bottom"):
        for row in map(mapped, listed(selection.get(place))):
            score = row.get("score")
            cells = (_number(score), *(str(row.get(key, "")) for key in ("row", "asked", "answered")))
            rows.append((say(f"order_{place}"), *map(Text.same, cells)))
    return rows


def _scores(title: Text, selection: Mapping[str, object]) -> list[Histogram]:
    """For each score, the histograms of all rows and of the selected ones."""
    charts = []
    for scores in map(mapped, listed(selection.get("histograms"))):
        edges, name = scores.get("edges"), str(scores.get("score"))
        for key in ("candidates", "kept"):
            chart = _histogram(say(f"scores_{key}", name=title, score=name), edges, scores.get(key))
            charts += [] if chart is None else [chart]
    return charts


def _lengths(title: Text, report: Mapping[str, object]) -> Histogram | None:
    histogram = mapped(mapped(report.get("train")).get("histogram"))
    return _histogram(say("lengths_chart", name=title), histogram.get("edges"), histogram.get("counts"))


def _histogram(title: Text, edges: object, counts: object) -> Histogram | None:
    """The histogram; None where it is empty, or a report holds something else than numbers."""
    if not (isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1):
        return None
    if not all(map(is_finite, [*edges, *counts])) or not any(counts):
        return None
    return Histogram(title, edges, counts)


def _source_rows(report: Mapping[str, object]) -> list[tuple[Text, ...]]:
    """A row for each source: name, rows read, rows for training and for validation, why others were left out."""
    rows: list[tuple[Text, ...]] = []
    for source in listed(report.get("sources")):
        if isinstance(source, Mapping):
            reasons = mapped(source.get("dropped")).items()
            dropped = joined([say("dropped", count=count, reason=named(reason)) for reason, count in reasons])
            cells = (source.get("name"), *(_number(source.get(key)) for key in ("rows", "train", "validation")))
            rows.append((*map(Text.same, cells), dropped if reasons else Text.same("–")))
    return rows


def _facts(report: Mapping[str, object]) -> list[tuple[Text, Text]]:
    """Sizes, lengths, and whether the data was compared with exam questions."""
    train, exams = mapped(report.get("train")), mapped(report.get("exam_questions"))
    facts = []
    if train:
        tokens = f"{_number(train.get('tokens'))} ({_number(train.get('scored_tokens'))})"
        lengths = " / ".join(_number(train.get(key)) for key in ("median", "p95", "longest"))
        facts = [(say("examples"), _number(train.get("examples"))), (say("train_tokens"), tokens)]
        facts.append((say("lengths"), lengths))
    over_long, share = report.get("over_long"), report.get("over_long_share")
    if isinstance(over_long, int):
        facts.append((say("over_long"), f"{over_long:,} ({share if is_finite(share) else 0:.1%})"))
    if isinstance(per_character := report.get("tokens_per_chinese_character"), float):
        facts.append((say("per_character"), f"{per_character:.2f}"))
    pairs = [(name, Text.same(value)) for name, value in facts]
    if checked := listed(exams.get("exams")):
        removed = say("exams_removed", exams=", ".join(map(str, checked)), count=len(listed(report.get("exam_rows"))))
        pairs.append((say("exams_checked"), removed))
    elif exams:
        pairs.append((say("exams_checked"), say("exams_unchecked")))
    return pairs


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else "–"
