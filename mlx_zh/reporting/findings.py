"""What a run folder holds, read for its report. A missing file is left out; a damaged one is an alarm."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeGuard

from mlx_zh.exams.current import outdated as outdated_notice
from mlx_zh.language.notice import Notice, notices_of
from mlx_zh.reporting import exam_results
from mlx_zh.reporting.exam_results import Current, ExamResult
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.redaction import hide, hide_all

OVER_LONG = 0.05  # from this share of over-long rows on, there is an alarm
STAGES = ("base", "sft", "dpo", "fused")  # models, in the order of a run


@dataclass(frozen=True, slots=True)
class Alarm:
    """A warning that a reader must see before the figures."""

    where: Text  # the stage, exam or file that it is about
    what: Text  # a sentence


@dataclass(frozen=True)
class TrainingResult:
    """The metrics of a training stage.

    Another version may have written them, so a value is checked where it is used. See `MetricsLine` and
    `TrainingSummary` in `training.metrics` for the keys.
    """

    stage: str  # sft or dpo
    steps: list[Mapping[str, object]]  # lines of metrics.jsonl
    validations: list[Mapping[str, object]]  # lines of metrics.jsonl
    summary: Mapping[str, object]  # summary.json; empty while the stage is not finished

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric, without values that are missing, NaN or infinite."""
        lines = self.validations if name.startswith("eval_") else self.steps
        return [
            (float(step), float(value))
            for line in lines
            if is_finite(step := line.get("step")) and is_finite(value := line.get(name))
        ]

    def last(self, name: str) -> float | None:
        """A metric's last value; None without any."""
        points = self.points(name)
        return points[-1][1] if points else None

    def highest(self, name: str) -> float | None:
        """A metric's highest value; None without any."""
        return max((value for _, value in self.points(name)), default=None)

    def total(self, name: str) -> float:
        """A metric's sum over all steps."""
        return sum(value for _, value in self.points(name))


@dataclass(frozen=True)
class StageTime:
    """The time of a pipeline stage, and its energy where that was measured."""

    name: str
    seconds: float
    joules: float | None


@dataclass
class Findings:
    """Everything that a report shows. Mappings are JSON objects as they were read, see `mapped` and `listed`."""

    name: str  # of the run
    recipe: str = ""  # as YAML, secrets hidden
    manifest: Mapping[str, object] = field(default_factory=dict)
    exams: list[ExamResult] = field(default_factory=list)
    training: dict[str, TrainingResult] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    expected: list[str | None] = field(default_factory=list)  # what a right answer to each prompt contains, if known
    answers: dict[str, list[str]] = field(default_factory=dict)  # stage -> an answer to each prompt
    data: Mapping[str, object] = field(default_factory=dict)  # stage -> report of its data
    export: Mapping[str, object] = field(default_factory=dict)  # format -> what is known of it
    rounds: list[Mapping[str, object]] = field(default_factory=list)  # round.json of each round, in order
    times: list[StageTime] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)

    def is_right(self, stage: str, number: int) -> bool | None:
        """Whether a stage's answer to prompt `number` contains what is expected; None where nothing is."""
        expected = self.expected[number] if number < len(self.expected) else None
        answers = self.answers.get(stage, [])
        return None if expected is None or number >= len(answers) else expected in answers[number]

    def right_answers(self, stage: str) -> tuple[int, int]:
        """How many of a stage's answers are right, and how many can be judged."""
        judged = [self.is_right(stage, number) for number in range(len(self.prompts))]
        return judged.count(True), len(judged) - judged.count(None)


class StageFiles(Protocol):
    """What a report reads of a training stage."""

    metrics: Path
    summary: Path
    warnings: Path


class RoundFiles(Protocol):
    """What a report reads of a round."""

    result: Path


class RunFiles(Protocol):
    """What a report reads of a run folder."""

    path: Path
    manifest: Path
    samples: Path
    pipeline: Path
    prepared: Path
    exams: Path
    fused_summary: Path
    rounds: Path

    def round(self, number: int) -> RoundFiles:
        """The folder of a round."""

    def stage(self, name: str) -> StageFiles:
        """The folder of a training stage."""


def gather(
    run: RunFiles,
    recipe: str,
    *,
    name: str,
    bootstrap: int,
    seed: int,
    trains: Collection[str] = (),
    current: Current = MappingProxyType({}),
) -> Findings:
    """Everything in a run folder.

    `recipe` is its recipe as YAML, `trains` are the training stages (sft, dpo) that it has; `bootstrap` samples and
    `seed` give intervals; `current` has the digests of the models as they are now.
    """
    findings = Findings(name, hide(recipe))
    reading = _Reading(run.path, findings.alarms)
    findings.manifest = hide_all(reading.mapping(run.manifest))
    findings.data = hide_all(reading.mapping(run.prepared))
    findings.export = hide_all(reading.mapping(run.fused_summary))
    numbered = sorted(int(path.name) for path in run.rounds.glob("*") if path.name.isdecimal())
    records = (hide_all(reading.mapping(run.round(number).result)) for number in numbered)
    findings.rounds = [record for record in records if record]
    samples = reading.mapping(run.samples)
    findings.prompts = [hide(str(prompt)) for prompt in listed(samples.get("prompts"))]
    expected = listed(samples.get("expected"))[: len(findings.prompts)]
    findings.expected = [hide(text) if isinstance(text, str) else None for text in expected]
    answers = mapped(samples.get("answers"))
    findings.answers = {stage: [hide(str(a)) for a in listed(answers[stage])] for stage in STAGES if stage in answers}
    pipeline = reading.mapping(run.pipeline)
    findings.times = _times(pipeline)
    for stage in ("sft", "dpo"):
        if training := _training(reading, run.stage(stage), stage):
            findings.training[stage] = training
            findings.alarms += _training_alarms(training)
            lines = reading.objects(run.stage(stage).warnings)
            warned = dict.fromkeys(notices_of([line.get("text") for line in lines], lines))
            findings.alarms += [Alarm(named(stage), Text.of(text)) for text in warned]
    findings.alarms += _missing_alarms(findings, pipeline, trains)
    options: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed, "current": current}
    findings.exams, outdated = exam_results.gather(run.exams, STAGES, **options)
    for title, stage in outdated:
        findings.alarms.append(Alarm(Text.same(title), Text.of(outdated_notice(stage, title))))
    for exam in findings.exams:
        findings.alarms += _exam_alarms(exam)
    for stage, report in findings.data.items():
        findings.alarms += _data_alarms(named(f"data_{stage}"), mapped(report))
    for kind, written in findings.export.items():
        findings.alarms += _export_alarms(str(kind), mapped(written))
    return findings


