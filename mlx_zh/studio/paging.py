"""Numbers to turn the pages of a long list by; only the rows of one page are drawn."""

from __future__ import annotations

from collections.abc import Callable

from nicegui import ui


def page_numbers(page: int, count: int, size: int, turn: Callable[[int], None]) -> None:
    """A row of page numbers, if `count` rows take several pages of `size`; `turn` is called with the chosen one."""
    pages = -(-count // size)
    if pages <= 1:
        return
    turner = ui.pagination(1, pages, direction_links=True, value=page, on_change=lambda event: turn(int(event.value)))
    turner.props("max-pages=6 boundary-numbers").classes("z-pages")
