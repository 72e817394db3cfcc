"""What stages print: lines, tables and a progress bar. Only stages use it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wcwidth import wcswidth

from mlx_zh.language.notice import Notice
from mlx_zh.system.redaction import hide_all, printable, redact


def say(text: str = "") -> None:
    """A line for the user; it never cuts through a progress bar."""
    from tqdm import tqdm

    tqdm.write(printable(text), file=sys.stdout)
    sys.stdout.flush()


_kept: Path | None = None  # where warnings are also written
_waiting: list[str] | None = None  # those of a command that came before there was such a place


def warn(text: str, *, keep: bool = True) -> None:
    """A warning line. The report shows a `Notice` in both languages, other text as it is.

    `keep` is false for what the run folder tells elsewhere.
    """
    say(f"warning: {text}")
    if keep and _kept is not None:
        _write(text, _kept)
    elif keep and _waiting is not None:
        _waiting.append(text)


@contextmanager
def kept_warnings(path: Path) -> Iterator[None]:
    """Inside, every warning is also a line of `path`: its English text, and a notice's code and values."""
    global _kept
    path.parent.mkdir(parents=True, exist_ok=True)
    before, _kept = _kept, path
    try:
        yield
    finally:
        _kept = before


@contextmanager
def waiting_warnings() -> Iterator[None]:
    """Inside, warnings outside `kept_warnings` are remembered until `keep_waiting`; at the end they are forgotten."""
    global _waiting
    before, _waiting = _waiting, []
    try:
        yield
    finally:
        _waiting = before


def keep_waiting() -> None:
    """Write the remembered warnings where warnings are kept now."""
    while _kept is not None and _waiting:
        _write(_waiting.pop(0), _kept)


def _write(text: str, path: Path) -> None:
    coded = hide_all(text.as_dict(), redact) if isinstance(text, Notice) else {}
    line = json.dumps({"text": redact(text), **coded}, ensure_ascii=False)
    with suppress(OSError), path.open("a", encoding="utf-8") as file:  # a full disk is told by other writes
        file.write(line + "\n")


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Rows in columns, Chinese characters counted as the two cells they take."""
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    return max(wcswidth(text), 0)


class StepBar:
    """Progress over optimizer steps: loss, tokens a second and time left."""

    def __init__(self, name: str, total: int, done: int) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            file=sys.stdout,
            mininterval=0 if sys.stdout.isatty() else 15,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def update(self, figures: Mapping[str, object]) -> None:
        """Advance by a step and show its figures."""
        ranked = "rewards/margins" in figures
        margin = f"margin {figures['rewards/margins']:z.2f}, " if ranked else ""
        self._bar.set_postfix_str(
            f"loss {figures['loss']:.3f}, {margin}{figures['tokens_per_second']:.0f} tok/s, "
            f"{figures['peak_memory_gb']:.2f} GB",
            refresh=False,
        )
        self._bar.update()

    def note(self, text: str) -> None:
        """Show what else is going on."""
        self._bar.set_postfix_str(text)

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()


class CountBar:
    """Progress over things of one kind, with speed and time left."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=total,
            desc=name,
            unit=unit,
            dynamic_ncols=True,
            file=sys.stdout,
            mininterval=0.1 if sys.stdout.isatty() else 15,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
        )

    def update(self, count: int) -> None:
        """Advance by some of them."""
        self._bar.update(count)

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()


class RowBar:
    """Rows read or tokenized so far. It shows itself only where that takes more than a second."""

    def __init__(self, name: str, total: int | None = None) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=total,
            desc=name,
            unit="row",
            delay=1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            mininterval=0.1 if sys.stdout.isatty() else 15,
        )

    def reach(self, rows: int) -> None:
        """So many rows are done."""
        self._bar.update(rows - self._bar.n)

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()


class DownloadBar:
    """Bytes of a file as they arrive, with speed and time left; files follow one another.

    It shows itself on the error stream, for answers and reports go to the output, and only where a file takes more
    than a second.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""

    def __call__(self, name: str, here: int, total: int | None) -> None:
        """So many bytes of a file are here. A number below the last one: the file was begun again."""
        if self._bar is None or name != self._name or here < self._bar.n:
            self._begin(name, here, total)
        self._bar.update(here - self._bar.n)
        if here == total:
            self._bar.close()
            self._bar = None

    def _begin(self, name: str, here: int, total: int | None) -> None:
        from tqdm import tqdm

        if self._bar is not None:
            self._bar.close()
        self._name = name
        self._bar = tqdm(
            total=total,
            initial=here,
            desc=printable(name),
            unit="B",
            unit_scale=True,
            delay=1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 15,
        )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
