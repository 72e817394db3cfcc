"""Prepare a recipe's data for a training stage: resolve its sources, prepare them once, report on their rows."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from mlx_zh.corpus.build import prepare
from mlx_zh.corpus.choosing import NEAR_DUPLICATE, ChoiceSettings
from mlx_zh.corpus.data_files import TABLE_SUFFIXES, NoDataFiles, folder_files, registered_files
from mlx_zh.corpus.hub_rows import rows_file
from mlx_zh.corpus.prepared import Corpus, CorpusSettings, Exams
from mlx_zh.corpus.registry import Registry, find_data_set, load_registry
from mlx_zh.corpus.selecting import SelectSettings
from mlx_zh.corpus.shards import RenderSettings
from mlx_zh.corpus.sources import DataSource
from mlx_zh.corpus.statistics import CorpusReport
from mlx_zh.corpus.tables import is_saved, saved_files
from mlx_zh.errors import DataError, DownloadError
from mlx_zh.exams.archives import benchmark_folder
from mlx_zh.exams.catalog import benchmark
from mlx_zh.language.notice import Notice
from mlx_zh.language.translation import in_readers_language
from mlx_zh.recipe import DataSet, Recipe, Source, placeholders
from mlx_zh.stages.row_scores import ModelScorer, scorer_of
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console, storage
from mlx_zh.system.json_text import read_object
from mlx_zh.system.storage import write_json

if TYPE_CHECKING:
    from mlx_zh.corpus.joined_encoding import Vocabulary
    from mlx_zh.corpus.render import Renderer

_COLUMNS, _COLUMN = 12, 40  # unused columns that are named, and characters of a name
_MANY_NEAR = 20  # near duplicates of a source; with fewer than this, nothing is said


class TrainingTokens(TypedDict):
    """How much a training stage will read."""

    epochs: float  # passes over the training data
    estimated_training_tokens: int  # in all of them


class StageReport(TrainingTokens, CorpusReport):
    """A stage's part of `data/report.json` in the run folder."""

    key: str  # of the corpus
    folder: str  # of the corpus


def registry_of(recipe: Recipe | None) -> Registry:
    """The data sets that a recipe can name: the built-in ones and its own. Raises DataError."""
    if recipe is None:
        return load_registry()
    file = recipe.data.registry_file
    return load_registry(recipe.data.registry, None if file is None else Path(file))


def prepare_stage(
    recipe: Recipe, stage: str, renderer: Renderer, vocabulary: Callable[[], Vocabulary | None] | None = None
) -> Corpus:
    """The examples of `stage` (sft or dpo), prepared unless they are cached; prints a line for each source.

    Raises DataError for data that cannot be used, DownloadError for data that cannot be fetched, and TemplateError if
    the data has conversations and the model no chat template.
    """
    if stage == "dpo":
        renderer.check_template()
    split = recipe.data.split(stage)
    registry = registry_of(recipe)
    sources = [
        replace(
            resolve_source(source, registry, stage, recipe.seed, validation=validation, hub=recipe.model.hub),
            variables=recipe.data.variables,
        )
        for validation, listed in ((False, split.train), (True, split.validation))
        for source in listed
    ]
    scorer = scorer_of(recipe, stage)
    settings = replace(_settings(recipe, stage), select=_selection(recipe, stage, scorer))
    with _Bars() as bars:
        corpus = prepare(
            sources, settings, renderer, storage.cache_folder() / "corpus", bars.event, vocabulary, scorer
        )
    for remark in corpus.remarks:
        console.warn(remark, keep=False)  # the data is as it was
    report, unit = corpus.manifest["report"], recipe.unit(stage)
    for line in (*source_lines(report, unit), *quality_lines(report)):
        console.say(line)
    if recipe.kind(stage) == "kto":
        labels = corpus.answers("train").labels
        good = int(labels.sum())
        console.say(f"KTO learns from {good} good and {len(labels) - good} bad answers.")
    for reported in corpus.manifest["report"]["sources"]:
        if reported["unused"]:
            listed = [name[:_COLUMN] for name in reported["unused"][:_COLUMNS]]
            console.warn(Notice("columns-not-used", source=reported["name"], columns=listed), keep=False)
        near = reported["dropped"].get(NEAR_DUPLICATE, 0)
        if near >= _MANY_NEAR and near > reported["rows"] // 2:
            told = Notice("near-duplicates-many", source=reported["name"], count=near, rows=reported["rows"])
            console.warn(told, keep=False)
    for warning in unused_variables(recipe, stage, corpus.manifest["report"]):
        console.warn(warning, keep=False)
    # A cached corpus may come from a run that did not ask for these exams, or had other reasons.
    corpus.manifest["report"]["exam_questions"]["missing"] = settings.exams.missing
    for name, reason in settings.exams.missing.items():
        warning = Notice("stage-exam-questions-not-checked", stage=stage, exam=name, reason=reason)
        console.warn(warning, keep=False)  # the corpus's report records it
    return corpus


