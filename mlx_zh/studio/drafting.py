"""Answers what the page New run asks about models, data and plans, in a process of its own. See `worker`.

Nothing here computes anything that the commands `init` and `plan` compute otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.errors import DataError, MlxZhError
from mlx_zh.language.translation import in_readers_language
from mlx_zh.studio.recipe_check import check_recipe
from mlx_zh.studio.yaml_edit import with_value
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.redaction import printable

if TYPE_CHECKING:
    from mlx_zh.core.families import Config
    from mlx_zh.corpus.survey import Survey
    from mlx_zh.planning.pace import Pace
    from mlx_zh.recipe import Memory, Recipe
    from mlx_zh.stages.memory_check import Machine

_EXAMPLE = 80  # characters of a column's example
_COLUMNS = 40  # columns that are listed
Values = Mapping[str, Any]


class Desk:
    """The files that were looked at, and the speeds that were measured."""

    def __init__(self, project: Path) -> None:
        self._project = project
        self._looked: dict[str, list[Survey]] = {}
        self._paces: dict[str, Pace] = {}
        self.answers: Mapping[str, Callable[..., Any]] = {
            "models": self.models,
            "sets": self.sets,
            "look": self.look,
            "samples": self.samples,
            "draft": self.draft,
            "memory": self.memory,
            "time": self.time,
            "problems": self.problems,
        }

    def models(self) -> list[dict[str, Any]]:
        """The models by short name: size, whether they are on this disk, what they suit."""
        from mlx_zh.language.reader import reader_language
        from mlx_zh.models import catalog, wheel
        from mlx_zh.models.load import BUILT_IN, hub_ids
        from mlx_zh.stages.own_models import suggested_model
        from mlx_zh.system import hub

        suggested = suggested_model()
        listed = []
        for name, model in catalog.catalog().items():
            here = wheel.location().is_file() if name == BUILT_IN else hub.cached(name, ids=hub_ids(name)) is not None
            listed.append(
                {
                    "name": name,
                    "size_gb": model.size_gb,
                    "here": here,
                    "suits": model.suits.zh if reader_language() == "zh" else model.suits.en,
                    "licence": model.licence,
                    "suggested": name == suggested,
                }
            )
        return listed

    def sets(self) -> list[dict[str, Any]]:
        """The public data sets by name."""
        from mlx_zh.corpus.registry import load_registry

        return [
            {
                "name": name,
                "kind": entry.kind,
                "rows": entry.rows,
                "size_mb": entry.size_mb,
                "licence": entry.licence,
                "note": in_readers_language(entry.note),
            }
            for name, entry in load_registry().items()
            if entry.hub != "file"
        ]

    def look(self, files: Sequence[Values]) -> dict[str, Any]:
        """What is in the files: rows, columns, what cannot be used, and what they are good for."""
        from mlx_zh.stages.first_recipe import USES, check_use, default_use
        from mlx_zh.stages.interview import default_name

        reports = [self._report(file) for file in files]
        surveys = self._surveys(files)
        uses = []
        for use in USES:
            try:
                check_use(use, surveys)
            except MlxZhError:
                continue
            uses.append(use)
        use = default_use(surveys) if surveys else "sft"
        name = default_name(surveys[0].path) if surveys else "my-model"
        return {"files": reports, "uses": uses, "use": use, "name": name}

    def samples(self, files: Sequence[Values], model: str) -> list[dict[str, Any]]:
        """Three rows as the model will see them: place, parts of text with whether they are learned, label."""
        from mlx_zh.stages.sample_rows import samples_of
        from mlx_zh.stages.showing import visible

        return [
            {
                "place": sample.place,
                "parts": [(visible(text), learned) for text, learned in sample.segments if text],
                "label": sample.label,
            }
            for sample in samples_of(self._surveys(files), model)
        ]

    def draft(
        self, name: str, model: str, budget: str | None, use: str, files: Sequence[Values], sets: Sequence[str]
    ) -> str:
        """The first recipe for the choices, as `mlx-zh init` writes it. Registered sets are added to its data."""
        from mlx_zh.recipe import Memory
        from mlx_zh.stages.first_recipe import Choices, recipe_text
        from mlx_zh.stages.own_models import fitting_memory

        path = self._project / f"{name}.yaml"
        surveys = self._surveys(files)
        choices = Choices(name, model, budget, use)  # type: ignore[arg-type]

        def text_with(memory: Memory) -> str:
            if surveys:
                text = recipe_text(path, surveys, choices, memory)
            else:
                text = _bare(choices.name, choices.model, choices.budget)
                for key, value in memory.model_dump(exclude_defaults=True).items():
                    text = with_value(text, ["memory", key], value)
            return _with_sets(text, sets, use)

        text = text_with(Memory())
        recipe, _ = check_recipe(text, path)
        return text if recipe is None else text_with(fitting_memory(recipe))

    def memory(self, text: str, file: str) -> dict[str, Any]:
        """Whether each stage fits into this machine's memory, and what must be downloaded."""
        from mlx_zh.planning.workload import stages_of
        from mlx_zh.stages import memory_check
        from mlx_zh.stages.data import registry_of
        from mlx_zh.stages.needs import disk_bytes, downloads_of

        recipe = self._recipe(text, file)
        machine = memory_check.this_machine()
        stages = stages_of(recipe) or ("sft",)
        config = _config(recipe)
        wanted = downloads_of(
            recipe, registry_of(recipe), (*stages, *(("eval",) if recipe.evaluate.benchmarks else ()))
        )
        verdicts = []
        for stage in stages if config is not None else ():
            step = memory_check.training_step(recipe, stage, config or {}, machine)
            estimate = step.memory(recipe.memory)
            fits = estimate.peak <= machine.budget
            way = "" if fits else in_readers_language(memory_check.suggestion(step, recipe.memory, machine))
            fitting = None if fits else _fitting(step, recipe.memory, machine)
            verdicts.append({"stage": stage, "peak": estimate.peak, "fits": fits, "way": way, "fitting": fitting})
        return {
            "budget": machine.budget,
            "place": in_readers_language(machine.name),
            "stages": verdicts,
            "downloads": [{"name": item.name, "gigabytes": item.gigabytes} for item in wanted],
            "disk": disk_bytes(recipe, config) if config is not None else None,
            "free": shutil.disk_usage(self._project).free,
        }

    def time(self, text: str, file: str, measured: bool = True) -> dict[str, Any] | None:
        """How the time of the run is spent, by this machine's speed; None if that is not known."""
        from mlx_zh.stages import memory_check
        from mlx_zh.stages.budgeting import decision_for, record_of

        recipe = self._recipe(text, file)
        config = _config(recipe)
        if config is None:
            return None
        machine = memory_check.this_machine()
        pace, how = self._pace(recipe, config, machine, measured)
        if pace is None:
            return None
        costs, decision = decision_for(recipe, config, machine, pace)
        record = record_of(recipe, costs, decision, pace)
        return {
            "how": how,
            "seconds": record["seconds"],
            "steps": record["steps"],
            "full_steps": record["full_steps"],
            "total": decision.total,
            "rows": {stage: round(s.examples) for stage, s in ((c.name, c) for c in costs.trainings)},
        }

    def problems(self, text: str, file: str) -> list[dict[str, Any]]:
        """What stands in the way of the run, as `mlx-zh run --dry-run` says it."""
        from mlx_zh.planning.workload import stages_of
        from mlx_zh.stages.preflight import problems

        recipe = self._recipe(text, file)
        stages = [*stages_of(recipe), *(["eval"] if recipe.evaluate.benchmarks else [])]
        return [
            {"text": in_readers_language(problem.text), "error": problem.is_error}
            for problem in problems(recipe, stages)
        ]

    def _recipe(self, text: str, file: str) -> Recipe:
        recipe, findings = check_recipe(text, self._project / file)
        if recipe is None:
            raise DataError(findings[0].text)
        return recipe

    def _surveys(self, files: Sequence[Values]) -> list[Survey]:
        """The surveys of the files that can be used."""
        surveys: list[Survey] = []
        for file in files:
            try:
                surveys += self._survey(file)
            except MlxZhError:
                continue
        return surveys

    def _survey(self, file: Values) -> list[Survey]:
        """The survey of a file, or of each file of a folder. Raises DataError if nothing in it can be used."""
        from mlx_zh.stages.own_files import survey_files

        path = self._project / file["path"]
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        key = json.dumps([str(path), stamp, file.get("columns"), file.get("sheet")])
        if key not in self._looked:
            self._looked[key] = survey_files(
                [path], file.get("columns") or None, file.get("sheet"), "mlx-zh init"
            ).surveys
        return self._looked[key]

    def _report(self, file: Values) -> dict[str, Any]:
        """What the page shows of a file."""
        report: dict[str, Any] = {"path": file["path"], "columns": [], "error": ""}
        try:
            surveys = self._survey(file)
        except MlxZhError as error:
            report["error"] = printable(in_readers_language(str(error))).replace(f"{self._project}{os.sep}", "")
            return report | self._head(file)
        from mlx_zh.stages.own_files import remarks_on

        first = surveys[0]
        examples = first.head.examples()
        return report | {
            "columns": [(name, examples[name][:_EXAMPLE]) for name in first.head.columns[:_COLUMNS]],
            "mapping": dict(first.guess.columns),
            "kind": first.guess.kind,
            "format": first.guess.format,
            "basis": first.guess.basis,
            "sheet": first.head.sheet,
            "rows": sum(each.rows for each in surveys),
            "usable": sum(each.usable for each in surveys),
            "repeated": sum(each.repeated for each in surveys),
            "files": len(surveys),
            "remarks": [printable(line) for each in surveys for line in remarks_on(each)][:_REMARKS],
        }

    def _head(self, file: Values) -> dict[str, Any]:
        """The columns of a file whose meaning could not be guessed."""
        from mlx_zh.corpus.survey import read_head

        try:
            head = read_head(self._project / file["path"], file.get("sheet"))
        except (MlxZhError, OSError):
            return {}
        examples = head.examples()
        return {"columns": [(name, examples[name][:_EXAMPLE]) for name in head.columns[:_COLUMNS]]}

    def _pace(self, recipe: Recipe, config: Config, machine: Machine, measured: bool) -> tuple[Pace | None, str]:
        """The speed of this machine with the recipe's model, and whether it is predicted or measured."""
        from mlx_zh.planning.chips import chip_named, predicted_pace
        from mlx_zh.planning.workload import SCORED
        from mlx_zh.stages import memory_check, outlook
        from mlx_zh.system import device

        step = memory_check.training_step(recipe, "sft", config, machine)
        key = repr((step.model, step.trained, step.target))
        if key in self._paces:
            return self._paces[key], "measured"
        chip = chip_named(device.chip() or "")
        if chip is not None:
            again, scored = step.again(recipe.memory).share, SCORED["sft"]
            pace = predicted_pace(chip, step.model, step.trained, step.target, again=again, scored=scored)
            return pace, "predicted"
        if not measured:
            return None, ""
        from mlx_zh.planning.speed import measure

        speed = measure(step.model, step.trained, step.target, length=128, seconds=_MEASURING)
        self._paces[key] = outlook.pace_of(recipe, step, speed)
        return self._paces[key], "measured"


