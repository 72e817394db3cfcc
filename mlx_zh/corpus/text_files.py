"""Files of text as they are stored: plain or compressed, in UTF-8 or UTF-16, and what is no text at all.

gzip, bzip2, xz and Zstandard are read, and a zip archive with one data file. The content decides, not the name.
PyArrow unpacks Zstandard, which Python's own library does not before 3.14. Nothing is unpacked to disk, and a file
that unpacks to many times its size is refused on the way.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from mlx_zh.corpus.invalid_row import InvalidRow
from mlx_zh.errors import DataError, first_line
from mlx_zh.system.links import check_regular
from mlx_zh.system.storage import is_system_note, visible

PARQUET, ZIP = b"PAR1", b"PK\3\4"
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
MARK_BYTES, MARKED = "surrogateescape", re.compile("[\udc80-\udcff]")  # a byte that is no text becomes a surrogate
LONGEST = 1 << 24  # characters that a line or a value may have; a longer one is a mistake
_TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
_BLANK = " \t\r\n"
_CHUNK = 1 << 20
# What a packed file may unpack to: bytes, and times its size; rows, and bytes of its size for each more; lines, and
# one more for each byte of its size.
_SMALL, _RATIO, _FEW_ROWS, _BYTES_A_ROW, _LINES = 1 << 24, 50, 10_000, 4, 1 << 20
WEB_PAGE = ("<html", "<!doctype", "<table", "<meta", "<?xml")  # how an HTML or XML file begins
_OLE, _APPLE_DOUBLE = b"\xd0\xcf\x11\xe0", b"\0\5\x16\7"
_LFS = b"version https://git-lfs.github.com/spec/"
_ARCHIVES, _PDF = (b"7z\xbc\xaf'\x1c", b"Rar!\x1a\x07"), b"%PDF-"
_TAR, _TAR_AT = b"ustar", 257
_TELLING = 6  # bytes after the first ones of characters in UTF-8, which GB18030 seldom has by chance
HEAD = 512  # bytes that tell what a file is
# What the libraries raise for damaged content; RuntimeError: a zip archive with a password.
_DAMAGED = (zlib.error, lzma.LZMAError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError, OSError)


def check_file(path: Path) -> bytes:
    """The first four bytes of a file's content, unpacked. Raises DataError for what holds no text and no Parquet."""
    if path.is_dir():
        names = [entry.name for entry in visible(path.iterdir()) if entry.suffix in (".json", ".jsonl")][:5]
        hint = f"; it has {', '.join(names)}" if names else ""
        raise DataError(f"{path}: a folder; name one file in it{hint}")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    check_regular(path, DataError)
    with open_bytes(path) as file:
        head = file.read(HEAD)
    check_stored(path, head)
    if is_packed(path) and head.startswith((PARQUET, ZIP, _OLE)):
        raise DataError(f"{path}: what is compressed is no text; unpack it, and name the file in it")
    _check_unicode(path, head)
    return head[:4]


def check_stored(path: Path, head: bytes) -> None:
    """Raise DataError for a file that begins so and stands for another one, is damaged, or is of a kind not read."""
    if head.startswith(_LFS):
        raise DataError(
            f"{path}: a Git LFS pointer, not the data itself. Run `git lfs pull` in that folder, or download the "
            "file from its page on the hub"
        )
    if head.startswith(_APPLE_DOUBLE):
        raise DataError(f"{path}: a note that macOS wrote beside a file, not the file; name the one without `._`")
    if head[:4] == bytes(4):
        raise DataError(f"{path}: the file begins with zero bytes, so it is damaged; copy or download it again")
    if head[_TAR_AT:].startswith(_TAR):
        raise DataError(f"{path}: a tar archive; unpack it, and name the data file in it")
    if head.startswith(_ARCHIVES):
        raise DataError(f"{path}: a 7z or RAR archive; unpack it, and name the data file in it")
    if head.startswith(_PDF):
        raise DataError(
            f"{path}: a PDF document; save its text as .txt or .md, or its questions and answers as .xlsx"
        )