def unused_variables(recipe: Recipe, stage: str, report: CorpusReport) -> list[Notice]:
    """A warning for each variable that no row of the stage names, nor the system message, nor a prompt.

    DPO's rows often name none of the variables of SFT, so DPO's are looked at only if there is no SFT.
    """
    if not recipe.data.variables or (stage == "dpo" and recipe.data.sft.train):
        return []
    prompts = [p if isinstance(p, str) else f"{p.prompt} {p.expect}" for p in recipe.evaluate.prompts]
    elsewhere = placeholders(" ".join([recipe.data.system or "", *prompts]))
    in_rows = list(dict.fromkeys(name for source in report["sources"] for name in source["placeholders"]))
    unknown = {name.casefold(): name for name in [*in_rows, *elsewhere] if name not in recipe.data.variables}
    warnings = []
    for name in recipe.data.variables:
        if name in in_rows or name in elsewhere:
            continue
        nearest = difflib.get_close_matches(name.casefold(), unknown, n=1, cutoff=0)
        if nearest:
            seen = unknown[nearest[0]]
            warnings.append(Notice("variable-in-no-row-but-another", stage=stage, name=name, seen=seen))
        else:
            warnings.append(Notice("variable-in-no-row", stage=stage, name=name))
    return warnings


def save_report(recipe: Recipe, stage: str, corpus: Corpus) -> Path:
    """Write the corpus's report into `data/report.json` of the run folder, under its stage; returns the path."""
    path = RunFolder.of(recipe).prepared
    reports = read_object(path) or {}
    report = corpus.manifest["report"]
    entry: StageReport = {
        "key": corpus.key,
        "folder": str(corpus.folder),
        **training_tokens(recipe, stage, report),
        **report,
    }
    if reports.get(stage) != entry:
        write_json(path, reports | {stage: entry})
    return path


def training_tokens(recipe: Recipe, stage: str, report: CorpusReport) -> TrainingTokens:
    """The epochs of a stage, and about how many tokens these are."""
    section = recipe.training(stage)
    epochs = section.epochs
    if section.max_steps is not None:
        epochs = section.max_steps * section.batch_size / report["train"]["examples"]
    return {"epochs": round(epochs, 3), "estimated_training_tokens": round(report["train"]["tokens"] * epochs)}


def file_digests(corpus: Corpus) -> dict[str, str]:
    """SHA-256 (64 hex digits) of each data file of a corpus, by path."""
    sources = zip(corpus.manifest["report"]["sources"], corpus.manifest["made_of"]["sources"], strict=True)
    return {
        path: digest
        for reported, digests in sources
        for path, digest in zip(reported["files"], digests["files"], strict=True)
    }


