"""Read rows one at a time from an Excel workbook (.xlsx, .xlsm, .xls), each with its row number in the sheet.

python-calamine reads the workbook: one small wheel that also knows the older .xls, some twenty times as fast as
openpyxl. It gives a cell's value and not its format, so 15 % is read as 0.15.
"""

from __future__ import annotations

import datetime
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.parsers import expat

from mlx_zh.corpus.csv_rows import table_rows
from mlx_zh.corpus.text_files import ZIP
from mlx_zh.errors import DataError, first_line

if TYPE_CHECKING:
    from python_calamine import CalamineSheet, CalamineWorkbook

EXCEL_SUFFIXES = (".xlsx", ".xlsm", ".xls")
_OLE = b"\xd0\xcf\x11\xe0"  # the container of .xls, and of an encrypted .xlsx
_CHUNK = 1 << 20  # bytes unpacked at once
# Cells of a sheet's rectangle, which calamine keeps in memory, 32 bytes each, and bytes of a workbook's parts: so
# many at most, and of a small file fewer: so many, and so many more for each of its bytes.
_MAX_CELLS, _SMALL_CELLS, _CELLS_A_BYTE = 1 << 24, 1 << 22, 2
_MAX_UNPACKED, _SMALL_UNPACKED, _RATIO = 1 << 29, 1 << 26, 50
_MAX_TEXT = 1 << 18  # bytes of a shared text, which calamine copies for each cell; Excel allows 32,767 characters
_ROW, _CELL = re.compile("[0-9]{1,9}"), re.compile("([A-Za-z]{1,7})([0-9]{1,9})")
_DIGITS = 15  # significant digits that Excel keeps of a number

# What zipfile and expat raise for damaged archives; RuntimeError: a part with a password.
_DAMAGED = (zipfile.BadZipFile, zlib.error, expat.ExpatError, OSError, EOFError, ValueError, RuntimeError)

# A part that only this kind of zip archive has, and what the user can do about it.
_OTHER_KINDS = {
    "xl/workbook.bin": "a binary workbook (.xlsb); save it as .xlsx",
    "Index/Document.iwa": "a Numbers document; choose File > Export To > Excel in Numbers (文件 > 导出为 > Excel)",
    "content.xml": "an OpenDocument file; save it as .xlsx",
    "word/document.xml": "a Word document; put the questions and answers into two columns of a table, .xlsx or .csv",
}


@dataclass(frozen=True)
class SheetInfo:
    """A sheet of a workbook: its name, and the titles above its column names."""

    name: str
    alone: bool  # whether it is the only visible sheet
    titles: tuple[str, ...] = ()


