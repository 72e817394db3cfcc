"""Curves of several runs in one chart, along steps, along the tokens that were learned, or along time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_zh.reporting.charts import Curves, Points, Series, smooth
from mlx_zh.reporting.comparison import ComparedRun
from mlx_zh.reporting.findings import TrainingResult
from mlx_zh.reporting.messages import Text, named, say

AXES = ("step", "scored_tokens", "hours")
_UNLIKE = 1.05  # from this ratio of tokens per step on, steps are not comparable
_MINUTES = 2.0  # hours; a run shorter than this is drawn in minutes

# Metrics of a training stage: its name, whether it is smoothed, and whether it is a fraction.
_METRICS = {
    "sft": (("loss", True, False), ("eval_loss", False, False)),
    "dpo": (
        ("loss", True, False),
        ("eval_loss", False, False),
        ("rewards/margins", True, False),
        ("rewards/accuracies", True, True),
        ("eval_rewards/accuracies", False, True),
        ("kl", True, False),
    ),
}


@dataclass(frozen=True)
class StageCurves:
    """The charts of a training stage, by axis."""

    stage: str
    charts: dict[str, list[Curves]]  # only the axes that every run has figures for
    axis: str  # the one along which the runs are comparable best


def compared_curves(runs: Sequence[ComparedRun]) -> list[StageCurves]:
    """SFT and DPO, each as far as at least one of the runs has figures of it. A run keeps its colour everywhere."""
    stages = []
    for stage, metrics in _METRICS.items():
        trainings = [
            (number, run.label, training)
            for number, run in enumerate(runs)
            if (training := run.findings.training.get(stage)) is not None and training.steps
        ]
        if not trainings:
            continue
        charts = {}
        for axis in AXES:
            if maps := _maps(axis, [training for _, _, training in trainings]):
                drawn = [
                    _chart(stage, metric, axis, trainings, maps, smoothed, percent)
                    for metric, smoothed, percent in metrics
                ]
                if present := [chart for chart in drawn if chart is not None]:
                    charts[axis] = present
        if charts:
            stages.append(StageCurves(stage, charts, _axis(charts, runs, [t for _, _, t in trainings])))
    return stages


def axis_name(axis: str) -> Text:
    """What an axis is called where one is chosen."""
    return say(f"compare-axis-{axis}")


_Map = Callable[[float], float]  # from a step to its place on the axis


def _maps(axis: str, trainings: Sequence[TrainingResult]) -> tuple[Text, list[_Map]] | None:
    """The axis' name and a map of each training; None where one of them lacks the figures."""
    if axis == "step":
        return say("step"), [lambda step: step for _ in trainings]
    if axis == "scored_tokens":
        totals = [_running(training.points("scored_tokens")) for training in trainings]
    else:
        totals = [training.points("elapsed_seconds") for training in trainings]
    if any(len(points) != len(t.points("loss")) for points, t in zip(totals, trainings, strict=True)):
        return None
    if axis == "scored_tokens":
        return say("scored_tokens"), [_map(points, 1.0) for points in totals]
    minutes = max(points[-1][1] for points in totals) < _MINUTES * 3600
    return say("compare-minutes" if minutes else "compare-hours"), [
        _map(points, 60.0 if minutes else 3600.0) for points in totals
    ]


def _running(points: Points) -> Points:
    total, sums = 0.0, []
    for step, value in points:
        total += value
        sums.append((step, total))
    return sums


def _map(points: Points, unit: float) -> _Map:
    """The value at the last of the `points` up to a step, 0 before the first, in `unit`s."""
    steps = [step for step, _ in points]

    def at(step: float) -> float:
        index = bisect_right(steps, step)
        return round(points[index - 1][1] / unit, 4) if index else 0.0

    return at


def _chart(
    stage: str,
    metric: str,
    axis: str,
    trainings: Sequence[tuple[int, str, TrainingResult]],
    maps: tuple[Text, Sequence[_Map]],
    smoothed: bool,
    percent: bool,
) -> Curves | None:
    """A metric of all runs that have it; None without any."""
    along, places = maps
    series = []
    for (number, label, training), place in zip(trainings, places, strict=True):
        points = training.points(metric)
        values = [value for _, value in points]
        values = smooth(values) if smoothed else values
        if points:
            drawn = [(place(step), value) for (step, _), value in zip(points, values, strict=True)]
            series.append(Series(Text.same(label), drawn, "smoothed" if smoothed else "marks", number))
    if not series:
        return None
    name = named(metric)
    title = say("compare-chart-smoothed", stage=named(stage), name=name) if smoothed else _titled(stage, name)
    units = say("accuracy_axis") if percent else name
    whole = axis != "hours"
    return Curves(f"{stage}-{metric}", title, units, series, percent=percent, along=along, whole=whole)


def _titled(stage: str, name: Text) -> Text:
    return say("compare-chart", stage=named(stage), name=name)


def _axis(charts: dict[str, list[Curves]], runs: Sequence[ComparedRun], trainings: Sequence[TrainingResult]) -> str:
    """Steps where they hold about equally many tokens; else tokens, if the runs have the same tokenizer."""
    tokens = [[value for _, value in training.points("scored_tokens")] for training in trainings]
    common = min(map(len, tokens))  # steps that all of them have taken
    sums = [sum(values[:common]) for values in tokens]
    alike = min(sums) <= 0 or max(sums) / min(sums) < _UNLIKE
    same_base = len({run.model.get("fingerprint") for run in runs}) == 1
    return "scored_tokens" if "scored_tokens" in charts and same_base and not alike else "step"
