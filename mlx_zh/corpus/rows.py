"""Loading of a file of rows: its format, what of its rows cannot be used, and which columns nothing reads."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import yaml

from mlx_zh.corpus.conversation import Answer, Document, Message
from mlx_zh.corpus.csv_rows import read_csv
from mlx_zh.corpus.documents import TEXT_SUFFIXES, read_document
from mlx_zh.corpus.excel_rows import EXCEL_SUFFIXES, is_workbook, read_excel
from mlx_zh.corpus.invalid_row import LeftOut
from mlx_zh.corpus.reader import InvalidRow, holds_json_rows, read_lines, read_rows
from mlx_zh.corpus.row_keys import ANSWERS, LABELS, RowKeys, has_more_keys, row_keys, unused_columns, unused_keys
from mlx_zh.corpus.row_messages import Row, kind_of, reasoning_of
from mlx_zh.corpus.tables import read_arrow
from mlx_zh.corpus.text_files import inner_suffix
from mlx_zh.corpus.tools import described_tools, with_tools
from mlx_zh.errors import DataError

Parsed = TypeVar("Parsed")

# columns that a row may lack
_REASONING = "reasoning_content"  # a column that every format may have
_OPTIONAL = ("input", "system", "history", "tools", "kto_tag", "label", "meta_instruction", _REASONING)
_OF_MESSAGES = (  # columns that may hold messages
    *("messages", "conversations", "conversation", "context", "prompt", "response", "completion"),
    *("chosen", "rejected", "rejected_messages"),
)
REASONING_WAY = "write it into each answer as <think>…</think>, or leave it out"
_EXAMPLES = 3  # places listed for each reason
_SHOWN = 10  # errors listed for a file
_WATCHED, _UNUSED = 1000, 100  # different lists of columns that are looked at, and unused columns that are kept
_LOOK_AHEAD = 100  # the format is recognised from the first row that fits one, among this many
# Readers chosen by the ending of a file's name; the kind of every other file is told from its content. A workbook is
# known by its content too, so what has its ending and comes here is text.
_READERS = {
    ".arrow": read_arrow,
    **dict.fromkeys(TEXT_SUFFIXES, read_document),
    **dict.fromkeys((".csv", ".tsv", *EXCEL_SUFFIXES), read_csv),
}


@dataclass
class LoadReport:
    """How many rows of a file were used, and how many were dropped for which reason."""

    rows: int = 0
    kept: int = 0
    format: str = ""
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few places, as "file:line"
    unused: list[str] = field(default_factory=list)  # columns that nothing reads
    placeholders: list[str] = field(default_factory=list)  # names said as {{name}}, looked for if there are variables

    def drop(self, reason: str, place: str) -> None:
        """Count a row that cannot be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(place)

    def add(self, other: LoadReport) -> None:
        """Add the counts of another file."""
        self.rows += other.rows
        self.kept += other.kept
        self.format = self.format or other.format
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            places = self.examples.setdefault(reason, [])
            places += other.examples[reason][: _EXAMPLES - len(places)]
        self.unused = list(dict.fromkeys(self.unused + other.unused))[:_UNUSED]
        self.placeholders = list(dict.fromkeys(self.placeholders + other.placeholders))


class Reading(TypedDict, total=False):
    """How a file is read."""

    format: str  # a format's name, or auto: it is recognised
    on_invalid: str  # what to do with unusable rows: error lists them in one error, skip drops and counts them
    columns: Mapping[str, str] | None  # our column names -> the file's
    sheet: str | None  # of an Excel workbook; None: the first one with rows


@dataclass(frozen=True)
class Format(Generic[Parsed]):
    """A format of rows: its columns, how to recognise it, and how to read a row."""

    columns: tuple[str, ...]
    fits: Callable[[Row], bool]  # whether a row has this format
    parse: Callable[[Row], Iterable[Parsed]]  # the items of a row; raises InvalidRow
    lines: bool = False  # whether rows are lines of text, read as {"text": line}
    labelled: bool = False  # whether a label of false is read, and not a reason to leave the row out
    # whether a row counts may depend on the others: the rows of a file with what each needs to know of them
    settle: Callable[[Iterable[tuple[str, Any]]], Iterator[tuple[str, Any]]] | None = None
    whole: bool = False  # whether `parse` has read the tools and the reasoning that stand beside the texts


