"""The final figures and the answers of several runs, a column each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_zh.reporting.compared_exams import model_name
from mlx_zh.reporting.comparison import ComparedRun
from mlx_zh.reporting.fairness import validation_is_same
from mlx_zh.reporting.findings import TrainingResult, at_end, is_finite, mapped
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.reporting.words import duration, energy, total_seconds, training_facts


@dataclass(frozen=True)
class FigureRow:
    """A figure of every run."""

    name: Text
    values: list[Text]
    best: frozenset[int] = field(default_factory=frozenset)  # runs whose value is the best one, where that means much


@dataclass(frozen=True)
class FigureGroup:
    """The rows of a stage, or of the whole run."""

    title: Text
    rows: list[FigureRow]


_NONE = Text.same("–")


def compared_figures(runs: Sequence[ComparedRun]) -> list[FigureGroup]:
    """The run as a whole, then each training stage, then what was exported."""
    groups = [FigureGroup(say("compare-whole-run"), _whole(runs))]
    groups += [FigureGroup(say(f"training_{stage}"), _training(runs, stage)) for stage in ("sft", "dpo")]
    groups.append(FigureGroup(say("export"), _exports(runs)))
    return [group for group in groups if group.rows]


def _row(name: Text, values: Sequence[Text | None], best: frozenset[int] = frozenset()) -> list[FigureRow]:
    """A row, if a run has a value."""
    if not any(values):
        return []
    return [FigureRow(name, [value or _NONE for value in values], best)]


def _whole(runs: Sequence[ComparedRun]) -> list[FigureRow]:
    rows = [FigureRow(say("compare-state"), [run.state for run in runs])]
    seconds = [total_seconds(run.findings) for run in runs]
    rows += _row(say("time"), [Text.same(duration(time)) if time else None for time in seconds])
    joules = [sum(time.joules or 0 for time in run.findings.times) for run in runs]
    rows += _row(say("energy"), [Text.same(energy(used)) if used else None for used in joules])
    right = [_right(run) for run in runs]
    return rows + _row(say("right_tile"), right)


def _right(run: ComparedRun) -> Text | None:
    """`base → newest model`, as 1/5 → 4/5."""
    stages = list(run.findings.answers)
    counts = [run.findings.right_answers(stage) for stage in dict.fromkeys((*stages[:1], *stages[-1:]))]
    if not any(judged for _, judged in counts):
        return None
    return Text.same(" → ".join(f"{right}/{judged}" for right, judged in counts))


def _training(runs: Sequence[ComparedRun], stage: str) -> list[FigureRow]:
    trainings = [run.findings.training.get(stage) for run in runs]
    facts = [dict(training_facts(training)) if training else {} for training in trainings]
    lowest = [_lowest(training) if training else None for training in trainings]
    rows = []
    for name in dict.fromkeys(name for known in facts for name in known):
        rows += _row(name, [known.get(name) for known in facts])
    trained = [run for run in runs if stage in run.findings.training]
    comparable = len(trained) > 1 and validation_is_same(trained, stage) is True and _same_loss(trained, stage)
    best = _best([found and found[0] for found in lowest]) if comparable else frozenset()
    texts = [say("compare-lowest", loss=found[0], step=f"{found[1]:,.0f}") if found else None for found in lowest]
    rows += _row(say("compare-lowest-loss"), texts, best)
    for code, metric in (("accuracy_tile", "rewards/accuracies"), ("compare-margin", "rewards/margins")):
        values = [at_end(training, metric) if training else None for training in trainings]
        form = ".1%" if code == "accuracy_tile" else ".3f"
        rows += _row(say(code), [None if value is None else Text.same(format(value, form)) for value in values])
    sizes = [run.adapters.get(stage) for run in runs]
    return rows + _row(say("compare-adapter"), [size(byte_count) if byte_count else None for byte_count in sizes])


def _lowest(training: TrainingResult) -> tuple[float, float] | None:
    """The lowest validation loss and its step."""
    return min(((loss, step) for step, loss in training.points("eval_loss")), default=None)


def _same_loss(runs: Sequence[ComparedRun], stage: str) -> bool:
    return stage == "sft" or len({str(mapped(run.recipe.get("dpo")).get("loss")) for run in runs}) == 1


def _best(values: Sequence[float | None]) -> frozenset[int]:
    known = [value for value in values if value is not None]
    if len(known) < 2 or min(known) == max(known):
        return frozenset()
    return frozenset(at for at, value in enumerate(values) if value == min(known))


def _exports(runs: Sequence[ComparedRun]) -> list[FigureRow]:
    """The size of every format, and how far it is from base + adapter."""
    rows = []
    for kind in dict.fromkeys(kind for run in runs for kind in run.findings.export):
        written = [mapped(run.findings.export.get(kind)) for run in runs]
        sizes = [facts.get("size") for facts in written]
        texts = [size(byte_count) if is_finite(byte_count) and byte_count else None for byte_count in sizes]
        rows += _row(say("compare-export-size", format=kind), texts)
        lost = [mapped(facts.get("fidelity")).get("kl") for facts in written]
        rows += _row(
            say("compare-export-kl", format=kind),
            [Text.same(f"{kl:.4f}") if is_finite(kl) else None for kl in lost],
        )
    return rows


def size(byte_count: float) -> Text:
    """Bytes as text, the same in both languages: 950 kB, 12.4 MB, 4.52 GB."""
    if byte_count >= 1e9:
        return Text.same(f"{byte_count / 1e9:.2f} GB")
    return Text.same(f"{byte_count / 1e6:.1f} MB" if byte_count >= 1e6 else f"{byte_count / 1e3:.0f} kB")


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to a prompt; None where it was not asked."""

    text: str | None
    right: bool | None  # whether it contains what is expected; None where nothing is


