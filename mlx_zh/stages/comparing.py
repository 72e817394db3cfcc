"""Reads the runs of a comparison from their folders, whatever state they are in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser, isdir, isfile
from pathlib import Path

from mlx_zh.errors import DataError, MlxZhError
from mlx_zh.language.catalogue import Language
from mlx_zh.language.translation import in_readers_language
from mlx_zh.recipe import Evaluate, Recipe, load_recipe
from mlx_zh.reporting.compare_view import MOST, Comparison
from mlx_zh.reporting.comparison import ComparedRun
from mlx_zh.reporting.findings import Alarm, gather
from mlx_zh.reporting.messages import Text, say
from mlx_zh.stages.budgeting import decided
from mlx_zh.stages.command import find_recipe, run_of
from mlx_zh.stages.current_models import current_models
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.stages.run_list import RunList, key_of
from mlx_zh.system.escaping import one_line
from mlx_zh.system.redaction import hide, hide_all, redacted

_DEFAULT = Evaluate()
_NAME = 60  # characters of the runs' names in that of the page; a Chinese one has three bytes, and 255 are allowed
_LANGUAGES: tuple[Language, Language] = ("zh", "en")  # in the order of a `Text`
_BEGINS = b'<!doctype html>\n<html lang="zh-Hans" data-zh="'  # of a page that this program wrote


@dataclass(frozen=True)
class Chosen:
    """A run to compare: its folder, and a recipe file that names it, for a folder that has none."""

    run: RunFolder
    file: Path | None = None


def chosen_runs(targets: Sequence[str], overrides: Sequence[str] = ()) -> list[Chosen]:
    """The runs that the targets name, each a recipe file, or the name or folder of a run.

    Raises RecipeError, and DataError if one has not been run or is named twice.
    """
    return checked([_chosen(target, overrides) for target in targets])


def checked(chosen: list[Chosen]) -> list[Chosen]:
    """The runs as they are. Raises DataError if one is there twice, or for too few or too many."""
    if not 2 <= len(chosen) <= MOST:
        raise DataError(f"a comparison is of 2 to {MOST} runs, got {len(chosen)}.")
    places = [each.run.path.resolve() for each in chosen]
    for at, place in enumerate(places):
        if place in places[:at]:
            raise DataError(f"{chosen[at].run.path} is there twice; choose runs that differ.")
    return chosen


def _chosen(target: str, overrides: Sequence[str]) -> Chosen:
    if (run := run_of(target, overrides)) is not None:
        return Chosen(run)
    if isfile(target):
        run = RunFolder.of(find_recipe(target, overrides))
        if not run.path.is_dir():
            raise DataError(
                f"{run.path} does not exist: {target} has not been run yet. Run `mlx-zh run {target}` first."
            )
        return Chosen(run, Path(target))
    bare = [expanduser(target), str(Path(_runs(overrides)) / target)]
    folder = next((Path(path) for path in bare if isdir(path) and _has_begun(RunFolder(Path(path)))), None)
    if folder is not None:
        return Chosen(RunFolder(folder))
    find_recipe(target, overrides)  # says what is there instead
    raise DataError(f"{target} is no run.")


def _runs(overrides: Sequence[str]) -> str:
    given = [text.partition("=")[2] for text in overrides if text.startswith("runs=")]
    return expanduser(given[-1] if given else str(Recipe.model_fields["runs"].default))


def _has_begun(run: RunFolder) -> bool:
    """Whether a folder without a recipe is that of a run all the same: it ended before it wrote one."""
    return any(path.exists() for path in (run.pipeline, run.manifest, run.prepared, run.budget))


def page_path(chosen: Sequence[Chosen], out: str | None) -> Path:
    """Where the page goes: `out`, or a name made of those of the runs beside the first of them.

    Raises DataError if it would replace a file that is no such page.
    """
    path = chosen[0].run.path.parent / page_name(chosen) if out is None else Path(expanduser(out))
    if path.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"{path}: the page is a web page; give --out a name that ends in .html.")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give --out the name of a file.")
    if path.exists() and not _is_page(path):
        raise DataError(f"{path} exists and was not written by this program; give --out another name.")
    return path


def page_name(chosen: Sequence[Chosen]) -> str:
    """`compare-RUN-RUN.html`; of long names the first, cut, and how many more."""
    names = [one_line(hide(each.run.path.resolve().name)) for each in chosen]
    joined = "-".join(names)
    if len(joined) > _NAME:
        joined = f"{names[0][:_NAME]}-and-{len(names) - 1}"
    return f"compare-{joined}.html"


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS
    except OSError:
        return False


def compared(chosen: Sequence[Chosen], stage: str | None = None) -> Comparison:
    """Everything that a comparison shows of the runs; `stage` is the model to compare, None for the newest of each.

    Raises MlxZhError for an adapter that cannot be read.
    """
    recipes = [_recipe(each) for each in chosen]
    names = _labels([each.run for each in chosen])
    runs = [_compared(*parts) for parts in zip(chosen, recipes, names, strict=True)]
    first = next((recipe for recipe, _ in recipes if recipe is not None), None)
    if first is None:
        return Comparison(runs, _DEFAULT.bootstrap, seed=0, stage=stage)
    return Comparison(runs, first.evaluate.bootstrap, first.seed, stage)


def _recipe(chosen: Chosen) -> tuple[Recipe | None, str]:
    """The recipe that a run used, or None and why it cannot be read."""
    file = chosen.run.recipe if isfile(chosen.run.recipe) else chosen.file
    if file is None:
        return None, ""
    try:
        recipe = load_recipe(file, beside=None) if file == chosen.run.recipe else load_recipe(file)
        place = {"runs": str(chosen.run.path.parent), "name": chosen.run.path.resolve().name}
        return decided(recipe.model_copy(update=place)), ""
    except MlxZhError as error:
        return None, str(error).split("\n")[0]


def _labels(runs: Sequence[RunFolder]) -> list[str]:
    """The name of each run; its folder where two have the same name."""
    names = [run.path.resolve().name for run in runs]
    shown = [str(run.path) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    return [one_line(hide(name)) for name in shown]


def _compared(chosen: Chosen, read: tuple[Recipe | None, str], label: str) -> ComparedRun:
    run, (recipe, reason) = chosen.run, read
    settings = _DEFAULT if recipe is None else recipe.evaluate
    findings = gather(
        run,
        "" if recipe is None else recipe.to_yaml(redacted),
        name=label,
        bootstrap=settings.bootstrap,
        seed=0 if recipe is None else recipe.seed,
        trains=[] if recipe is None else [stage for stage in TUNED if recipe.data.split(stage).train],
        current=current_models(run),
    )
    if recipe is None:
        why = Text.same(hide(reason)) if reason else say("compare-no-recipe")
        findings.alarms.insert(0, Alarm(say("recipe"), say("compare-recipe-unreadable", reason=why)))
    values = {} if recipe is None else hide_all(redacted(recipe.model_dump(mode="json", by_alias=True)))
    return ComparedRun(label, findings, run.exams, values, _state(run), _adapters(run))


def _state(run: RunFolder) -> Text:
    """How far the run got, as the list of runs has it."""
    info = RunList([run.path]).one(key_of(run.path))
    if info is None:
        return say("compare-state-waiting")
    if info.why is None:
        return say(f"compare-state-{'stopped' if info.state == 'failed' else info.state}")
    why = Text(*(hide(in_readers_language(info.why, language)) for language in _LANGUAGES))
    return say("compare-ended-failed" if info.state == "failed" else "compare-ended-stopped", why=why)


def _adapters(run: RunFolder) -> dict[str, int]:
    """Bytes of each adapter."""
    return {
        stage: sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
        for stage, folder in run.adapters().items()
    }