def iter_rows(
    path: Path,
    formats: Mapping[str, Format[Parsed]],
    *,
    format: str = "auto",
    on_invalid: str = "error",
    columns: Mapping[str, str] | None = None,
    sheet: str | None = None,
    report: LoadReport | None = None,
    finish: Callable[[Parsed], Parsed] | None = None,
) -> Iterator[tuple[str, Parsed]]:
    """The items of each usable row, each with the row's place ("file:line"). Fills `report`.

    `finish` changes an item; it raises InvalidRow if the row cannot be used then.

    Raises DataError if the file cannot be read, has no known format, or, after the last row, has rows that cannot be
    used.
    """
    report = LoadReport() if report is None else report
    if on_invalid not in ("error", "skip"):
        raise ValueError(f"on_invalid must be error or skip, got {on_invalid!r}")
    _check_names(path, formats, format, columns or {})
    lines = format in formats and formats[format].lines
    rows = read_lines(path) if lines else open_rows(path, columns, sheet, as_text=format == "text")
    if format == "auto":
        format, rows = _detect(path, rows, formats)
    report.format = format
    errors: list[str] = []
    left_out = 0
    watched = _watched(rows, formats[format], report)
    for place, parsed in parse_rows(watched, formats[format], finish, columns=columns):
        report.rows += 1
        if isinstance(parsed, InvalidRow):
            report.drop(parsed.reason, place)
            left_out += isinstance(parsed, LeftOut)
            if len(errors) < _SHOWN and not isinstance(parsed, LeftOut):
                errors.append(f"{place}: {parsed}")
            continue
        report.kept += 1
        for item in parsed:
            yield place, item
    invalid_rows = report.rows - report.kept - left_out
    if invalid_rows and (on_invalid == "error" or not report.kept):
        raise _invalid_rows(path, report, errors, invalid_rows, on_invalid)
    if left_out and not report.kept:
        counted = ", ".join(f"{reason} {count}" for reason, count in report.dropped.items())
        raise DataError(f"{path}: none of its {report.rows} rows gives what is to be learned here ({counted})")


def _watched(rows: Iterable[tuple[str, Any]], form: Format[Parsed], report: LoadReport) -> Iterator[tuple[str, Any]]:
    """The rows; `report` gets the names of the columns, and of the keys of messages, that nothing reads."""
    seen: set[tuple[str, ...]] = set()
    lists = [name for name in form.columns if name in _OF_MESSAGES]
    for place, row in rows:
        if isinstance(row, dict):
            if (names := tuple(row)) not in seen and len(seen) < _WATCHED:
                seen.add(names)
                report.unused = list(dict.fromkeys(report.unused + unused_columns(row, form.columns)))[:_UNUSED]
            for name in lists:
                value = row.get(name)
                if isinstance(value, list) and has_more_keys(value) and (keys := unused_keys(value, name)):
                    report.unused = list(dict.fromkeys(report.unused + keys))[:_UNUSED]
        yield place, row


def open_rows(
    path: Path, columns: Mapping[str, str] | None = None, sheet: str | None = None, *, as_text: bool = False
) -> Iterator[tuple[str, Any]]:
    """The rows of a file of any kind, with their places; `columns` renames columns. Raises DataError.

    A `.txt` file with rows of JSON is no document, unless `as_text` says that it is.
    """
    if is_workbook(path):
        rows = read_excel(path, sheet)
    elif sheet is not None:
        raise DataError(f"{path} is no Excel workbook, so it has no sheet {sheet!r}; leave out `sheet`")
    else:
        suffix = inner_suffix(path)
        is_json = suffix == ".txt" and not as_text and holds_json_rows(path)
        rows = (read_rows if is_json else _READERS.get(suffix, read_rows))(path)
    return _renamed_rows(path, rows, columns) if columns else rows


def parse_rows(
    rows: Iterable[tuple[str, Any]],
    form: Format[Parsed],
    finish: Callable[[Parsed], Parsed] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, list[Parsed] | InvalidRow]]:
    """The place and the items of each row, or why it cannot be used. `columns` are those that `open_rows` renamed."""
    keys = row_keys(form.columns, tuple(columns or ()), form.labelled)
    for place, row in rows if form.settle is None else form.settle(rows):
        try:
            row = _as_row(row, keys)
            items = list(form.parse(row))
            if not form.whole and not keys.watched.isdisjoint(row):
                items = [_completed(item, row) for item in items]
            yield place, items if finish is None else [finish(item) for item in items]
        except InvalidRow as invalid:
            yield place, invalid


def _invalid_rows(path: Path, report: LoadReport, errors: Sequence[str], count: int, on_invalid: str) -> DataError:
    more = [f"… and {count - len(errors)} more"] if count > len(errors) else []
    remedy = "no row is left" if on_invalid == "skip" else "correct them, or drop them with data.on_invalid=skip"
    lines = "\n  ".join([*errors, *more])
    return DataError(f"{path}: {count} of {report.rows} rows cannot be used ({remedy}):\n  {lines}")