def _check_unicode(path: Path, head: bytes) -> None:
    """Raise DataError for UTF-32, and for UTF-16 without a byte-order mark."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise DataError(f"{path}: the text is UTF-32; convert it: {convert(path, 'UTF-32')}")
    # Without a mark, UTF-16 has a zero byte next to the first ASCII character.
    if encoding_of(head) != "utf-16" and 0 in head[:2]:
        raise DataError(f"{path}: the text is UTF-16; convert it: {convert(path, 'UTF-16')}")


def encoding_of(head: bytes) -> str:
    """The encoding that a text's first bytes tell: utf-16 with a byte-order mark, else utf-8-sig."""
    return "utf-16" if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def open_text(path: Path, encoding: str, *, errors: str = "strict", newline: str = "\n") -> IO[str]:
    """A file's text, unpacked if it is compressed. Reading it raises DataError where the compression is damaged."""
    if not is_packed(path):
        return path.open(encoding=encoding, errors=errors, newline=newline)
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, errors=errors, newline=newline)


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, unpacked if it is compressed."""
    opener = _opener(path)
    if opener is None:
        return path.open("rb")
    return io.BufferedReader(_Unpacked(path, opener), _CHUNK)


def is_packed(path: Path) -> bool:
    """Whether a file is compressed. A workbook is a zip archive too; its reader asks first."""
    return _opener(path) is not None


def inner_suffix(path: Path) -> str:
    """The ending of the name of a file's content, in lower case: .csv of a.csv, a.csv.gz and a.zip with a.csv."""
    head = _head(path)
    if head[:4] == ZIP:
        return PurePosixPath(_member(path)[1]).suffix.lower()
    return (Path(path.stem) if _packing(head) is not None else path).suffix.lower()


