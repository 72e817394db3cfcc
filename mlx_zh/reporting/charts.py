"""The charts of the report as data. `svg` draws them for the page, `plots` as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_zh.reporting.findings import Findings, TrainingResult
from mlx_zh.reporting.messages import Text, named, say

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A curve."""

    name: Text
    points: Points
    kind: str  # raw (light), smoothed, or marks (with dots)
    color: int  # index into the palette


@dataclass(frozen=True)
class Curves:
    """Curves over optimizer steps, or over what else `along` names."""

    key: str  # of the PNG file's name
    title: Text
    axis: Text  # name of the vertical axis
    series: list[Series]
    percent: bool = False  # whether fractions are shown as percentages
    along: Text | None = None  # name of the horizontal axis; None for steps
    whole: bool = True  # whether the horizontal axis counts something


@dataclass(frozen=True)
class Span:
    """A value with its interval, drawn as a dot with a whisker."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Dots:
    """A chart with a row for each category and a dot for each model; fractions of 1."""

    key: str  # of the PNG file's name
    title: Text
    models: list[Text]
    rows: list[tuple[Text, list[Span | None]]]  # category, and a span for each model that has one
    band: tuple[float, float] | None  # interval of guessing


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` is the number of values between `edges[i]` and `edges[i + 1]`."""

    title: Text
    edges: Sequence[float]
    counts: Sequence[float]


def training_charts(training: TrainingResult) -> list[Curves]:
    """The charts of one training stage, without those that have no figures."""
    return _sft(training) if training.stage == "sft" else _dpo(training)


def exam_charts(findings: Findings) -> list[Dots]:
    """A chart for each benchmark whose right answers are known."""
    charts = []
    for exam in findings.exams:
        rows: list[tuple[Text, list[Span | None]]] = []
        for row in exam.rows:
            cells = [row.cells.get(stage) for stage in exam.stages]
            rows.append((named(row.name), [Span(c.macro, c.low, c.high) if c else None for c in cells]))
        if any(any(spans) for _, spans in rows):
            models = [named(stage) for stage in exam.stages]
            charts.append(Dots(f"exam-{exam.key}", Text.same(exam.title), models, rows, exam.chance))
    return charts


def all_curves(findings: Findings) -> list[Curves]:
    """Every training chart of a run."""
    return [chart for training in findings.training.values() for chart in training_charts(training)]


def _sft(training: TrainingResult) -> list[Curves]:
    series = _pair(training, "loss", 0)
    series += _marks(training, "eval_loss", 1)
    charts = [
        Curves("sft-loss", say("chart_sft_loss"), say("loss"), series),
        Curves("sft-gradient", say("chart_sft_gradient"), say("grad_norm"), _pair(training, "grad_norm", 0)),
    ]
    return [chart for chart in charts if chart.series]


def _dpo(training: TrainingResult) -> list[Curves]:
    loss = _pair(training, "loss", 0) + _marks(training, "eval_loss", 1)
    rewards = _pair(training, "rewards/chosen", 2) + _pair(training, "rewards/rejected", 3)
    accuracies = _pair(training, "rewards/accuracies", 2) + _marks(training, "eval_rewards/accuracies", 1)
    charts = [
        Curves("dpo-loss", say("chart_dpo_loss"), say("loss"), loss),
        Curves("dpo-rewards", say("chart_dpo_rewards"), say("reward"), rewards),
        Curves(
            "dpo-margins", say("chart_dpo_margins"), say("rewards/margins"), _pair(training, "rewards/margins", 0)
        ),
        Curves("kto-kl", say("chart_kto_kl"), say("kl"), _pair(training, "kl", 1)),
        Curves("dpo-accuracies", say("chart_dpo_accuracies"), say("accuracy_axis"), accuracies, percent=True),
    ]
    return [chart for chart in charts if chart.series]


def _pair(training: TrainingResult, name: str, color: int) -> list[Series]:
    """Two curves of a metric, raw and smoothed; none where it has no values."""
    points = training.points(name)
    if not points:
        return []
    steps = [step for step, _ in points]
    smoothed = list(zip(steps, smooth([value for _, value in points]), strict=True))
    return [
        Series(say("raw", name=named(name)), points, "raw", color),
        Series(say("smoothed", name=named(name)), smoothed, "smoothed", color),
    ]


def _marks(training: TrainingResult, name: str, color: int) -> list[Series]:
    points = training.points(name)
    return [Series(named(name), points, "marks", color)] if points else []


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average of N values, started at the first value, whose weight grows with N.

    As `smooth` in LLaMA-Factory's extras/ploting.py, which follows TensorBoard: s[i] = w s[i-1] + (1 - w) v[i] with
    w = 1.8 (sigmoid(N / 20) - 1/2), so that short runs are hardly smoothed and long ones at most by w = 0.9.
    """
    weight = 1.8 * (1 / (1 + math.exp(-len(values) / 20)) - 0.5)
    smoothed: list[float] = []
    for value in values:
        last = smoothed[-1] if smoothed else value
        smoothed.append(weight * last + (1 - weight) * value)
    return smoothed
