"""The page of one run: its curves as they are written, its warnings and its log."""

from __future__ import annotations

from mlx_zh.studio import widgets
from mlx_zh.studio.projects import Studio


def live_page(studio: Studio) -> None:
    """Draw the page."""
    info = studio.run(studio.query.get("run", ""))
    widgets.heading(info.name)
