"""What a run folder holds, gathered for its report. What is not there is left out; what is damaged is an alarm."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from mlx_zh.language.notice import Notice, notices_of
from mlx_zh.reporting import exam_results
from mlx_zh.reporting.exam_results import ExamResult
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.system.redaction import hide, hide_all

MANY = 0.05  # more over-long rows than this are worth a word
STAGES = ("base", "sft", "dpo", "fused")  # models, in the order of a run


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that a reader must know before believing a figure."""

    where: Text
    what: Text


@dataclass(frozen=True)
class TrainingResult:
    """A training stage's metrics: `steps` and `validations` are lines of metrics.jsonl, `summary` its end.

    Another version may have written them, so that a value is checked where it is used. See `MetricsLine` and
    `TrainingSummary` in `training.metrics` for the keys.
    """

    stage: str
    steps: list[Mapping[str, object]]
    validations: list[Mapping[str, object]]
    summary: Mapping[str, object]

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric wherever it is a finite number."""
        lines = self.validations if name.startswith("eval_") else self.steps
        return [
            (float(step), float(value))
            for line in lines
            if is_finite(step := line.get("step")) and is_finite(value := line.get(name))
        ]

    def last(self, name: str) -> float | None:
        """A metric's last value."""
        points = self.points(name)
        return points[-1][1] if points else None

    def most(self, name: str) -> float | None:
        """A metric's highest value."""
        return max((value for _, value in self.points(name)), default=None)

    def total(self, name: str) -> float:
        """A metric's sum over all steps."""
        return sum(value for _, value in self.points(name))


@dataclass(frozen=True)
class StageTime:
    """How long a stage of the pipeline took, and what it drew."""

    name: str
    seconds: float
    joules: float | None


@dataclass
class Findings:
    """Everything that a report shows."""

    name: str
    recipe: str = ""
    manifest: Mapping[str, object] = field(default_factory=dict)
    exams: list[ExamResult] = field(default_factory=list)
    training: dict[str, TrainingResult] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=dict)
    data: Mapping[str, object] = field(default_factory=dict)
    export: Mapping[str, object] = field(default_factory=dict)
    times: list[StageTime] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)


class StageFiles(Protocol):
    """What a report reads of a training stage."""

    metrics: Path
    summary: Path
    warnings: Path


class RunFiles(Protocol):
    """What a report reads of a run folder."""

    path: Path
    manifest: Path
    samples: Path
    pipeline: Path
    prepared: Path
    exams: Path
    fused_summary: Path

    def stage(self, name: str) -> StageFiles:
        """The folder of a training stage."""


def gather(run: RunFiles, recipe: str, *, name: str, bootstrap: int, seed: int) -> Findings:
    """Everything in a run folder; `recipe` is its recipe as text."""
    found = Findings(name, hide(recipe))
    reading = _Reading(run.path, found.alarms)
    found.manifest = hide_all(reading.mapping(run.manifest))
    found.data = hide_all(reading.mapping(run.prepared))
    found.export = hide_all(reading.mapping(run.fused_summary))
    samples = reading.mapping(run.samples)
    found.prompts = [str(prompt) for prompt in listed(samples.get("prompts"))]
    answers = mapped(samples.get("answers"))
    found.answers = {stage: [str(a) for a in listed(answers[stage])] for stage in STAGES if stage in answers}
    found.times = _times(reading.mapping(run.pipeline))
    for stage in ("sft", "dpo"):
        if training := _training(reading, run.stage(stage), stage):
            found.training[stage] = training
            found.alarms += _training_alarms(training)
            lines = reading.objects(run.stage(stage).warnings)
            warned = dict.fromkeys(notices_of([line.get("text") for line in lines], lines))
            found.alarms += [Alarm(named(stage), Text.of(text)) for text in warned]
    found.exams = exam_results.gather(run.exams, STAGES, bootstrap=bootstrap, seed=seed)
    for exam in found.exams:
        found.alarms += _exam_alarms(exam)
    for stage, told in found.data.items():
        found.alarms += _data_alarms(named(f"data_{stage}"), mapped(told))
    for kind, written in found.export.items():
        found.alarms += _export_alarms(str(kind), mapped(written))
    return found