def _check_names(path: Path, formats: Mapping[str, Format[Parsed]], format: str, columns: Mapping[str, str]) -> None:
    if format != "auto" and format not in formats:
        raise DataError(
            f"unknown data format {format!r}{_nearest(format, formats)}; choose auto or one of {', '.join(formats)}"
        )
    our_names = {name for form in formats.values() for name in form.columns} | {_REASONING}
    for name in columns:
        if name not in our_names:
            raise DataError(
                f"columns of {path}: no format has a column {name!r}{_nearest(name, our_names)}; write the name in "
                "this program first, then the name in the file, e.g. instruction: question. The names in this "
                f"program are {', '.join(sorted(our_names))}"
            )


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _renamed_rows(
    path: Path, rows: Iterator[tuple[str, Any]], columns: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """The rows with renamed columns. Raises DataError after the last row if none has an optional column."""
    absent = {theirs for ours, theirs in columns.items() if ours in _OPTIONAL}
    names: list[str] = []
    for place, row in rows:
        if isinstance(row, dict):
            absent.difference_update(row)
            names = list(row)
        yield place, _rename(row, columns)
    if absent:
        raise DataError(
            f"{path}: no row has a column {min(absent)!r} (columns: {', '.join(names)}); correct `columns`"
        )


def _rename(row: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(row, dict):
        return row
    missing = [theirs for ours, theirs in columns.items() if theirs not in row and ours not in _OPTIONAL]
    if missing:
        return InvalidRow("missing field", f"no column {missing[0]!r} (columns: {', '.join(row)})")
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    return {**renamed, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def _detect(
    path: Path, rows: Iterator[tuple[str, Any]], formats: Mapping[str, Format[Parsed]]
) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The format of the first row that fits one, and all rows, also those that were read to recognise it."""
    seen: list[tuple[str, Any]] = []
    for place, row in rows:
        seen.append((place, row))
        if isinstance(row, dict):
            for name, form in formats.items():
                if form.fits(row):
                    return name, chain(seen, rows)
        if len(seen) == _LOOK_AHEAD:
            break
    first = next((row for _, row in seen if isinstance(row, dict)), None)
    if first is None:
        place, value = seen[0]
        if isinstance(value, InvalidRow):
            raise DataError(f"{place}: {value}")
        raise DataError(f"{place}: a row must be an object with named columns, got a {kind_of(value)}")
    ours = _named_columns(formats)
    if ours[-1] == "rejected" and any(name in first for name in LABELS) and any(name in first for name in ANSWERS):
        raise DataError(
            f"{path}: the rows are no pairs of answers, but single answers with a label; to learn from them, write "
            f"dpo.loss: kto (columns: {', '.join(first)})"
        )
    expected = "; ".join(f"{name}: {', '.join(form.columns)}" for name, form in formats.items())
    raise DataError(
        f"{path}: no known format has the columns {', '.join(first) or '(none)'}. Known formats and their columns: "
        f"{expected}. Write in the recipe which columns these are, the name in this program first: "
        f"{_entry(path, [row for _, row in seen if isinstance(row, dict)], formats)}"
    )


def _entry(path: Path, rows: Sequence[Row], formats: Mapping[str, Format[Parsed]]) -> str:
    """A recipe's entry of a file: with the columns that names and content suggest, else the first as an example."""
    from mlx_zh.corpus.columns import guess_columns  # which imports the formats, and they this module

    ours = _named_columns(formats)
    guess = guess_columns(rows)
    if guess is not None and guess.kind == {"rejected": "dpo", "label": "kto"}.get(ours[-1], "sft"):
        columns = guess.columns
    else:
        columns = dict(zip_longest(ours, list(rows[0])[: len(ours)], fillvalue="..."))
    entry = {"path": str(path), "columns": columns}
    return yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 16).strip()


def _named_columns(formats: Mapping[str, Format[Parsed]]) -> tuple[str, ...]:
    """Our names of the columns that a file for these formats has at least."""
    if any(form.labelled for form in formats.values()):
        return "prompt", "completion", "label"
    pairs = any("chosen" in form.columns for form in formats.values())
    return ("prompt", "chosen", "rejected") if pairs else ("instruction", "output")


def _completed(item: Parsed, row: Row) -> Parsed:
    """What a format has read, with the tools of the row, and its reasoning before the last reply."""
    if isinstance(item, Answer):
        return item._replace(messages=_completed(item.messages, row))
    tools, reasoning = described_tools(row), reasoning_of(row, "the row")
    if isinstance(item, Document):
        if tools or reasoning:
            reason = "tool message" if tools else "separate reasoning"
            raise InvalidRow(reason, "the row has tools or reasoning beside a raw text")
        return item
    completed: Any = with_tools(item, tools) if tools else item
    return _with_reasoning(completed, reasoning) if reasoning else completed


def _with_reasoning(parsed: Any, reasoning: str) -> Any:
    """Messages with this reasoning before the last reply. Raises InvalidRow for a pair, or for another one there."""
    last = parsed[-1]
    if not isinstance(parsed[0], Message):
        raise InvalidRow("separate reasoning", f"the row has reasoning apart from its answers; {REASONING_WAY}")
    if last.reasoning not in ("", reasoning):
        raise InvalidRow("two reasonings", "the row's reasoning is not that of its last reply")
    return (*parsed[:-1], replace(last, reasoning=reasoning))


def _as_row(row: Any, keys: RowKeys) -> Row:
    if isinstance(row, InvalidRow):
        raise row
    if not isinstance(row, dict):
        raise InvalidRow("wrong type", f"a row must be an object, got a {kind_of(row)}")
    return keys.read(row)