@dataclass(frozen=True)
class ComparedAnswers:
    """The same prompts with the answers of all runs."""

    columns: list[Text]  # the common base where there is one, then a model of each run
    prompts: list[tuple[str, list[Answer]]]


def compared_answers(runs: Sequence[ComparedRun], stage: str | None = None) -> ComparedAnswers | None:
    """Every prompt that a run has asked, in the order of the runs; None without any answer."""
    shown: list[tuple[ComparedRun, str | None]] = [
        (run, run.newest(list(run.findings.answers)) if stage is None else _asked(run, stage)) for run in runs
    ]
    if not any(model for _, model in shown):
        return None
    base = _common_base(runs)
    first: list[tuple[ComparedRun, str | None]] = [(base, "base")] if base and _asked_more(shown) else []
    columns = [named("base")] if first else []
    columns += [model_name(run, model) for run, model in shown]
    prompts = list(dict.fromkeys(prompt for run in runs for prompt in run.findings.prompts))
    return ComparedAnswers(
        columns, [(prompt, [_answer(run, model, prompt) for run, model in (*first, *shown)]) for prompt in prompts]
    )


def _asked(run: ComparedRun, stage: str) -> str | None:
    return stage if stage in run.findings.answers else None


def _asked_more(shown: Sequence[tuple[ComparedRun, str | None]]) -> bool:
    """Whether models other than the base have answered."""
    return any(model not in (None, "base") for _, model in shown)


def _common_base(runs: Sequence[ComparedRun]) -> ComparedRun | None:
    """The first run with the base's answers, if all runs that have them have the same ones to the same prompts."""
    having = [run for run in runs if "base" in run.findings.answers]
    answers = [(run.findings.prompts, run.findings.answers["base"]) for run in having]
    return having[0] if having and all(pair == answers[0] for pair in answers) else None


def _answer(run: ComparedRun, model: str | None, prompt: str) -> Answer:
    findings = run.findings
    if model is None or prompt not in findings.prompts:
        return Answer(None, None)
    number, answers = findings.prompts.index(prompt), findings.answers[model]
    if number >= len(answers):
        return Answer(None, None)
    return Answer(answers[number], findings.is_right(model, number))
