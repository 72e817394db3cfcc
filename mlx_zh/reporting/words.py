"""The figures of a run as text, the same on the page and in Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_zh.reporting.exam_results import Change
from mlx_zh.reporting.findings import Findings, TrainingResult, at_end, is_finite
from mlx_zh.reporting.messages import Text, say


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the figures at the top of the report."""

    name: Text
    value: str
    remark: Text


def points(value: float, decimals: int = 2) -> str:
    """A difference of fractions in percentage points, with its sign."""
    text = f"{100 * value:+.{decimals}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{decimals}f}"


def verdict(change: Change) -> tuple[Text, str]:
    """Better, worse or within noise: as text, and as the name of its style."""
    kind = "noise" if change.noise or change.difference == 0 else "better" if change.difference > 0 else "worse"
    text = say(kind)
    return (text if change.paired else say("unpaired", verdict=text)), kind


def mark(right: bool) -> str:
    """A tick for a right answer, a cross for a wrong one."""
    return "✓" if right else "✗"


def tiles(findings: Findings) -> list[Tile]:
    """The figures at the top of the report."""
    shown = []
    stages = list(findings.answers)
    right_answers = [findings.right_answers(stage) for stage in dict.fromkeys((*stages[:1], *stages[-1:]))]
    if any(judged for _, judged in right_answers):
        value = " → ".join(f"{right}/{judged}" for right, judged in right_answers)
        shown.append(Tile(say("right_tile"), value, Text.same("")))
    for exam in findings.exams:
        average = exam.rows[0] if exam.rows else None
        cells = [average.cells[stage] for stage in exam.stages if stage in average.cells] if average else []
        if average and cells:
            change = average.change
            remark = Text.same("")
            if change:
                text, _ = verdict(change)
                remark = say("change_remark", points=points(change.difference), verdict=text)
            ends = [average.cells[s] for s in exam.compared] if change and exam.compared else cells[:1]
            shown.append(Tile(Text.same(exam.title), " → ".join(f"{100 * c.macro:.2f}" for c in ends), remark))
    if sft := findings.training.get("sft"):
        before, after = (sft.summary.get(f"eval_loss_{side}") for side in ("before", "after"))
        if isinstance(before, float) and isinstance(after, float):
            shown.append(Tile(say("val_loss_tile"), f"{before:.3f} → {after:.3f}", _times(before, after)))
    if dpo := findings.training.get("dpo"):
        accuracy, margin = at_end(dpo, "rewards/accuracies"), at_end(dpo, "rewards/margins")
        if accuracy is not None:
            remark = Text.same("") if margin is None else say("margin_remark", margin=margin)
            shown.append(Tile(say("accuracy_tile"), f"{accuracy:.1%}", remark))
        elif margin is not None:  # KTO has no pairs, so no accuracy
            shown.append(Tile(say("margin_tile"), f"{margin:.3f}", Text.same("")))
    if seconds := total_seconds(findings):
        peak = max((t.highest("peak_memory_gb") or 0 for t in findings.training.values()), default=0)
        remark = say("memory_remark", size=peak) if peak else Text.same("")
        shown.append(Tile(say("time_tile"), duration(seconds), remark))
    return shown


def _times(before: float, after: float) -> Text:
    return Text.same(f"× {after / before:.2f}" if before else "")


def total_seconds(findings: Findings) -> float:
    """Seconds of all stages where the pipeline timed them, else of the training stages."""
    if findings.times:
        return sum(time.seconds for time in findings.times)
    every = (training.summary.get("seconds") for training in findings.training.values())
    return sum(float(seconds) for seconds in every if is_finite(seconds))


def training_facts(training: TrainingResult) -> list[tuple[Text, Text]]:
    """What a training stage did, as (name, value)."""
    steps = training.steps
    facts: list[tuple[Text, Text]] = []
    if not steps:
        return facts
    facts.append((say("steps"), Text.same(f"{steps[-1]['step']:,}")))
    epoch = training.last("epoch")
    if epoch is not None:
        facts.append((say("epochs"), Text.same(f"{epoch:.2f}")))
    before, after = (training.summary.get(f"eval_loss_{side}") for side in ("before", "after"))
    if isinstance(before, float) and isinstance(after, float):
        facts.append((say("eval_loss"), Text.same(f"{before:.4f} → {after:.4f}")))
    for name in ("tokens", "scored_tokens"):
        if total := training.total(name):
            facts.append((say(name), Text.same(f"{total:,.0f}")))
    speeds = [value for _, value in training.points("tokens_per_second")]
    if speeds:
        facts.append((say("speed"), say("speed_value", value=f"{sorted(speeds)[len(speeds) // 2]:,.0f}")))
    if ranks := training.last("ranks"):
        shares = [value for _, value in training.points("communication_share")]
        share = f"{sum(shares) / len(shares):.1%}"
        facts.append((say("ranks"), say("ranks_value", ranks=f"{ranks:.0f}", share=share)))
    if peak := training.highest("peak_memory_gb"):
        facts.append((say("peak_memory"), Text.same(f"{peak:.2f} GB")))
    seconds = training.summary.get("seconds") or training.last("elapsed_seconds")
    if is_finite(seconds) and seconds:
        facts.append((say("time"), Text.same(duration(float(seconds)))))
    return facts


def duration(seconds: float) -> str:
    """Seconds as text, the same in both languages: 8.2 s, 75 s, 12 min 05 s, 1 h 30 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def energy(joules: float) -> str:
    """Joules as text in Wh or kWh."""
    hours = joules / 3600
    return f"{hours:.1f} Wh" if hours < 1000 else f"{hours / 1000:.2f} kWh"
