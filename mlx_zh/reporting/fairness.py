"""What several runs have in common, and so which of their figures may be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_zh.reporting.compared_exams import ComparedExam, model_name
from mlx_zh.reporting.comparison import ComparedRun, flattened_recipe, shown
from mlx_zh.reporting.findings import is_finite, listed, mapped
from mlx_zh.reporting.messages import Text, joined, named, say

_DIGEST = 12  # hex digits shown

# What decides how a preference loss is computed, whatever the model.
_LOSS_KEYS = (
    "loss",
    "beta",
    "label_smoothing",
    "sft_weight",
    "ld_alpha",
    "f_divergence",
    "f_alpha",
    "simpo_gamma",
    "discopop_tau",
    "reference",
    "desirable_weight",
    "undesirable_weight",
)
# Keys of `data` that choose training rows, and so change nothing in a validation set of its own files.
_OF_TRAINING = ("train", "select", "deduplicate", "decontaminate", "mixing")


@dataclass(frozen=True, slots=True)
class Check:
    """Something that the runs should have in common."""

    what: Text
    same: bool | None  # None where it is not known of every run
    meaning: Text  # what follows for the figures
    values: list[str]  # by run
    decisive: bool = True  # whether figures of quality, not only of time, depend on it

    @property
    def status(self) -> str:
        """same, differs or unknown: the name of its style."""
        return _status(self.same)

    @property
    def said(self) -> Text:
        """The status in words, with a mark."""
        mark = {"same": "✓", "differs": "≠", "unknown": "?"}[self.status]
        text = say(f"compare-status-{self.status}")
        return Text(f"{mark} {text.zh}", f"{mark} {text.en}")


def _status(same: bool | None) -> str:
    return "unknown" if same is None else "same" if same else "differs"


def checks(runs: Sequence[ComparedRun], exams: Sequence[ComparedExam]) -> list[Check]:
    """Everything that was compared, the base model first."""
    return [
        _base(runs),
        *(check for stage in ("sft", "dpo") for check in _of_stage(runs, stage)),
        *(_exam(runs, exam) for exam in exams),
        *_prompts(runs),
        _seed(runs),
        _software(runs),
        _machine(runs),
    ]


def verdict(made: Iterable[Check]) -> tuple[bool, Text]:
    """Whether the comparison is fair, in a sentence that names what is not the same."""
    open_checks = [check.what for check in made if check.decisive and check.same is not True]
    if not open_checks:
        return True, say("compare-fair")
    return False, say("compare-not-fair", what=joined(open_checks))


def validation_is_same(runs: Sequence[ComparedRun], stage: str) -> bool | None:
    """Whether the runs have validated a stage on the same tokens; None where that is not known."""
    if _same_key(runs, stage):
        return True
    parts = [
        _equal([_base_of(run) for run in runs]),
        _equal([_files(run, stage, "validation") for run in runs]),
        _equal([_data_settings(run, stage) for run in runs]),
    ]
    return False if False in parts else None if None in parts else True


def _same_key(runs: Sequence[ComparedRun], stage: str) -> bool:
    """Whether the prepared data are the same, token for token."""
    keys = [str(_report(run, stage).get("key") or "") for run in runs]
    return all(keys) and len(set(keys)) == 1


def _equal(values: Sequence[object]) -> bool | None:
    """Whether all values are known (not None) and equal; None where one is not known."""
    return None if None in values else all(value == values[0] for value in values)


def _check(code: str, what: Text, same: bool | None, values: list[str], *, decisive: bool = True) -> Check:
    """A check whose meanings are the wordings `compare-check-CODE-same`, `-differs` and `-unknown`."""
    return Check(what, same, say(f"compare-check-{code}-{_status(same)}"), values, decisive)


def _base_of(run: ComparedRun) -> tuple[str, str] | None:
    """The files of the base and how they are loaded; None where that is not known."""
    fingerprint = run.model.get("fingerprint")
    if not fingerprint or not run.recipe:
        return None
    model = mapped(run.recipe.get("model"))
    return str(fingerprint), shown([f"{key}={shown(model.get(key))}" for key in ("dtype", "quantize")])


def _base(runs: Sequence[ComparedRun]) -> Check:
    values = []
    for run in runs:
        source, fingerprint = run.model.get("source"), str(run.model.get("fingerprint") or "")
        values.append(f"{source} ({fingerprint[:_DIGEST]})" if source else "–")
    return _check("base", say("model"), _equal([_base_of(run) for run in runs]), values)


def _report(run: ComparedRun, stage: str) -> Mapping[str, object]:
    return mapped(run.findings.data.get(stage))


def _files(run: ComparedRun, stage: str, side: str) -> tuple[tuple[object, object], ...] | None:
    """(digest, rows used) of each file for training or validation; None where one is not known."""
    digests = mapped(run.findings.manifest.get("data"))
    files = []
    for source in listed(_report(run, stage).get("sources")):
        rows = mapped(source).get(side)
        if is_finite(rows) and rows:
            names = listed(mapped(source).get("files"))
            if not names or any(str(name) not in digests for name in names):
                return None
            files += [(digests[str(name)], rows) for name in names]
    return tuple(files) or None


def _data_settings(run: ComparedRun, stage: str) -> tuple[tuple[str, str], ...] | None:
    """The settings that shape a validation set of its own files; None where the set is part of the training data."""
    data = mapped(run.recipe.get("data"))
    if not data or data.get("validation_fraction"):
        return None
    other = "dpo" if stage == "sft" else "sft"
    values = [*flattened_recipe(data), ("thinking", mapped(run.recipe.get("model")).get("thinking"))]
    return tuple((key, shown(value)) for key, value in values if not {*key.split(".")} & {other, *_OF_TRAINING})


def _of_stage(runs: Sequence[ComparedRun], stage: str) -> list[Check]:
    """The data and the loss of a training stage, if two runs or more have trained it."""
    trained = [run for run in runs if stage in run.findings.training]
    if len(trained) < 2:
        return []
    values = [_data_value(run, stage, "train") for run in runs]
    made = [replace(_training_data(trained, stage), values=values)]
    validated = [run for run in trained if run.findings.training[stage].validations]
    if len(validated) > 1:
        what = say("compare-validation", stage=named(stage))
        values = [_data_value(run, stage, "validation") for run in runs]
        made.append(_check("validation", what, validation_is_same(validated, stage), values))
    return [*made, _loss(runs, trained)] if stage == "dpo" else made


def _training_data(trained: Sequence[ComparedRun], stage: str) -> Check:
    what = say("compare-data", stage=named(stage))
    same_files = _equal([_files(run, stage, "train") for run in trained])
    if _same_key(trained, stage) or not same_files:
        same = True if _same_key(trained, stage) else same_files
        return _check("data", what, same, [], decisive=False)
    return Check(what, False, say("compare-data-prepared"), [], decisive=False)


def _data_value(run: ComparedRun, stage: str, side: str) -> str:
    report = _report(run, stage)
    names = [
        f"{mapped(source).get('name')} ({rows:,.0f})"
        for source in listed(report.get("sources"))
        if is_finite(rows := mapped(source).get(side)) and rows
    ]
    return ", ".join(names) or "–"


def _loss(runs: Sequence[ComparedRun], trained: Sequence[ComparedRun]) -> Check:
    """The settings of the preference loss."""
    settings = {id(run): _loss_settings(run) for run in runs}
    values = [", ".join(f"{key} {value}" for key, value in settings[id(run)] or ()) or "–" for run in runs]
    if all(settings.values()):  # only those that differ, and the loss itself
        unlike = {pair[0] for run in runs for pair in set(settings[id(run)] or ()) ^ set(settings[id(runs[0])] or ())}
        kept = {"loss", *unlike}
        values = [", ".join(f"{key} {v}" for key, v in settings[id(run)] or () if key in kept) for run in runs]
    return _check("loss", say("compare-loss"), _equal([settings[id(run)] for run in trained]), values)


def _loss_settings(run: ComparedRun) -> tuple[tuple[str, str], ...] | None:
    dpo = mapped(run.recipe.get("dpo"))
    return tuple((key, shown(dpo[key])) for key in _LOSS_KEYS if key in dpo) or None


def _exam(runs: Sequence[ComparedRun], exam: ComparedExam) -> Check:
    taken = [at for at, stage in enumerate(exam.stages) if stage is not None]
    values = [_exam_value(run, exam) for run in runs]
    what = Text.same(exam.title)
    if len(taken) < len(runs):
        missing = Text.same(", ".join(runs[at].label for at in range(len(runs)) if at not in taken))
        if len(taken) < 2:
            return Check(what, None, say("compare-exam-alone", runs=missing), values)
        return Check(what, None, say("compare-exam-missing", runs=missing), values)
    reasons = dict.fromkeys(exam.untested.values())
    if reasons:
        return Check(what, False, joined(list(reasons)), values)
    if len({exam.stages[at] for at in taken}) > 1:
        models = joined([model_name(runs[at], exam.stages[at]) for at in taken])
        return Check(what, False, say("compare-exam-stages", models=models), values)
    return Check(what, True, say("compare-exam-same"), values)


def _exam_value(run: ComparedRun, exam: ComparedExam) -> str:
    own = next((result for result in run.findings.exams if result.key == exam.key), None)
    return "–" if own is None else f"{own.split}, {own.questions:,}, {own.protocol}"


def _prompts(runs: Sequence[ComparedRun]) -> list[Check]:
    asked = [run for run in runs if run.findings.prompts]
    if len(asked) < 2:
        return []
    values = [f"{len(run.findings.prompts):,}" if run.findings.prompts else "–" for run in runs]
    settings: list[object] = [
        (
            tuple(run.findings.prompts),
            shown(_at(run, "data", "system")),
            shown(_at(run, "evaluate", "max_new_tokens")),
        )
        for run in asked
    ]
    return [_check("prompts", say("compare-prompts"), _equal(settings), values, decisive=False)]


def _at(run: ComparedRun, section: str, key: str) -> object:
    return mapped(run.recipe.get(section)).get(key)


def _seed(runs: Sequence[ComparedRun]) -> Check:
    seeds = [run.recipe.get("seed") for run in runs]
    values = [shown(seed) if seed is not None else "–" for seed in seeds]
    return _check("seed", say("compare-seed"), _equal(seeds), values, decisive=False)


def _software(runs: Sequence[ComparedRun]) -> Check:
    values, known = [], []
    for run in runs:
        versions = mapped(run.findings.manifest.get("versions"))
        named_versions = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        commit = str(run.findings.manifest.get("git_commit") or "")[:_DIGEST]
        values.append(", ".join(filter(None, (named_versions, commit))) or "–")
        known.append((named_versions, commit) if versions else None)
    return _check("software", say("versions"), _equal(known), values, decisive=False)


def _machine(runs: Sequence[ComparedRun]) -> Check:
    values = []
    for run in runs:
        described = mapped(run.findings.manifest.get("machine"))
        values.append(", ".join(str(value) for value in described.values() if value) or "–")
    known: list[object] = [None if value == "–" else value for value in values]
    return _check("machine", say("machine"), _equal(known), values, decisive=False)