class _Reading:
    """Reads a run folder's files; one that is damaged is an alarm, one that is missing is not."""

    def __init__(self, folder: Path, alarms: list[Alarm]) -> None:
        self._folder, self._alarms = folder, alarms

    def mapping(self, path: Path) -> dict[str, object]:
        """A JSON object; empty where it is missing or damaged."""
        found = self._parsed(path, lambda text: json.loads(text), {})
        if isinstance(found, dict):
            return found
        self._damaged(path)
        return {}

    def objects(self, path: Path) -> list[dict[str, object]]:
        """The objects of a JSON lines file."""
        found = self._parsed(path, lambda text: [json.loads(line) for line in text.splitlines() if line.strip()], [])
        return [line for line in found if isinstance(line, dict)]

    def _parsed(self, path: Path, parse: Any, empty: Any) -> Any:
        try:
            return parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return empty
        except (OSError, ValueError):
            self._damaged(path)
            return empty

    def _damaged(self, path: Path) -> None:
        name = path.relative_to(self._folder).as_posix()
        self._alarms.append(Alarm(Text.same(name), say("file-unreadable", file=name)))


def _training(reading: _Reading, files: StageFiles, stage: str) -> TrainingResult | None:
    lines: list[Mapping[str, object]] = [
        line for line in reading.objects(files.metrics) if is_finite(line.get("step"))
    ]
    if not lines:
        return None
    validations = [line for line in lines if any(key.startswith("eval_") for key in line)]
    steps = [line for line in lines if "loss" in line]
    return TrainingResult(stage, steps, validations, reading.mapping(files.summary))


def _training_alarms(training: TrainingResult) -> list[Alarm]:
    found = []
    summary = training.summary
    if not summary:
        found.append(say("training-unfinished", stage=named(training.stage)))
    if summary.get("skipped_steps"):
        found.append(say("steps-skipped", count=summary["skipped_steps"]))
    broken = sum(_broken(line) for line in (*training.steps, *training.validations))
    if broken:
        found.append(say("metrics-not-finite", count=broken))
    before, after = (summary.get(f"eval_loss_{side}") for side in ("before", "after"))
    best = mapped(summary.get("best"))
    lowest = best.get("eval_loss")
    if is_finite(before) and is_finite(after):
        if after > before:
            found.append(say("validation-loss-rose", before=before, after=after))
        elif is_finite(lowest) and lowest < after * 0.995:
            found.append(say("overfitted", step=best.get("step"), best=lowest, after=after))
    accuracy = at_end(training, "rewards/accuracies")
    if accuracy is not None and accuracy <= 0.5:
        found.append(say("reward-accuracy-low", accuracy=accuracy))
    return [Alarm(named(training.stage), text) for text in found]


def at_end(training: TrainingResult, name: str) -> float | None:
    """A metric at the last validation; without one, its mean over the last tenth of the steps (five at least)."""
    if (validated := training.last(f"eval_{name}")) is not None:
        return validated
    values = [value for _, value in training.points(name)]
    last = values[-max(5, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def _data_alarms(where: Text, told: Mapping[str, object]) -> list[Alarm]:
    missing = mapped(mapped(told.get("exam_questions")).get("missing"))
    found = [say("exam-questions-not-checked", exam=exam, reason=reason) for exam, reason in missing.items()]
    share = told.get("over_long_share")
    if is_finite(share) and share >= MANY:
        found.append(say("rows-over-long", share=share))
    return [Alarm(where, text) for text in found]


def _exam_alarms(exam: ExamResult) -> list[Alarm]:
    found = []
    for stage, wires in exam.tripwires.items():
        where = say_join(exam.title, named(stage))
        found += [Alarm(where, Text.of(wire)) for wire in wires]
    for before, after in exam.unlike:
        unlike = say("exam-not-comparable", before=named(before), after=named(after))
        found.append(Alarm(Text.same(exam.title), unlike))
    return found


def _export_alarms(kind: str, written: Mapping[str, object]) -> list[Alarm]:
    where = say_join(kind, say("export"))
    found = notices_of(*(listed(written.get(key)) for key in ("warnings", "warning_codes")))
    if reason := written.get("unmeasured"):
        (told,) = notices_of([reason], [written.get("unmeasured_code")])
        found.append(Notice("fused-not-compared", format=kind, reason=told))
    return [Alarm(where, Text.of(text)) for text in found]


def say_join(title: str, text: Text) -> Text:
    """`C-Eval · base`."""
    return Text(f"{title} · {text.zh}", f"{title} · {text.en}")


def _times(pipeline: Mapping[str, object]) -> list[StageTime]:
    times = []
    for name, record in mapped(pipeline.get("stages")).items():
        seconds, joules = (mapped(record).get(key) for key in ("seconds", "joules"))
        if is_finite(seconds) and name != "report":
            times.append(StageTime(name, float(seconds), float(joules) if is_finite(joules) else None))
    return times


def mapped(value: object) -> Mapping[str, Any]:
    """A JSON object as it is; anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def listed(value: object) -> Sequence[Any]:
    """A JSON list as it is; anything else as an empty one."""
    return value if isinstance(value, list) else []


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _broken(line: Mapping[str, object]) -> bool:
    return any(isinstance(value, float) and not math.isfinite(value) for value in line.values())
