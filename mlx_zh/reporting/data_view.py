"""What was learned from: the sources with what became of their rows, lengths, and the files' digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_zh.reporting.charts import Histogram
from mlx_zh.reporting.findings import Findings, is_finite, listed, mapped
from mlx_zh.reporting.messages import Text, joined, named, say


@dataclass(frozen=True, slots=True)
class StageData:
    """The data of a training stage, as `prepare` tells it; `sources` has a row a source under `source_columns`."""

    title: Text
    facts: list[tuple[Text, Text]]
    sources: list[tuple[Text, ...]]
    lengths: Histogram | None


def stages(findings: Findings) -> list[StageData]:
    """The data of each training stage."""
    shown = []
    for stage, told in findings.data.items():
        if isinstance(told, Mapping):
            title = named(f"data_{stage}")
            shown.append(StageData(title, _facts(told), _source_rows(told), _lengths(title, told)))
    return shown


def digests(findings: Findings) -> list[tuple[str, str]]:
    """(file, the first 16 digits of its digest) of every data file."""
    return [(path, str(digest)[:16]) for path, digest in mapped(findings.manifest.get("data")).items()]


def source_columns() -> list[Text]:
    """The heads of the sources' table."""
    return [say(key) for key in ("source", "rows", "for_training", "for_validation", "removed")]


def _lengths(title: Text, told: Mapping[str, object]) -> Histogram | None:
    histogram = mapped(mapped(told.get("train")).get("histogram"))
    edges, counts = histogram.get("edges"), histogram.get("counts")
    if isinstance(edges, list) and isinstance(counts, list) and any(counts) and len(edges) == len(counts) + 1:
        return Histogram(say("lengths_chart", name=title), edges, counts)
    return None


def _source_rows(told: Mapping[str, object]) -> list[tuple[Text, ...]]:
    """A row a source: name, rows read, kept for training and for validation, and why others were left out."""
    rows: list[tuple[Text, ...]] = []
    for source in listed(told.get("sources")):
        if isinstance(source, Mapping):
            reasons = mapped(source.get("dropped")).items()
            dropped = joined([say("dropped", count=count, reason=named(reason)) for reason, count in reasons])
            known = (source.get("name"), *(_number(source.get(key)) for key in ("rows", "train", "validation")))
            rows.append((*map(Text.same, known), dropped if reasons else Text.same("–")))
    return rows


def _facts(told: Mapping[str, object]) -> list[tuple[Text, Text]]:
    """Sizes, lengths, and whether exam questions were looked for."""
    train, exams = mapped(told.get("train")), mapped(told.get("exam_questions"))
    found = []
    if train:
        tokens = f"{_number(train.get('tokens'))} ({_number(train.get('scored_tokens'))})"
        lengths = " / ".join(_number(train.get(key)) for key in ("median", "p95", "longest"))
        found = [(say("examples"), _number(train.get("examples"))), (say("train_tokens"), tokens)]
        found.append((say("lengths"), lengths))
    over_long, share = told.get("over_long"), told.get("over_long_share")
    if isinstance(over_long, int):
        found.append((say("over_long"), f"{over_long:,} ({share if is_finite(share) else 0:.1%})"))
    if isinstance(per_character := told.get("tokens_per_chinese_character"), float):
        found.append((say("per_character"), f"{per_character:.2f}"))
    pairs = [(name, Text.same(value)) for name, value in found]
    if looked := listed(exams.get("exams")):
        said = say("exams_removed", exams=", ".join(map(str, looked)), count=len(listed(told.get("exam_rows"))))
        pairs.append((say("exams_checked"), said))
    elif exams:
        pairs.append((say("exams_checked"), say("exams_unchecked")))
    return pairs


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else "–"