def within_bounds(path: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The rows. Raises DataError where a compressed file has so many that no data set of texts does."""
    if not is_packed(path):
        return rows
    return _counted(path, rows)


def _counted(path: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    most = _FEW_ROWS + path.stat().st_size // _BYTES_A_ROW
    for number, row in enumerate(rows):
        if number == most:
            raise _too_large(path, f"more than {most:,} rows")
        yield row


def _too_large(path: Path, what: str) -> DataError:
    size = path.stat().st_size
    return DataError(
        f"{path}: {size:,} bytes unpack to {what}, and few data sets of texts do so. If it is right, unpack the file "
        "and name what is in it"
    )


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(6)
    except OSError:
        return b""  # who opens the file says what is wrong


def _packing(head: bytes) -> Callable[[Path], Any] | None:
    return next((opener for magic, opener in _PACKINGS.items() if head.startswith(magic)), None)


def _opener(path: Path) -> Callable[[], Any] | None:
    """What opens the unpacked content, or None for a file that is not compressed."""
    head = _head(path)
    if head[:4] == ZIP:
        return lambda: _open_member(path)
    opener = _packing(head)
    return None if opener is None else lambda: opener(path)


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


_PACKINGS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}


def _open_member(path: Path) -> Any:
    part, _ = _member(path)
    return zipfile.ZipFile(path).open(part)


def _member(path: Path) -> tuple[zipfile.ZipInfo, str]:
    """The only data file of a zip archive, and its name. Raises DataError if there are several, or none."""
    try:
        with zipfile.ZipFile(path) as archive:
            every = [(part, _name(part)) for part in archive.infolist() if not part.is_dir()]
    except _DAMAGED as error:
        raise DataError(
            f"{path}: a damaged zip archive ({first_line(error)}); download it again. If it is an Excel workbook, "
            "open it in Excel and save it again"
        ) from error
    own = [(part, name) for part, name in every if not any(map(is_system_note, PurePosixPath(name).parts))]
    members = [(part, name) for part, name in own if name.lower().endswith(_TEXT_SUFFIXES)] or own
    if len(members) != 1:
        listed = ", ".join(name for _, name in members[:5]) + (" …" if len(members) > 5 else "")
        raise DataError(
            f"{path}: a zip archive of {len(members)} files ({listed or 'none'}); unpack it, and name the folder, or "
            "a file in it"
        )
    part, name = members[0]
    if part.flag_bits & 1:
        raise DataError(f"{path}: the zip archive has a password; unpack it, and name {name}")
    return part, name


def _name(part: zipfile.ZipInfo) -> str:
    """A member's name. Chinese Windows writes it in GBK, where zipfile takes it for code page 437."""
    if not part.flag_bits & 0x800:
        try:
            return part.filename.encode("cp437").decode("gb18030")
        except UnicodeError:
            pass
    return part.filename


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a file. Raises DataError where they are damaged, or far more than the file's own."""

    def __init__(self, path: Path, opener: Callable[[], Any]) -> None:
        self._path, self._opener = path, opener
        size = path.stat().st_size
        self._most, self._most_lines = _SMALL + _RATIO * size, _LINES + size
        self._count = self._lines = 0
        self._stream = self._guarded(opener)

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true, but only back to the start."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go back to the start, or stay."""
        if offset == 0 and whence == io.SEEK_SET:
            self._stream.close()
            self._stream = self._guarded(self._opener)
            self._count = self._lines = 0
        elif (offset, whence) != (0, io.SEEK_CUR):
            raise io.UnsupportedOperation("only back to the start")
        return self._count

    def tell(self) -> int:
        """The number of bytes read."""
        return self._count

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into `buffer`; returns how many."""
        data = self._guarded(lambda: self._stream.read(len(buffer)))
        buffer[: len(data)] = data
        self._count += len(data)
        if self._count > self._most:
            raise _too_large(self._path, f"more than {self._most >> 20} MB")
        self._lines += data.count(b"\n")
        if self._lines > self._most_lines:
            raise _too_large(self._path, f"more than {self._most_lines:,} lines")
        return len(data)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._stream.close()
        super().close()

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (MemoryError, *_DAMAGED) as error:
            raise DataError(
                f"{self._path}: the compressed file is damaged or cut short ({first_line(error)}); download it again"
            ) from error


def first_character(file: IO[str]) -> str:
    """The first character that is not blank; the file's position is set back to the start."""
    while (character := file.read(1)) and character in _BLANK:
        pass
    file.seek(0)
    return character


def text_lines(path: Path, file: IO[str]) -> Iterator[str]:
    """The lines of a file. Raises DataError for a line that is too long for a row, before reading all of it."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST:
            raise too_long(f"{path}:{number}", "line")
        yield line


def too_long(place: str, kind: str) -> DataError:
    """An error for a line or a value that is longer than a row can be."""
    return DataError(
        f"{place}: a {kind} of more than {LONGEST >> 20} million characters is no row. If line breaks were lost, "
        "write one JSON object per line; else take this row out"
    )


def web_page(path: Path) -> DataError:
    """An error for a web page under the name of a data file, such as a hub's page of an error or a login."""
    return DataError(f"{path}: a web page, not the data; download the file again, from its own address")


class WrongEncoding(DataError):
    """A text that is neither UTF-8 nor UTF-16."""


def wrong_encoding(path: Path) -> WrongEncoding:
    """An error with the first line that is not UTF-8, and the encoding that it seems to have."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, line = 1, b""
    with open_bytes(path) as file:
        if encoding_of(head := file.read(_CHUNK)) == "utf-16":
            return WrongEncoding(f"{path}: the UTF-16 text is damaged; save it again as UTF-8")
        chunk = head
        while chunk:
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                start = error.object.rfind(b"\n", 0, error.start) + 1
                end = error.object.find(b"\n", error.start)
                number += error.object.count(b"\n", 0, error.start)
                line = error.object[start : end if end >= 0 else None]
                break
            number += chunk.count(b"\n")
            chunk = file.read(_CHUNK)
    try:
        codecs.getincrementaldecoder("gb18030")().decode(line)
    except UnicodeDecodeError:
        return WrongEncoding(
            f"{path}:{number}: the text is not UTF-8; convert the file to UTF-8 or correct this line"
        )
    return WrongEncoding(
        f"{path}:{number}: the text is not UTF-8, it looks like GBK; convert it: {convert(path, 'GB18030')}"
    )


def convert(path: Path, encoding: str) -> str:
    """The command that converts a file to UTF-8."""
    return f"iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}"


def beyond_ascii(text: str) -> tuple[int, int]:
    """The bytes of a text beyond ASCII: those that are not UTF-8 (`MARK_BYTES` marks them), and those that are."""
    if text.isascii():
        return 0, 0
    try:
        return 0, len(text.encode())
    except UnicodeEncodeError:
        right = MARKED.sub("", text)
        return len(text) - len(right), len(right.encode()) - len(right.encode("ascii", "ignore"))


def is_utf8_in_gb18030(text: str) -> bool:
    """Whether a text that was decoded as GB18030 is UTF-8: a file that two others were joined to."""
    raw = text.encode("gb18030", MARK_BYTES)
    try:
        beyond = len(raw) - len(raw.decode())
    except UnicodeDecodeError:
        return False
    return beyond >= _TELLING


def not_utf8(text: str, marked: int, right: int, encoding: str = "utf-8") -> InvalidRow:
    """A row with `marked` bytes that are not in the file's encoding, and `right` beyond ASCII that are."""
    if encoding == "gb18030":
        return InvalidRow("not UTF-8", f"{marked} bytes of the row are no text in the file's encoding")
    try:
        text.encode(errors=MARK_BYTES).decode("gb18030")
    except UnicodeDecodeError:
        right = marked
    if marked > right:
        return InvalidRow("not UTF-8", f"the line is not UTF-8, it looks like GBK ({marked} bytes)")
    return InvalidRow("not UTF-8", f"{marked} bytes of the line are not UTF-8")
