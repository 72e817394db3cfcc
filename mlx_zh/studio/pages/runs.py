"""The page Runs: every run folder with its state and main figures."""

from __future__ import annotations

from nicegui import run, ui

from mlx_zh.studio import widgets
from mlx_zh.studio.frame import address
from mlx_zh.studio.projects import Studio


async def runs_page(studio: Studio) -> None:
    """Draw the page."""
    widgets.heading(studio.say("Runs"))
    runs = await run.io_bound(studio.runs)
    if not runs:
        widgets.empty(
            studio.say("There is no run yet"),
            studio.say("Start one here, or in a terminal. It appears as soon as it begins."),
            "mlx-zh run recipes/quickstart.yaml",
        )
        return
    for info in runs:
        ui.link(info.name, address("/run", run=info.key))
