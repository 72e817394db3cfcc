"""The page New run: data, base model, goal and time; a verdict on memory and time beside them; Start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from nicegui import app, context, run, ui

import mlx_zh.studio
from mlx_zh.errors import MlxZhError, RecipeError
from mlx_zh.recipe_text.units import seconds_of
from mlx_zh.stages.run_list import key_of
from mlx_zh.studio import processes, widgets
from mlx_zh.studio.data_step import DataStep
from mlx_zh.studio.draft import BUDGETS, Draft, nearest_budget, opened, recipes
from mlx_zh.studio.form_view import FormView, YamlView
from mlx_zh.studio.frame import address
from mlx_zh.studio.projects import Projects, Studio
from mlx_zh.studio.recipe_check import Finding
from mlx_zh.studio.texts import worded
from mlx_zh.studio.verdict import VerdictView, duration
from mlx_zh.studio.worker import Latest, Worker

_USES = {
    "sft": worded("Learn the answers (SFT)"),
    "sft-dpo": worded("Learn the answers, then which of two is better (SFT + DPO)"),
    "dpo": worded("Learn which of two answers is better (DPO)"),
}
_OTHER = "…"  # the list's entry for a model that is not in it
_workers: WeakKeyDictionary[Projects, dict[Path, tuple[Worker, Worker]]] = WeakKeyDictionary()


async def new_run_page(studio: Studio) -> None:
    """Draw the page."""
    style = files(mlx_zh.studio).joinpath("new_run.css").read_text(encoding="utf-8")
    ui.add_head_html(f"<style>{style}</style>")  # `ui.add_css` needs an inline script
    folders = {str(number): folder for number, folder in enumerate(studio.folders)}
    chosen = studio.query.get("folder", "0")
    page = NewRun(studio, folders.get(chosen, studio.folders[0]))
    page.draw()
    ui.timer(0, page.fill, once=True)


def _workers_for(projects: Projects, project: Path) -> tuple[Worker, Worker]:
    """The processes that look at data, and that plan times: a measurement must not hold the other up."""
    known = _workers.setdefault(projects, {})
    if project not in known:
        known[project] = Worker(project), Worker(project)
        for worker in known[project]:
            app.on_shutdown(worker.close)
    return known[project]


class NewRun:
    """One visit of the page."""

    def __init__(self, studio: Studio, project: Path) -> None:
        self._studio = studio
        self._draft = Draft(project)
        self._worker, self._timing = _workers_for(studio.projects, project)
        self._looking, self._drafting = Latest(0.05), Latest(0.05)
        self._fitting, self._forecast = Latest(), Latest()  # of the memory, and of the time
        self._uses: Sequence[str] = ("sft",)
        self._unused: Sequence[str] = ()  # files of which nothing can be used
        self._filling = False
        self._models: dict[str, Mapping[str, Any]] = {}
        self._offered = ""  # the model that the page shows
        self._client = context.client

    # ---- drawing

    def draw(self) -> None:
        """Draw the page without what takes time."""
        studio = self._studio
        widgets.heading(studio.say("New run"), studio.say("Data, a base model, a time: the rest has good defaults."))
        self._draw_folders()
        with ui.element("div").classes("z-new"):
            with ui.element("div").classes("z-new-steps"):
                with self._step(1, studio.say("Your data")):
                    self._data = DataStep(self._studio, self._draft, self._data_changed)
                with self._step(2, studio.say("Base model")):
                    self._draw_model()
                with self._step(3, studio.say("Goal and time")):
                    self._draw_goal()
            with ui.element("div").classes("z-new-side"):
                self._draw_side()
        self._draw_recipe()

    def _draw_folders(self) -> None:
        """A choice of the project, where the studio was started for several."""
        folders = self._studio.folders
        if len(folders) > 1:
            options = {str(number): str(folder) for number, folder in enumerate(folders)}
            made = ui.select(
                options, label=self._studio.say("Project"), value=str(folders.index(self._draft.project))
            )
            made.props("dense outlined options-dense").style("width: 500px; max-width: 100%")
            made.on_value_change(lambda event: ui.navigate.to(address("/new", folder=event.value)))

    def _step(self, number: int, title: str) -> ui.element:
        with ui.element("section").classes("z-card z-step") as step, ui.element("div").classes("z-step-title"):
            ui.label(str(number)).classes("z-step-number")
            ui.label(title)
        return step

    def _draw_model(self) -> None:
        studio = self._studio
        self._model = ui.select({}, label=studio.say("Model"), on_change=self._choose_model)
        self._model.props("dense outlined options-dense")
        self._other = ui.input(studio.say("An id on a hub, a folder, or a .gguf file"), on_change=self._choose_model)
        self._other.props("dense outlined debounce=600")
        self._other.set_visibility(False)
        self._model_note = ui.label("").classes("z-note")

    def _draw_goal(self) -> None:
        studio = self._studio
        self._use = ui.radio({"sft": studio.say(_USES["sft"])}, value="sft", on_change=self._choose_use).props(
            "dense"
        )
        self._pairs_note = ui.label(
            studio.say(
                "With a column of worse answers, DPO can follow: the model then learns which of two is better."
            )
        ).classes("z-note")
        with ui.element("div"):
            with ui.element("div").classes("z-row"):
                ui.label(studio.say("At most")).classes("z-note")
                self._budget_text = ui.label("").classes("z-total")
            self._budget = ui.slider(min=0, max=len(BUDGETS) - 1, value=nearest_budget(self._draft.budget))
            self._budget.props["aria-label"] = studio.say("Time for the whole run")
            self._budget.on_value_change(self._choose_budget)
        self._budget_text.text = self._time(self._draft.budget)
        self._name = ui.input(studio.say("Name of the run"), value=self._draft.name, on_change=self._choose_name)
        self._name.props("dense outlined debounce=400 maxlength=80").style("max-width: 340px")
        self._name_note = ui.label("").classes("z-note")

    def _draw_side(self) -> None:
        studio = self._studio
        self._verdict = VerdictView(self._studio, self._use_memory)
        self._start = ui.button(studio.say("Start"), icon="play_arrow", on_click=self._begin).classes("z-start")
        self._start.props("unelevated no-caps")
        self._start.disable()
        self._start_note = ui.label(studio.say("Add data first.")).classes("z-note")
        self._problems = ui.element("div").classes("z-step")

    def _draw_recipe(self) -> None:
        studio = self._studio
        with (
            ui.element("section").classes("z-card"),
            ui.expansion(studio.say("Advanced: every setting, and the recipe as YAML")) as fold,
        ):
            known = recipes(self._draft.project)
            if known:
                chosen = ui.select(known, label=studio.say("Open a recipe of this folder"), on_change=self._open)
                chosen.props("dense outlined options-dense").style("width: 340px; max-width: 100%")
            with ui.element("div").classes("z-recipe"):
                with ui.element("div"):
                    self._form = FormView(self._studio, self._draft, self._text_changed)
                    self._form.draw_first()
                    self._form.draw_rest()
                self._yaml = YamlView(self._studio, self._draft, self._text_changed)
            fold.on("after-show", self._yaml.open)

    # ---- filling

    async def fill(self) -> None:
        """Ask for models and data sets, and make the first draft."""
        try:
            models = await self._ask("models")
            sets = await self._ask("sets")
        except MlxZhError as error:
            with self._problems:
                widgets.error_card(self._studio, error)
            return
        self._models.update((each["name"], each) for each in models)
        if not self._draft.model:
            here = [each for each in models if each["here"] and each["suggested"]]
            self._draft.model = (here or [each for each in models if each["suggested"]] or models)[0]["name"]
        self._offer_models()
        self._data.offer_sets(sets)
        await self._redraft()

    async def _ask(self, what: str, **values: Any) -> Any:
        return await self._worker.ask(what, self._studio.language, **values)

    def _files(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in file.items() if key != "wish"} for file in self._draft.files]

    def _offer_models(self) -> None:
        studio, draft = self._studio, self._draft
        names = {name: self._described(model) for name, model in self._models.items()}
        names[_OTHER] = studio.say("Another model …")
        model = self._models.get(draft.model)
        self._offered = draft.model
        self._filling = True
        self._model.set_options(names, value=draft.model if model else _OTHER)
        self._other.set_visibility(model is None)
        if model is None and draft.model != _OTHER:
            self._other.set_value(draft.model)
        self._filling = False
        self._model_note.text = f"{model['suits']} · {model['licence']}" if model else ""

    def _described(self, model: Mapping[str, Any]) -> str:
        studio = self._studio
        parts = [model["name"], f"{model['size_gb']:g} GB" if model["size_gb"] else ""]
        parts.append(studio.say("on this machine") if model["here"] else "")
        parts.append(studio.say("suggested for this machine") if model["suggested"] else "")
        return " · ".join(part for part in parts if part)

    async def _data_changed(self) -> None:
        files = self._files()
        try:
            report = await self._looking.of(lambda: self._ask("look", files=files))
        except MlxZhError as error:
            self._show_problems([{"text": str(error), "error": True}])
            return
        if report is None:
            return
        self._uses = report["uses"] or ["sft"]
        kinds = {each["kind"] for each in report["files"] if "kind" in each}
        if self._draft.use not in self._uses or kinds & {"dpo", "kto"}:
            self._draft.use = report["use"]
        if not self._draft.named:
            self._draft.name = report["name"]
            if self._draft.run().path.exists() or self._draft.path.exists():
                self._draft.name = self._draft.unused_name()
        self._unused = [Path(each["path"]).name for each in report["files"] if each["error"]]
        self._data.show(report["files"])
        await self._redraft()
        try:
            self._data.show_samples(await self._ask("samples", files=files, model=self._draft.model) if files else [])
        except MlxZhError:
            self._data.show_samples([])

    async def _redraft(self) -> None:
        """Make the recipe's text anew for the data and the choices."""
        draft = self._draft
        values = {"name": draft.name, "model": draft.model, "budget": draft.budget, "use": draft.use}
        files, sets = self._files(), list(draft.sets)
        try:
            text = await self._drafting.of(lambda: self._ask("draft", **values, files=files, sets=sets))
        except MlxZhError as error:
            self._show_problems([{"text": str(error), "error": True}])
            return
        if text is not None:
            draft.generated(text)
            await self._text_changed()

    async def _text_changed(self) -> None:
        """Show the draft everywhere, and ask for its forecast."""
        recipe, findings = self._draft.checked()
        self._show_choices(findings)
        self._form.show(findings)
        self._yaml.show(findings)
        learns = recipe is not None and bool(recipe.data.sft.train or recipe.data.dpo.train)
        self._start.set_enabled(learns)
        self._start_note.text = self._to_do(findings, learns)
        if recipe is None:
            self._verdict.show_nothing()
            return
        await self._predict(learns)

    def _to_do(self, findings: Sequence[Finding], learns: bool) -> str:
        studio = self._studio
        if findings:
            first = findings[0]
            text = self._studio.error(first.text)
            return studio.say("Line {line}: {text}", line=first.line, text=text) if 0 < first.line < 10**6 else text
        if not learns:
            return studio.say("Add data first.")
        written = studio.say("The recipe is written to {file}.", file=self._draft.file)
        if not self._unused:
            return written
        return studio.say("Not used: {files}.", files=", ".join(self._unused)) + " " + written

    def _show_choices(self, findings: Sequence[Finding]) -> None:
        draft, studio = self._draft, self._studio
        self._filling = True
        uses = [use for use in _USES if use in self._uses or use == draft.use]
        self._use.set_options({use: studio.say(_USES[use]) for use in uses}, value=draft.use)
        self._pairs_note.set_visibility("sft-dpo" not in uses and "dpo" not in uses)
        self._budget.set_value(nearest_budget(draft.budget))
        self._budget_text.text = self._time(draft.budget)
        wanted = draft.value("name")  # in the text it may be one that is refused: it stays, to be corrected
        self._name.set_value(wanted if isinstance(wanted, str) else draft.name)
        self._filling = False
        self._name_note.text = self._about_name(findings)
        if draft.model != self._offered:  # the text names another one; one that is being typed is not touched
            self._offer_models()

    def _about_name(self, findings: Sequence[Finding]) -> str:
        studio, draft = self._studio, self._draft
        wrong = next((finding for finding in findings if finding.dotted == "name"), None)
        if wrong is not None:
            return studio.error(wrong.text)
        taken = draft.text and draft.taken()
        return studio.say("There is a run or a recipe of this name already.") if taken else ""

    def _time(self, budget: str | None) -> str:
        seconds = None if budget is None else seconds_of(budget)
        return self._studio.say("no limit") if seconds is None else duration(self._studio, seconds)

    async def _predict(self, learns: bool) -> None:
        text, file = self._draft.text, self._draft.file
        self._verdict.wait()
        try:
            memory = await self._fitting.of(lambda: self._ask("memory", text=text, file=file))
            if memory is None or text != self._draft.text:
                return
            self._verdict.show_memory(memory)
            hopeless = any(not each["fits"] and not each["fitting"] for each in memory["stages"])
            if not learns or hopeless:
                self._verdict.done()
                return
            self._verdict.wait_for_time()
            busy = any(info.state == "running" for info in await run.io_bound(self._studio.runs) or ())
            language = self._studio.language
            time = await self._forecast.of(
                lambda: self._timing.ask("time", language, text=text, file=file, measured=not busy)
            )
            if text == self._draft.text:
                self._verdict.show_time(time, busy=busy)
        except MlxZhError as error:
            if text == self._draft.text:
                self._verdict.show_error(self._studio.error(error))

    # ---- choices

    async def _choose_model(self, event: Any) -> None:
        name = str(event.value or "").strip()
        if self._filling or not name or name == self._draft.model:
            return
        if name == _OTHER:
            self._other.set_visibility(True)
            return
        self._draft.model = name
        self._offer_models()
        await self._set("model.path", name)
        if not self._draft.rewritten:  # other values depend on the model, such as the learning rate
            await self._data_changed()

    async def _choose_use(self, event: Any) -> None:
        if not self._filling and event.value and event.value != self._draft.use:
            self._draft.use = event.value
            await self._redraft()

    async def _choose_budget(self, event: Any) -> None:
        if self._filling or event.value is None:
            return
        budget = BUDGETS[int(event.value)]
        if budget == self._draft.budget or int(event.value) == nearest_budget(self._draft.budget):
            return
        self._draft.budget = budget
        self._budget_text.text = self._time(budget)
        if budget is not None:
            await self._set("budget", budget)
            return
        self._draft.unset("budget")
        if self._draft.rewritten:
            await self._text_changed()
        else:
            await self._redraft()

    async def _choose_name(self, event: Any) -> None:
        name = str(event.value or "").strip()
        if self._filling or not name or name == self._draft.value("name"):
            return
        self._draft.named = True
        await self._set("name", name)
        if not self._draft.rewritten and self._draft.name == name:  # comments of the recipe name it too
            await self._redraft()

    async def _use_memory(self, settings: Mapping[str, Any]) -> None:
        """Take memory settings that fit."""
        for key, value in settings.items():
            await self._set(f"memory.{key}", value, quiet=True)
        await self._text_changed()

    async def _set(self, key: str, value: Any, *, quiet: bool = False) -> None:
        try:
            self._draft.set(key, value)
        except MlxZhError as error:
            self._show_problems([{"text": str(error), "error": True}])
            return
        if not quiet:
            await self._text_changed()

    async def _open(self, event: Any) -> None:
        try:
            draft = opened(self._draft.project, str(event.value))
        except MlxZhError as error:
            self._show_problems([{"text": str(error), "error": True}])
            return
        vars(self._draft).update(vars(draft))
        self._data.show([])
        self._data.show_samples([])
        await self._text_changed()

    # ---- starting

    async def _begin(self) -> None:
        self._start.disable()
        try:
            if self._draft.taken():
                self._ask_about_name()
                return
            self._start_note.text = self._studio.say("Checking data, model, network, disk and memory …")
            problems = await self._ask("problems", text=self._draft.text, file=self._draft.file)
            errors = [problem for problem in problems if problem["error"]]
            self._show_problems(errors)
            if errors:
                self._start_note.text = self._studio.say("Correct this first, then start again.")
                return
            await self._go(self._draft.write())
        except MlxZhError as error:
            self._show_problems([{"text": str(error), "error": True}])
        finally:
            self._start.enable()

    async def _go(self, recipe: Path) -> None:
        """Start the run of a recipe that is written, and go to its page."""
        draft = self._draft
        command = processes.run_command(str(recipe.relative_to(draft.project)), draft.project)
        environment: dict[str, str] = {"MLX_ZH_LANG": self._studio.language}
        await run.io_bound(processes.start, draft.run(), command, environment)
        ui.navigate.to(address("/run", run=key_of(draft.run().path)))

    def _ask_about_name(self) -> None:
        """Another name, or the run that is there: nothing is overwritten."""
        studio, draft = self._studio, self._draft
        other = draft.unused_name()
        folder = draft.run().path
        with ui.dialog() as dialog, ui.element("div").classes("z-card z-step"):
            ui.label(studio.say("There is a run or a recipe called {name} already.", name=draft.name)).classes(
                "z-step-title"
            )
            ui.label(studio.say("Nothing of it is changed. What do you want?")).classes("z-note")
            rename = ui.button(
                studio.say("Start this one as {name}", name=other), on_click=lambda: self._rename(dialog, other)
            )
            rename.props("unelevated no-caps")
            if folder.is_dir():
                show = ui.button(studio.say("Show that run"))
                show.props("flat no-caps")
                show.on_click(lambda: ui.navigate.to(address("/run", run=key_of(folder))))
            ui.button(studio.say("Cancel"), on_click=dialog.close).props("flat no-caps color=grey")
        dialog.open()

    async def _rename(self, dialog: ui.dialog, name: str) -> None:
        dialog.close()
        self._draft.named = True
        await self._set("name", name)
        await self._begin()

    def _show_problems(self, problems: Sequence[Mapping[str, Any]]) -> None:
        self._problems.clear()
        with self._problems:
            for problem in problems:
                widgets.error_card(self._studio, RecipeError(problem["text"]))
