"""The page Talk."""

from __future__ import annotations

from mlx_zh.studio import widgets
from mlx_zh.studio.projects import Studio


def talk_page(studio: Studio) -> None:
    """Draw the page."""
    widgets.heading(studio.say("Talk"))
