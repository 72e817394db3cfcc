"""The run that a page is about: the one of its address, else the newest that has what the page shows."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nicegui import ui

from mlx_zh.errors import MlxZhError
from mlx_zh.recipe import Recipe
from mlx_zh.stages.command import find_recipe
from mlx_zh.stages.run_list import RunInfo
from mlx_zh.studio import widgets
from mlx_zh.studio.draft import recipes
from mlx_zh.studio.frame import address
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.texts import worded
from mlx_zh.studio.threads import in_thread

STAGE_NAMES = {"base": worded("base"), "sft": "SFT", "dpo": "DPO", "fused": worded("fused")}


async def chosen_run(studio: Studio, path: str, title: str, has: Callable[[RunInfo], bool]) -> RunInfo | None:
    """Draw the page's title with a choice of runs; the run that is chosen, or None if there is no run at all.

    `path` is the page's. Raises StudioError for a run that is not here.
    """
    runs = await in_thread(studio.runs)
    asked = studio.query.get("run")
    info = studio.run(asked) if asked else next((one for one in runs if has(one)), runs[0] if runs else None)
    with ui.element("div").classes("z-heading z-between"):
        ui.label(title).classes("z-title").props('role="heading" aria-level="1"')
        if info is not None and runs:
            names = {one.key: one.name for one in runs}
            picker = ui.select(
                names,
                value=info.key,
                with_input=len(names) > 8,
                on_change=partial(_go, path),
                label=studio.say("Run"),
            )
            picker.props("dense outlined options-dense").classes("z-pick")
    if info is None:
        no_run(studio)
    return info


def no_run(studio: Studio, title: str = "", hint: str = "") -> None:
    """Draw what a page shows where there is no run: a button that begins one, and a command that works here."""
    known = recipes(studio.folders[0])
    with widgets.empty(
        title or studio.say("There is no run yet"),
        hint or studio.say("Start one here, or in a terminal. It appears as soon as it begins."),
        shlex.join(["mlx-zh", "run", known[0]]) if known else None,
    ):
        begin = ui.button(studio.say("New run"), on_click=lambda: ui.navigate.to("/new"))
        begin.props("unelevated no-caps")


def _go(path: str, event: object) -> None:
    ui.navigate.to(address(path, run=str(getattr(event, "value", ""))))


def project_of(studio: Studio, info: RunInfo) -> Path:
    """Where the run was started and its relative paths begin, as far as the studio may look there."""
    above = info.path.parent.parent if info.path.parent.name == "runs" else info.path.parent
    return above if studio.is_inside(above) else info.path


def named_from(project: Path, path: Path) -> str:
    """A path as a command names it that is started in `project`."""
    return str(path.relative_to(project)) if path.is_relative_to(project) and path != project else str(path)


def recipe_of(info: RunInfo) -> Recipe | None:
    """The run's recipe; None if it has none yet, or it cannot be read."""
    try:
        return find_recipe(str(info.path))
    except MlxZhError:
        return None


def stage_name(studio: Studio, stage: str) -> str:
    """A stage as a reader calls it; one that this version does not know as it is."""
    name = STAGE_NAMES.get(stage)
    return stage if name is None else studio.say(name)