class _Reading:
    """Reads the files of a run folder. A damaged file becomes an alarm, a missing one does not."""

    def __init__(self, folder: Path, alarms: list[Alarm]) -> None:
        self._folder, self._alarms = folder, alarms

    def mapping(self, path: Path) -> dict[str, object]:
        """A JSON object; empty where it is missing or damaged."""
        content = self._parsed(path, parse_json, {})
        if isinstance(content, dict):
            return content
        self._damaged(path)
        return {}

    def objects(self, path: Path) -> list[dict[str, object]]:
        """The objects of a JSON lines file."""
        lines = self._parsed(path, lambda text: [parse_json(line) for line in text_lines(text)], [])
        return [line for line in lines if isinstance(line, dict)]

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
    warnings = []
    summary = training.summary
    if not summary:
        warnings.append(say("training-unfinished", stage=named(training.stage)))
    if summary.get("skipped_steps"):
        warnings.append(say("steps-skipped", count=summary["skipped_steps"]))
    not_finite = sum(_not_finite(line) for line in (*training.steps, *training.validations))
    if not_finite:
        warnings.append(say("metrics-not-finite", count=not_finite))
    before, after = (summary.get(f"eval_loss_{side}") for side in ("before", "after"))
    best = mapped(summary.get("best"))
    lowest = best.get("eval_loss")
    if is_finite(before) and is_finite(after):
        if after > before:
            warnings.append(say("validation-loss-rose", before=before, after=after))
        elif is_finite(lowest) and lowest < after * 0.995:
            warnings.append(say("overfitted", step=best.get("step"), best=lowest, after=after))
    accuracy = at_end(training, "rewards/accuracies")
    if accuracy is not None and accuracy <= 0.5:
        warnings.append(say("reward-accuracy-low", accuracy=accuracy))
    return [Alarm(named(training.stage), warning) for warning in warnings]


def _missing_alarms(findings: Findings, pipeline: Mapping[str, object], trains: Collection[str]) -> list[Alarm]:
    """Alarms for steps that failed or were stopped, and for training stages without figures."""
    begun = {
        name
        for name, record in mapped(pipeline.get("stages")).items()
        if name not in ("report", *findings.training) and mapped(record).get("outputs", {}) is None
    }
    alarms = [Alarm(named(name), say("step-unfinished", step=named(name))) for name in sorted(begun)]
    missing = [stage for stage in trains if stage not in findings.training and stage not in begun]
    return alarms + [Alarm(named(stage), say("training-missing", stage=named(stage))) for stage in missing]


def at_end(training: TrainingResult, name: str) -> float | None:
    """A metric at the last validation; without validation, its mean over the last tenth of the steps, at least five.

    None where neither has the metric.
    """
    if (validated := training.last(f"eval_{name}")) is not None:
        return validated
    values = [value for _, value in training.points(name)]
    last = values[-max(5, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def _data_alarms(where: Text, report: Mapping[str, object]) -> list[Alarm]:
    missing = mapped(mapped(report.get("exam_questions")).get("missing"))
    warnings = [say("exam-questions-not-checked", exam=exam, reason=reason) for exam, reason in missing.items()]
    share = report.get("over_long_share")
    if is_finite(share) and share >= OVER_LONG:
        warnings.append(say("rows-over-long", share=share))
    return [Alarm(where, warning) for warning in warnings]


def _exam_alarms(exam: ExamResult) -> list[Alarm]:
    alarms = []
    for stage, wires in exam.tripwires.items():
        where = _subtitled(exam.title, named(stage))
        alarms += [Alarm(where, Text.of(wire)) for wire in wires]
    for before, after in exam.unlike:
        unlike = say("exam-not-comparable", before=named(before), after=named(after))
        alarms.append(Alarm(Text.same(exam.title), unlike))
    for before, after in exam.rescored:
        rescored = say("exam-other-numbers", before=named(before), after=named(after))
        alarms.append(Alarm(Text.same(exam.title), rescored))
    return alarms


def _export_alarms(kind: str, written: Mapping[str, object]) -> list[Alarm]:
    where = _subtitled(kind, say("export"))
    warnings = notices_of(*(listed(written.get(key)) for key in ("warnings", "warning_codes")))
    if sentence := written.get("unmeasured"):
        (reason,) = notices_of([sentence], [written.get("unmeasured_code")])
        warnings.append(Notice("fused-not-compared", format=kind, reason=reason))
    return [Alarm(where, Text.of(warning)) for warning in warnings]


def _subtitled(title: str, text: Text) -> Text:
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
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def listed(value: object) -> Sequence[Any]:
    """The value where it is a JSON list, else an empty one."""
    return value if isinstance(value, list) else []


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _not_finite(line: Mapping[str, object]) -> bool:
    return any(isinstance(value, float) and not math.isfinite(value) for value in line.values())