def is_workbook(path: Path) -> bool:
    """Whether the content of a file, whatever its name, is an Excel workbook.

    Raises DataError for a zip archive of a kind that the user has to save as .xlsx.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        return False  # the reader of other files says what is wrong
    if head != ZIP:
        return head == _OLE
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return path.suffix.lower() in EXCEL_SUFFIXES  # then `read_excel` says that it is damaged
    for part, remedy in _OTHER_KINDS.items():
        if part in names:
            raise DataError(f"{path}: {remedy}")
    return "xl/workbook.xml" in names


def read_excel(path: Path, sheet: str | None = None) -> Iterator[tuple[str, Any]]:
    """Each row below the names of the columns as {column: text}, with its place "file:row" or "file[sheet]:row".

    Without `sheet`, the first visible sheet with such rows is read. Cells are text as Excel shows them: 1.0 is "1",
    dates are 2024-05-01, and a formula is its stored result. Rows without any text are left out, and so are titles
    above the names of the columns.

    Raises DataError for a damaged or locked workbook, an unknown sheet and a sheet without rows.
    """
    _check_size(path)
    with _opened(path) as workbook:
        info, rows = _chosen(path, workbook, sheet)
    place = str(path) if info.alone else f"{path}[{info.name}]"
    yield from table_rows(path, place, rows)


def sheet_info(path: Path, sheet: str | None = None) -> SheetInfo:
    """The sheet that `read_excel` reads. Raises DataError."""
    _check_size(path)
    with _opened(path) as workbook:
        return _chosen(path, workbook, sheet)[0]


@contextmanager
def _opened(path: Path) -> Iterator[CalamineWorkbook]:
    from python_calamine import CalamineError, CalamineWorkbook, PasswordError

    try:
        with CalamineWorkbook.from_path(path) as workbook:
            yield workbook
    except PasswordError as error:
        raise DataError(f"{path}: the workbook has a password; save a copy without it, and name that file") from error
    except BaseException as error:
        # PanicException, from a fault in calamine itself, is no Exception.
        if not isinstance(error, CalamineError | OSError) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"{path}: cannot be read as an Excel workbook ({first_line(error)}); open it in Excel and save it as "
            ".xlsx"
        ) from error


def _chosen(
    path: Path, workbook: CalamineWorkbook, name: str | None
) -> tuple[SheetInfo, Iterator[tuple[int, list[str]]]]:
    """The sheet to read, and its rows from the names of the columns on."""
    from python_calamine import SheetTypeEnum, SheetVisibleEnum

    tables = [sheet for sheet in workbook.sheets_metadata if sheet.typ is SheetTypeEnum.WorkSheet]
    visible = [sheet.name for sheet in tables if sheet.visible is SheetVisibleEnum.Visible]
    names = [sheet.name for sheet in tables]
    if name is not None and name not in names:
        raise DataError(f"{path}: there is no sheet {name!r}; it has {', '.join(names) or 'none'}")
    for candidate in [name] if name is not None else visible:
        sheet = workbook.get_sheet_by_name(candidate)
        titles, rows = _below_titles(sheet)
        first = list(islice(rows, 2))  # the names of the columns, and a row
        if len(first) == 2 or name is not None:
            return SheetInfo(candidate, len(visible) == 1, titles), chain(first, rows)
    hidden = [other for other in names if other not in visible]
    hint = f"; hidden sheets are read only if `sheet` names them: {', '.join(hidden)}" if hidden else ""
    raise DataError(f"{path}: no sheet holds rows below the names of its columns{hint}; add rows, or another file")


def _below_titles(sheet: CalamineSheet) -> tuple[tuple[str, ...], Iterator[tuple[int, list[str]]]]:
    """The titles above the names of the columns, and all rows with text from those names on.

    A title is the only text of its row. It stands in merged cells, or it is one of up to `_TITLES` rows above one
    with several texts, and no usual name of a column.
    """
    merged = {first[0] + 1 for first, last in sheet.merged_cell_ranges or () if last[1] > first[1]}
    rows = _rows_with_text(sheet)
    titles: list[str] = []
    kept: list[tuple[int, list[str]]] = []  # rows with a single text that are no titles unless names follow
    for number, cells in rows:
        if sum(map(bool, cells)) > 1:
            alone = ["".join(row) for _, row in kept]
            if not any(map(_is_column_name, alone)):
                titles, kept = [*titles, *alone], []
            return tuple(titles), chain(kept, [(number, cells)], rows)
        if number in merged and not kept:
            titles.append("".join(cells))
        else:
            kept.append((number, cells))
        if len(kept) > _TITLES:
            break
    return tuple(titles), chain(kept, rows)


_TITLES = 3


def _is_column_name(text: str) -> bool:
    from mlx_zh.corpus.columns import is_column_name  # which imports the formats, and they the reader of this file

    return is_column_name(text)


def _rows_with_text(sheet: CalamineSheet) -> Iterator[tuple[int, list[str]]]:
    for number, values in enumerate(sheet.iter_rows(), start=1):
        cells = [_text(value) for value in values]
        if any(not cell.isspace() for cell in cells if cell):
            yield number, cells


def _text(value: Any) -> str:
    """A cell as text. Texts keep their line breaks as \\n."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n")
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 10**_DIGITS else f"{value:.{_DIGITS}G}"
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ", "seconds").removesuffix(":00")
    if isinstance(value, datetime.time):
        return value.isoformat("seconds").removesuffix(":00")
    if isinstance(value, datetime.timedelta):
        minutes, seconds = divmod(round(value.total_seconds()), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return str(value)


def _check_size(path: Path) -> None:
    """Refuse a workbook that would fill the memory before calamine opens it, which would end the process."""
    with path.open("rb") as file:
        if file.read(4) != ZIP:
            return  # the older format has at most 65,536 x 256 cells
    size = path.stat().st_size
    most = min(_MAX_UNPACKED, _SMALL_UNPACKED + _RATIO * size)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = longest = 0  # longest: bytes of a text, which many cells may share
            for part in archive.infolist():
                is_sheet = re.fullmatch(r"/?xl/worksheets/[^/]+\.xml", part.filename, re.I)
                is_strings = part.filename.lower().endswith("sharedstrings.xml")
                box = _Box(path, min(_MAX_CELLS, _SMALL_CELLS + _CELLS_A_BYTE * size)) if is_sheet else None
                with archive.open(part) as file:
                    while chunk := file.read(_CHUNK):
                        unpacked += len(chunk)
                        if unpacked > most:
                            raise DataError(
                                f"{path}: the workbook unpacks to more than {most >> 20} MB; save its sheet "
                                "as “CSV UTF-8”, and name that file"
                            )
                        if box is not None:
                            box.feed(chunk)
                        if is_strings:
                            longest = max(longest, *map(len, chunk.split(b"<si")))
                        if longest > _MAX_TEXT:
                            raise DataError(
                                f"{path}: the workbook has a text of more than {_MAX_TEXT:,} bytes, longer than "
                                "Excel allows; save its sheet as “CSV UTF-8”, and name that file"
                            )
                if box is not None:
                    box.end(part.filename)
    except _DAMAGED as error:
        raise DataError(
            f"{path}: the workbook is damaged ({first_line(error)}); open it in Excel and save it again, or copy it "
            "again"
        ) from error


class _Box:
    """The rectangle that a sheet's cells fill, from its XML. `feed` raises DataError as soon as it is too large."""

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._most = path, most
        self._rows = self._columns = self._row = self._column = 0
        self._has_table = False
        self._parser = expat.ParserCreate(namespace_separator=" ")
        self._parser.StartElementHandler = self._start

    def feed(self, chunk: bytes) -> None:
        """Read the next part of the XML. Raises ExpatError."""
        self._parser.Parse(chunk)
        if self._rows * self._columns > self._most:
            raise DataError(
                f"{self._path}: a sheet has cells up to row {self._rows} and column {self._columns}, too far apart "
                "to be read; delete the empty rows and columns around the table, or save the sheet as “CSV UTF-8”"
            )

    def end(self, part: str) -> None:
        """Say that the XML has ended. Raises ExpatError if it was cut short, ValueError if it is no sheet's.

        calamine takes the XML of anything else for a sheet without cells.
        """
        self._parser.Parse(b"", True)
        if not self._has_table:
            raise ValueError(f"{part} has no sheetData")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        kind = name.rpartition(" ")[2]
        reference = attributes.get("r", "")
        self._has_table = self._has_table or kind == "sheetData"
        if kind == "row":
            self._row = int(reference) if _ROW.fullmatch(reference) else self._row + 1
            self._column = 0
            self._rows = max(self._rows, self._row)
        elif kind == "c":
            match = _CELL.fullmatch(reference)
            self._column = _column_number(match[1]) if match else self._column + 1
            self._columns = max(self._columns, self._column)
            self._rows = max(self._rows, int(match[2])) if match else self._rows


def _column_number(letters: str) -> int:
    """A column's number from its letters: A is 1, AA is 27."""
    number = 0
    for letter in letters.upper():
        number = number * 26 + ord(letter) - ord("A") + 1
    return number
