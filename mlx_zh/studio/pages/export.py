"""The page Export."""

from __future__ import annotations

from mlx_zh.studio import widgets
from mlx_zh.studio.projects import Studio


def export_page(studio: Studio) -> None:
    """Draw the page."""
    widgets.heading(studio.say("Export"))
