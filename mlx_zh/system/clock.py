"""Times of day as people say them."""

from __future__ import annotations

from datetime import datetime


def clock(moment: float, *, past: bool = False, now: float | None = None) -> str:
    """`about 23:40` for a moment of today, with a date for another day. Both times are seconds since 1970.

    A moment of the `past` is exact: `at 23:40`.
    """
    then = datetime.fromtimestamp(moment)
    today = datetime.now() if now is None else datetime.fromtimestamp(now)
    word = "at" if past else "about"
    days = (then.date() - today.date()).days
    if days == 0:
        return f"{word} {then:%H:%M}"
    if days == 1:
        return f"{word} {then:%H:%M} tomorrow"
    return f"{word} {then:%Y-%m-%d %H:%M}"
