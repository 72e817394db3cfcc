"""The page for an address that no page has."""

from __future__ import annotations

from mlx_zh.errors import StudioError
from mlx_zh.studio.projects import Studio


def unknown_page(studio: Studio) -> None:
    """Always raises StudioError."""
    raise StudioError("there is no page at this address. Choose one from the menu.")
