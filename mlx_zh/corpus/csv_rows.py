"""Read rows one at a time from a CSV or TSV file, each with its line.

Python's own `csv` is used and not `datasets`, because pandas, which `datasets` uses, guesses types ("42" becomes a
number, "NA" a missing value), shifts all columns by one if the first row has a field too many, and does not tell the
line of a row.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mlx_zh.corpus.reader import InvalidRow, read_rows
from mlx_zh.corpus.text_files import (
    LONGEST,
    MARK_BYTES,
    MARKED,
    check_file,
    convert,
    encoding_of,
    first_character,
    inner_suffix,
    open_bytes,
    open_text,
    text_lines,
    within_bounds,
    wrong_encoding,
)
from mlx_zh.errors import DataError

_JSON = ("{", "[")  # some files of JSON lines are called .csv
_WEB_PAGE = ("<html", "<!doctype", "<table", "<meta", "<?xml")  # some exports are HTML or XML, called .xls
_MARK = "\ufeff"  # a byte-order mark in GB18030 is text to Python
_CHUNK = 1 << 20  # bytes decoded at once
_COMMON = 0.75  # in Chinese text, at least this share of the characters beyond ASCII is in GB2312
_FEW_MARKS = 0.1  # bytes that are no text, for each character
# Korean and Japanese in their old encodings decode as GB18030, to other Chinese characters than Chinese texts have:
# of those, these hundred are more than a third.
_FREQUENT = re.compile(
    "[的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学"
    "么之都好看起发当没成只如事把还用第样道想作种开美总从无情己面最女但现前些所同日手又行意动方期它头经长儿回位分爱老因很给名法间斯知世什两次使身者被高已亲其进此话常与活正感]"
)
_HANZI = re.compile("[\u4e00-\u9fff]")
_KANA = re.compile("[\u3041-\u30fe]")
_JUDGED, _FREQUENT_SHARE, _KANA_SHARE = 200, 0.06, 0.2  # Chinese characters that tell enough; shares of them


def read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row as {column: text} with its place "file:line", where the line is the first one of the row.

    The first row names the columns. A `.tsv` file is separated by tabs, a `.csv` file by commas, with quotation marks
    as Excel writes them. Text that is called .xls or .xlsx, as many web sites export it, and UTF-16, which Excel
    calls Unicode text, are separated by tabs if their first line has one. The text is UTF-8 (a byte-order mark is
    allowed), UTF-16 with a byte-order mark, or GB18030, which Excel writes in China. Rows without any text are left
    out. A row with more or fewer fields than columns, or with bytes that are no text, is yielded as an InvalidRow.

    Raises DataError for a file that cannot be read, text in another encoding, and an open quotation mark.
    """
    return within_bounds(path, _rows(path))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        encoding, marked = file_encoding(path)
        with open_text(path, encoding, errors=MARK_BYTES, newline="") as file:
            if first_character(file) in _JSON:
                yield from read_rows(path)
                return
            # The limit is global to the process. The library's default of 131,072 is too small for a long document.
            csv.field_size_limit(LONGEST)
            separator = _separator(path, file, encoding)
            reader = csv.reader(text_lines(path, file), delimiter=separator, strict=True)
            rows = table_rows(path, str(path), _records(path, reader))
            yield from _without_marks(path, rows) if marked else rows
    except UnicodeDecodeError as error:
        raise wrong_encoding(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _without_marks(path: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The rows; one with bytes that are no text (`MARK_BYTES` marks them) is an InvalidRow."""
    for place, row in rows:
        if isinstance(row, dict):
            if any(map(MARKED.search, row)):
                raise wrong_encoding(path)  # in the names of the columns
            marked = sum(len(MARKED.findall(text)) for text in row.values())
            if marked:
                row = InvalidRow("not UTF-8", f"{marked} bytes of the row are no text in the file's encoding")
        yield place, row


def _separator(path: Path, file: IO[str], encoding: str) -> str:
    suffix = inner_suffix(path)
    if suffix == ".tsv" or (suffix == ".csv" and encoding != "utf-16"):
        return "\t" if suffix == ".tsv" else ","
    first = file.readline(LONGEST)
    file.seek(0)
    if first.lstrip().lower().startswith(_WEB_PAGE):
        raise DataError(f"{path}: a web page that is called {suffix}; open it in Excel and save it as .xlsx")
    return "\t" if "\t" in first else ","


def file_encoding(path: Path) -> tuple[str, bool]:
    """The file's encoding, and whether some bytes are no text in it: UTF-8, UTF-16 with a mark, or Chinese GB18030.

    Raises DataError if it is none of these. A few wrong bytes do not count.
    """
    if encoding_of(check_file(path)) == "utf-16":
        return "utf-16", False
    marked, right, _ = _census(path, "utf-8")
    if marked <= right:
        return "utf-8-sig", marked > 0
    # Nearly any bytes can be decoded as GB18030, so there most characters must also be common ones.
    marked, right, common = _census(path, "gb18030")
    if marked <= _FEW_MARKS * right and common >= _COMMON * right:
        _check_chinese(path)
        return "gb18030", marked > 0
    raise wrong_encoding(path)


def _census(path: Path, encoding: str) -> tuple[int, int, int]:
    """The bytes that are no text in this encoding, the characters beyond ASCII, and those of them in GB2312."""
    decoder = codecs.getincrementaldecoder(encoding)(MARK_BYTES)
    marked = right = common = 0
    with open_bytes(path) as file:
        chunk = b"-"
        while chunk:
            chunk = file.read(_CHUNK)
            text = decoder.decode(chunk, final=not chunk)
            if text.isascii():
                continue
            beyond = len(text) - len(text.encode("ascii", "ignore"))
            marks = 0 if _is_right(text) else len(MARKED.findall(text))
            marked += marks
            right += beyond - marks
            if encoding == "gb18030":
                common += (len(text.encode("gb2312", "ignore")) - (len(text) - beyond)) // 2
    return marked, right, common


def _is_right(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_chinese(path: Path) -> None:
    """Raise DataError if the start of a text that GB18030 decodes is hardly Chinese, but Korean or Japanese."""
    with open_text(path, "gb18030", errors=MARK_BYTES) as file:
        text = file.read(_CHUNK)
    letters, kana = len(_HANZI.findall(text)), len(_KANA.findall(text))
    if letters + kana < _JUDGED:
        return
    if kana > _KANA_SHARE * letters or len(_FREQUENT.findall(text)) < _FREQUENT_SHARE * letters:
        raise DataError(
            f"{path}: the text is not UTF-8, and as GB18030 it is hardly Chinese. Convert it from its own encoding, "
            f"which may be EUC-KR (Korean) or EUC-JP (Japanese), to UTF-8: {convert(path, 'EUC-KR')}"
        )


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The first line and the fields of every row with any text."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}:{line}: not readable as CSV: {error}. Is a quotation mark left open? Inside a field, "
                'each is written twice: "he said ""hello"""'
            ) from error
        if any(not field.isspace() for field in fields if field):
            yield line, fields


def table_rows(path: Path, place: str, records: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[str, Any]]:
    """The rows of a table as `read_csv` yields them; the first of `records`, (number, fields), names the columns.

    `place` is the start of each row's place: the file, or the file and the sheet. Raises DataError.
    """
    first, header = next(records, (1, []))
    columns = _columns(f"{place}:{first}", path, header)
    line = 0
    for line, fields in records:
        if len(fields) == len(columns):
            yield f"{place}:{line}", {name: field for name, field in zip(columns, fields, strict=True) if name}
        else:
            yield (
                f"{place}:{line}",
                InvalidRow(
                    "wrong number of fields",
                    f"{len(fields)} fields where the first row names {len(columns)} columns; a field with a "
                    "separator in it must be in quotation marks",
                ),
            )
    if not line:
        raise DataError(f"{path}: the file holds no rows below the names of its columns; add rows, or another file")


def _columns(place: str, path: Path, header: Sequence[str]) -> list[str]:
    """The names of the columns; a column without a name, such as pandas' row numbers, has the name ""."""
    columns = [name.strip().lstrip(_MARK) for name in header]
    if not any(columns):
        raise DataError(f"{path}: the file holds no rows")
    twice = sorted(name for name, count in Counter(columns).items() if name and count > 1)
    if twice:
        raise DataError(f"{place}: two columns are called {twice[0]!r}; rename one of them")
    if re.fullmatch(r'"?sep=.?"?', "".join(columns)):
        raise DataError(f"{place}: delete this line, which only Excel understands; the first line names the columns")
    if len(columns) == 1 and (mark := next((mark for mark in ";\t|," if mark in columns[0]), None)):
        raise DataError(
            f"{place}: only one column, {columns[0]!r}. It seems to be separated by {mark!r}; separate columns "
            "by commas in a .csv file, by tabs in a .tsv file"
        )
    return columns
