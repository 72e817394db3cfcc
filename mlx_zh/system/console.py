"""Terminal output in the reader's language: lines, warnings, tables and progress bars.

Only commands and stages use it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wcwidth import wcswidth

from mlx_zh.errors import StorageError
from mlx_zh.language.notice import Notice
from mlx_zh.language.reader import reader_language
from mlx_zh.language.translation import in_readers_language, label
from mlx_zh.system.arguments import wrapped
from mlx_zh.system.escaping import one_line, text_lines
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.redaction import printable, redact
from mlx_zh.system.storage import append_json


def say_reading(path: Path, size: int) -> None:
    """Say that a large file of `size` bytes is read for its digest."""
    say(f"Reading {path.name} once for its SHA-256 ({size / 1e9:.1f} GB); it is remembered until the file changes.")


def say(text: str = "") -> None:
    """Print a line for the user, above any progress bar."""
    from tqdm import tqdm

    tqdm.write(printable(in_readers_language(text)), file=sys.stdout)
    sys.stdout.flush()


_log: Path | None = None  # the file that warnings are also written to
_held: list[str] | None = None  # warnings from before that file was known


def warn(text: str, *, keep: bool = True) -> None:
    """Print a warning. The report shows a `Notice` in both languages, and any other text as it is.

    `keep=False` only prints: for a warning that another file of the run folder already records.
    """
    say(f"{in_readers_language('warning: ')}{in_readers_language(text)}")
    if keep and _log is not None:
        _write(text, _log)
    elif keep and _held is not None:
        _held.append(text)


@contextmanager
def log_warnings(path: Path) -> Iterator[None]:
    """Inside this context, also append each warning to `path`, as a JSON line.

    A line holds the English text and, for a `Notice`, its code and values.
    """
    global _log
    path.parent.mkdir(parents=True, exist_ok=True)
    before, _log = _log, path
    try:
        yield
    finally:
        _log = before


@contextmanager
def hold_warnings() -> Iterator[None]:
    """Inside this context, hold warnings that no `log_warnings` records, until `log_held_warnings` writes them.

    What is still held at the end of the context is dropped.
    """
    global _held
    before, _held = _held, []
    try:
        yield
    finally:
        _held = before


def log_held_warnings(*, again: bool = True) -> None:
    """Write the held warnings to the file of the current `log_warnings`.

    With `again=False`, for a run that is resumed, those whose code is already in the file are left out.
    """
    if _log is None or _held is None:
        return
    logged = set() if again else _logged_codes(_log)
    for text in _held:
        if not (isinstance(text, Notice) and text.code in logged):
            _write(text, _log)
    _held.clear()


def _logged_codes(path: Path) -> set[str]:
    try:
        return {str(parse_json(line).get("code")) for line in text_lines(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, AttributeError):
        return set()


def _write(text: str, path: Path) -> None:
    coded: dict[str, Any] = {**text.as_dict()} if isinstance(text, Notice) else {}
    with suppress(StorageError):  # other writes report a full disk
        append_json(path, {"text": str(text), **coded})


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Rows as aligned columns; a Chinese character counts as two terminal cells."""
    rows = [[label(cell) for cell in row] for row in rows]
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def terminal_width() -> int | None:
    """The columns of the terminal; None where the output goes to a file or another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def paragraph(text: str, *, indent: str = "  ") -> str:
    """A sentence, broken into lines that fit the terminal."""
    text, width = in_readers_language(text), terminal_width()
    lines = [text] if width is None else wrapped(text, max(width - len(indent), 20))
    return "\n".join(indent + line for line in lines)


def padded(text: str, width: int) -> str:
    """The text with spaces up to `width` terminal columns; a Chinese character takes two."""
    return text + " " * max(width - _width(text), 0)


def _width(text: str) -> int:
    return max(wcswidth(text), 0)


def _bar_name(name: str) -> str:
    """The name of a bar, on one line, in the reader's language; it may be that of a file."""
    return one_line(redact(in_readers_language(name)))


class StepBar:
    """A progress bar over optimizer steps: loss, tokens per second and time left."""

    def __init__(self, name: str, total: int, done: int) -> None:
        from tqdm import tqdm

        self.end: str = ""  # when the stage will be done, such as `about 23:40`
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            desc=_bar_name(name),
            unit="step",
            dynamic_ncols=True,
            file=sys.stdout,
            mininterval=0 if sys.stdout.isatty() else 15,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )
        self._figures = ""  # of the last step

    def update(self, figures: Mapping[str, object]) -> None:
        """Advance by one step and show its metrics."""
        has_margin = "rewards/margins" in figures
        margin = f"margin {figures['rewards/margins']:z.2f}, " if has_margin else ""
        self._figures = (
            f"loss {figures['loss']:.3f}, {margin}{figures['tokens_per_second']:.0f} tok/s, "
            f"{figures['peak_memory_gb']:.2f} GB"
        )
        end = in_readers_language(f", done {self.end}") if self.end else ""
        self._bar.set_postfix_str(self._figures + end, refresh=False)
        self._bar.update()

    def note(self, text: str) -> None:
        """Show `text` after the bar until the next step."""
        self._bar.set_postfix_str(_bar_name(text))

    def close(self) -> None:
        """End the bar's line, with the metrics of the last step."""
        self._bar.set_postfix_str(self._figures, refresh=False)
        self._bar.close()


class CountBar:
    """A progress bar over items of one kind, with speed and time left."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=total,
            desc=_bar_name(name),
            unit=unit,
            dynamic_ncols=True,
            file=sys.stdout,
            mininterval=0.1 if sys.stdout.isatty() else 15,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )

    def update(self, count: int) -> None:
        """Advance by `count` items."""
        self._bar.update(count)

    def tell(self, text: str) -> None:
        """Show a text after the speed, such as `310 tok/s`."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()


class RowBar:
    """Rows read or tokenized so far. The bar appears only after one second."""

    def __init__(self, name: str, total: int | None = None) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=total,
            desc=_bar_name(name),
            unit="row",
            delay=1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            mininterval=0.1 if sys.stdout.isatty() else 15,
        )

    def reach(self, rows: int) -> None:
        """Advance to `rows` rows in all."""
        self._bar.update(rows - self._bar.n)

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()


class DownloadBar:
    """Bytes of a file as they arrive, with speed and time left, for one file after another.

    The bar appears on stderr, because answers and reports go to stdout, and only after one second per file.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""

    def __call__(self, name: str, here: int, total: int | None) -> None:
        """Show that `here` of `total` bytes of a file have arrived; fewer than before means that it began again."""
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
            desc=_bar_name(name),
            unit="B",
            unit_scale=True,
            delay=1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 15,
        )


def duration(seconds: float) -> str:
    """Seconds as text in the reader's language: `42 s`, `3 min 05 s` or `2 h 10 min`."""
    second, minute, hour = ("秒", "分", "小时") if reader_language() == "zh" else ("s", "min", "h")
    if seconds < 90:
        return f"{seconds:.0f} {second}"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} {minute} {rest:02d} {second}"
    return f"{minutes // 60} {hour} {minutes % 60:02d} {minute}"