def source_lines(report: CorpusReport, unit: str) -> list[str]:
    """A line for each source: the number of its examples, and why its other rows were dropped."""
    lines = []
    for source in report["sources"]:
        train, held_out = source["train"], source["validation"]
        notes = [in_readers_language(f"{held_out} of them for validation")] if train and held_out else []
        notes += [f"{count} {in_readers_language(reason)}" for reason, count in source["dropped"].items()]
        notes += [f"{source['cut_short']} {in_readers_language('cut short')}"] if source["cut_short"] else []
        lines.append(f"{source['name']}: {train + held_out} {unit}" + (f" ({', '.join(notes)})" if notes else ""))
    return lines


def quality_lines(report: CorpusReport) -> list[str]:
    """A line for each source with rows that have a fault, by the rule's key, and what to do about them."""
    lines = []
    for source in report["sources"]:
        faults = []
        for name, rule in source.get("quality", {}).items():
            done = f" ({rule['action']})" if rule["action"] in ("drop", "mask") else ""
            if rule["rows"]:
                faults.append(f"{name} {rule['rows']:,}/{rule['checked']:,}{done}")
        if faults:
            lines.append(f"{source['name']}: rows with faults: {', '.join(faults)}")
    if lines:
        lines.append(
            "Quality counts rows with a fault, of the rows that were checked. Examples are in the report; "
            "data.quality.RULE=drop leaves such rows out."
        )
    return lines


def resolve_source(
    source: Source, registry: Registry, stage: str, seed: int, *, validation: bool, hub: str = "auto"
) -> DataSource:
    """The files of a source: its own, or those of a registered data set. An existing path goes before a name.

    Raises DataError, DownloadError.
    """
    entry: DataSet | None = None
    path = None if source.path is None else Path(expanduser(source.path))
    if source.name is not None:
        entry = find_data_set(source.name, registry)
    elif path is not None and not path.exists():
        entry, path = find_data_set(str(source.path), registry), None
    if entry is not None:
        require_kind(source, entry, stage)
    generate = None
    if path is not None:
        files = _files_at(path, source, entry)
    elif entry is not None and entry.hub == "generated":
        _refuse(source, "is generated", "subset", "split", "revision", "streaming")
        files, generate = [], (seed, source.max_samples or entry.rows or 10_000)
    else:
        assert entry is not None
        files = _files_of(source, entry, hub)
    return DataSource(
        name=source.label,
        files=tuple(map(str, files)),
        format=entry.format if entry is not None and source.format == "auto" else source.format,
        columns=source.columns or (entry.columns if entry is not None else {}),
        sheet=source.sheet,
        max_samples=source.max_samples,
        weight=source.weight,
        near_duplicates=entry.near_duplicates if entry is not None else True,
        validation=validation,
        generate=generate,
    )


def require_kind(source: Source, entry: DataSet, stage: str) -> None:
    """Raise DataError if a registered set is for another stage than `stage`."""
    if entry.kind != stage:
        raise DataError(
            f"{source.label} is a data set for {entry.kind}, so it cannot be used in data.{stage}; list it in "
            f"data.{entry.kind}"
        )


def require_fitting_keys(source: Source, entry: DataSet) -> None:
    """Raise DataError if a source sets a key that does not apply to its registered set."""
    if entry.hub != "huggingface":
        _refuse(source, f"comes from {entry.hub}, not from huggingface", "subset", "streaming")
    if entry.hub == "url":
        _refuse(source, "is one file", "split", "revision")


def _files_at(path: Path, source: Source, entry: DataSet | None) -> list[Path]:
    """The files of a local source: the file itself, or those of a folder."""
    _refuse(source, f"is read from {path}", "subset", "revision", "streaming")
    if not path.is_dir():
        _refuse(source, f"is the file {path}", "split")
        return [path]
    if is_saved(path):
        return saved_files(path, source.split)
    return folder_files(path, () if entry is None else entry.files, source.split or "train")