_REMARKS = 30  # lines about a file
_MEASURING = 4.0  # seconds


def _bare(name: str, model: str, budget: str | None) -> str:
    """A recipe without files of one's own."""
    text = with_value("", ["name"], name)
    text = with_value(text, ["budget"], budget) if budget else text
    text = with_value(text, ["model", "path"], model)
    return with_value(text, ["export", "formats"], ["mlx"])


def _with_sets(text: str, sets: Sequence[str], use: str) -> str:
    """The recipe's text with registered data sets in its data."""
    from mlx_zh.corpus.registry import load_registry
    from mlx_zh.studio.yaml_edit import value_at

    registry = load_registry()
    for name in sets:
        kind = registry[name].kind if name in registry else "sft"
        stages = [kind] if kind == "dpo" or use != "dpo" else []
        for stage in stages:
            key = ["data", stage, "train"]
            text = with_value(text, key, [*(value_at(text, key) or []), name])
    return text


def _config(recipe: Recipe) -> Config | None:
    """The model's config as far as it is known without a network. Raises MlxZhError for a model that there is not."""
    from mlx_zh.models import catalog
    from mlx_zh.models.load import find_config, resolve_model
    from mlx_zh.stages.needs import model_download

    model = recipe.model
    if model_download(model) and (entry := catalog.known_model(model.path)) is None:
        if catalog.HUB_ID.fullmatch(model.path) is None:
            resolve_model(model.path)  # raises, naming the nearest
        return None
    elif model_download(model) and entry is not None and entry.config is None:
        return None
    return find_config(model.path, hub=model.hub, revision=model.revision)


def _fitting(step: Any, settings: Memory, machine: Machine) -> dict[str, Any] | None:
    """The memory settings that fit, by key; None if none do."""
    from mlx_zh.planning.search import cheapest

    candidate = cheapest(step, settings, machine.budget)
    if candidate is None:
        return None
    now = settings.model_dump()
    return {key: value for key, value in candidate.settings.model_dump().items() if value != now[key]}


def answer(desk: Desk, line: str) -> dict[str, Any]:
    """The answer to a request."""
    request = parse_json(line)
    os.environ["MLX_ZH_LANG"] = request["language"]
    try:
        return {"value": desk.answers[request["ask"]](**request["with"])}
    except MlxZhError as error:
        return {"error": printable(in_readers_language(str(error)))}
    except Exception as error:
        from mlx_zh.system.crashes import record_crash

        return {"error": in_readers_language(record_crash(error))}


def main() -> None:
    """Answer requests on stdin until it ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    desk = Desk(Path.cwd())
    for line in sys.stdin:
        answers.write(json.dumps(answer(desk, line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
