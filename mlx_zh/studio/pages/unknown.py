"""The page for an address that no page has."""

from __future__ import annotations

from mlx_zh.studio import widgets
from mlx_zh.studio.projects import Studio


def unknown_page(studio: Studio) -> None:
    """Say so."""
    widgets.empty(studio.say("No such page"), studio.say("Choose one from the menu."))