def _files_of(source: Source, entry: DataSet, hub: str) -> list[Path]:
    """The files of a registered data set, downloaded unless cached; `hub_rows` reads some sets row by row."""
    require_fitting_keys(source, entry)
    if entry.hub == "file" and is_saved(folder := Path(expanduser(entry.id))):
        return saved_files(folder, source.split or entry.split)
    given = source.model_dump(include={"subset", "split", "revision", "streaming"}, exclude_none=True)
    entry = entry.model_copy(update=given)
    if entry.subset or entry.streaming:
        return [_rows_of(source, entry)]
    try:
        return registered_files(source.label, entry, console.DownloadBar(), hub)
    except NoDataFiles:
        if entry.files or entry.hub != "huggingface":
            raise
    try:
        tables = entry.model_copy(update={"files": tuple(f"*{suffix}" for suffix in TABLE_SUFFIXES)})
        return registered_files(source.label, tables, console.DownloadBar(), hub)
    except NoDataFiles:
        return [_rows_of(source, entry)]


def _rows_of(source: Source, entry: DataSet) -> Path:
    """The file of a data set that is read row by row, with a progress bar."""
    bar = console.RowBar(source.label)
    try:
        return rows_file(source.label, entry, source.max_samples, bar.reach)
    finally:
        bar.close()


def _refuse(source: Source, reason: str, *keys: str) -> None:
    """Raise DataError if the source sets one of `keys`, which do not apply to it."""
    given = [key for key in keys if getattr(source, key)]
    if given:
        raise DataError(f"{source.label} {reason}: `{given[0]}` does not apply; leave it out")


def _settings(recipe: Recipe, stage: str) -> CorpusSettings:
    data = recipe.data
    return CorpusSettings(
        render=RenderSettings(
            recipe.kind(stage),
            data.train_on if stage == "sft" else "assistant",
            data.max_length,
            data.on_overflow if stage == "sft" else "drop",
            recipe.system_message(),
        ),
        choice=ChoiceSettings(
            exact=data.deduplicate.exact,
            near=data.deduplicate.near,
            mixing=data.mixing,
            validation_fraction=data.validation_fraction,
            seed=recipe.seed,
        ),
        exams=_exams(recipe),
        near_ngram=data.deduplicate.ngram,
        on_invalid=data.on_invalid,
        normalize=data.normalize,
        simplify=data.simplify,
        quality=data.quality.actions,
    )


def _selection(recipe: Recipe, stage: str, scorer: ModelScorer | None) -> SelectSettings | None:
    select = recipe.data.split(stage).select
    if select is None:
        return None
    model = "" if scorer is None else scorer.digest
    return SelectSettings(tuple(select.method), select.count, select.fraction, select.per_source, model)


def _exams(recipe: Recipe) -> Exams:
    """The exams to keep out of the data: from `evaluate.folder`, else from the hub.

    An exam that cannot be downloaded is listed as missing.
    """
    settings = recipe.data.decontaminate
    given = {str(name): folder for name, folder in recipe.evaluate.folder.items()}
    folders: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name in recipe.evaluate.benchmarks if settings.benchmarks is None else settings.benchmarks:
        if name not in ("ceval", "cmmlu"):  # an exam of the user's own
            continue
        try:
            hub = recipe.evaluate.hub or recipe.model.hub
            folders[name] = given.get(name) or str(benchmark_folder(benchmark(name), hub, console.DownloadBar()))
        except DownloadError as error:
            missing[name] = str(error)
    return Exams(folders, missing, settings.ngram, settings.overlap)


class _Bars:
    """Progress bars for the two passes over the rows: reading and tokenizing."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._bar: console.RowBar | None = None
        self._pass = ""

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def event(self, kind: str, name: str, rows: int) -> None:
        """Note that `rows` rows of source `name` are done in pass `kind`."""
        if kind != self._pass or self._bar is None:
            self.__exit__()
            self._pass, self._bar, self._rows = kind, console.RowBar("reading" if kind == "scan" else "tokens"), {}
        self._rows[name] = rows
        self._bar.reach(sum(self._rows.values()))
