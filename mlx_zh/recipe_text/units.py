"""Lengths of time and sizes of memory as people write them."""

from __future__ import annotations

import re
import unicodedata

# Units of a length of time: a name as people write it -> seconds.
_UNITS = {
    **dict.fromkeys(("d", "day", "days", "天"), 86_400),
    **dict.fromkeys(("h", "hour", "hours", "小时", "个小时"), 3_600),
    **dict.fromkeys(("m", "min", "minute", "minutes", "分", "分钟"), 60),
    **dict.fromkeys(("s", "sec", "second", "seconds", "秒"), 1),
}
_TIME_PART = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([a-z天个小时分钟秒]+)\s*")


def seconds_of(text: str) -> int | None:
    """Seconds of a length of time such as 90m, 8h, 1h30m, 8小时 or 2d; None for any other text, and for no time."""
    rest, total = unicodedata.normalize("NFKC", text).strip().lower(), 0.0
    last = float("inf")
    while rest:
        part = _TIME_PART.match(rest)
        unit = _UNITS.get(part[2]) if part else None
        if part is None or unit is None or unit >= last:  # units fall from left to right, each once
            return None
        total, last, rest = total + float(part[1]) * unit, unit, rest[part.end() :]
    return round(total) or None


def time_text(seconds: int) -> str:
    """Seconds as a length of time that `seconds_of` reads: 1h30m."""
    parts = []
    for name in ("d", "h", "m", "s"):
        count, seconds = divmod(seconds, _UNITS[name])
        parts += [f"{count}{name}"] if count else []
    return "".join(parts) or "0s"


_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(m|mb|mib|g|gb|gib)")
_SIZE_UNITS = {"m": 10**6, "mb": 10**6, "mib": 2**20, "g": 10**9, "gb": 10**9, "gib": 2**30}


def size_of(text: str) -> int | None:
    """Bytes of a size such as 10GB, 9.5 GiB or 800MB; None for any other text, and for nothing at all."""
    found = _SIZE.fullmatch(unicodedata.normalize("NFKC", text).strip().lower())
    return round(float(found[1]) * _SIZE_UNITS[found[2]]) or None if found else None


def size_text(size: float) -> str:
    """Bytes as a size that `size_of` reads, to three digits: 9.75GB, 800MB."""
    unit = 1e9 if size >= 1e9 else 1e6
    return f"{max(float(f'{size / unit:.3g}'), 0.001):g}{'GB' if unit == 1e9 else 'MB'}"
