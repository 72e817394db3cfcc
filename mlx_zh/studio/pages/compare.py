"""The page Compare."""

from __future__ import annotations

from mlx_zh.studio import widgets
from mlx_zh.studio.projects import Studio


def compare_page(studio: Studio) -> None:
    """Draw the page."""
    widgets.heading(studio.say("Compare"))
