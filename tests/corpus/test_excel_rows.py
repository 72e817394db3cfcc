"""Excel workbooks: cells as the text that Excel shows, the sheet that is meant, and files that are none."""

from __future__ import annotations

import datetime
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import openpyxl
import pytest
import strategies
from hypothesis import strategies as st

from mlx_zh.corpus.excel_rows import is_workbook, read_excel, sheet_info
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.rows import open_rows
from mlx_zh.errors import DataError


def workbook(path: Path, **sheets: list[list[Any]]) -> Path:
    """A workbook with these rows in its sheets."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


QA = [["问题", "答案"], ["几点开门？", "九点。"], ["几点关门？", "五点。"]]


def test_rows_are_named_by_the_first_row_and_numbered_as_in_excel(tmp_path: Path) -> None:
    path = workbook(tmp_path / "qa.xlsx", Sheet1=[QA[0], QA[1], [], ["", " "], QA[2]])
    assert list(read_excel(path)) == [
        (f"{path}:2", {"问题": "几点开门？", "答案": "九点。"}),
        (f"{path}:5", {"问题": "几点关门？", "答案": "五点。"}),
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.0, "1"),
        (42, "42"),
        (-0.5, "-0.5"),
        (0.1 + 0.2, "0.3"),
        (1e20, "1E+20"),
        (13812345678, "13812345678"),
        (True, "TRUE"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01 12:30"),
        (datetime.datetime(2024, 5, 1, 12, 30, 7), "2024-05-01 12:30:07"),
        (datetime.time(8, 5), "08:05"),
        ("007", "007"),
        ("NA", "NA"),
        ("一\n二", "一\n二"),
        ("一_x000D_\n二", "一\n二"),  # a line break of Windows, as a workbook stores it
        ("x" * 32_767, "x" * 32_767),  # the longest text of a cell
    ],
)
def test_a_cell_is_the_text_that_excel_shows(tmp_path: Path, value: Any, shown: str) -> None:
    path = workbook(tmp_path / "a.xlsx", Sheet1=[["a"], [value]])
    assert [row for _, row in read_excel(path)] == [{"a": shown}]


def test_the_first_visible_sheet_with_rows_is_read_and_places_name_it(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", 说明=[["怎么用"]], 隐藏=QA, 数据=QA, 更多=[["a"], ["b"]])
    book = openpyxl.load_workbook(path)
    book["隐藏"].sheet_state = "hidden"
    book.save(path)
    assert [place for place, _ in read_excel(path)] == [f"{path}[数据]:2", f"{path}[数据]:3"]
    assert sheet_info(path).name == "数据"
    assert [row for _, row in read_excel(path, "更多")] == [{"a": "b"}]
    assert len(list(read_excel(path, "隐藏"))) == 2
    with pytest.raises(DataError, match="no sheet '数'; it has 说明, 隐藏, 数据, 更多"):
        list(read_excel(path, "数"))


def test_titles_in_merged_cells_stand_above_the_names_of_the_columns(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", Sheet1=[["客服问答"], ["2024 年"], *QA])
    book = openpyxl.load_workbook(path)
    for row in (1, 2):
        book["Sheet1"].merge_cells(f"A{row}:B{row}")
    book.save(path)
    assert sheet_info(path).titles == ("客服问答", "2024 年")
    assert next(read_excel(path)) == (f"{path}:4", {"问题": "几点开门？", "答案": "九点。"})


def test_a_title_need_not_be_merged(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", Sheet1=[["公司问答表"], ["2024 年"], *QA])
    assert sheet_info(path).titles == ("公司问答表", "2024 年")
    assert next(read_excel(path)) == (f"{path}:4", {"问题": "几点开门？", "答案": "九点。"})


def test_a_column_without_a_second_name_is_no_title(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", Sheet1=[["问题"], ["几点开门？", "九点。"]])
    assert sheet_info(path).titles == ()
    texts = workbook(tmp_path / "b.xlsx", Sheet1=[["正文"], *[[f"第 {i} 段"] for i in range(6)], ["又一段", "附注"]])
    assert sheet_info(texts).titles == ()


def test_a_formula_is_its_stored_result(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", Sheet1=[["a", "b"], ["x", '=A2&"y"']])
    assert [row for _, row in read_excel(path)] == [{"a": "x", "b": ""}]  # openpyxl stores no result


def test_the_content_and_not_the_name_says_whether_it_is_a_workbook(tmp_path: Path) -> None:
    expected = [{"问题": "几点开门？", "答案": "九点。"}, {"问题": "几点关门？", "答案": "五点。"}]
    called_csv = workbook(tmp_path / "a.csv", Sheet1=QA)
    commas, tabs = tmp_path / "b.xlsx", tmp_path / "c.xls"
    commas.write_text("\n".join(map(",".join, QA)), encoding="utf-8-sig")
    tabs.write_text("\n".join(map("\t".join, QA)), encoding="gb18030")
    for path in (called_csv, commas, tabs):
        assert [row for _, row in open_rows(path)] == expected


def test_a_workbook_is_an_ordinary_data_file(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", Sheet1=[["x"], ["y"]], 问答=QA)
    columns = {"prompt": "问题", "response": "答案"}
    conversations, report = load_conversations(path, columns=columns, sheet="问答")
    assert [[m.content for m in c.messages] for c in conversations] == [
        ["几点开门？", "九点。"],
        ["几点关门？", "五点。"],
    ]
    assert report.kept == 2


def test_a_sheet_of_another_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a\nb\n")
    with pytest.raises(DataError, match="is no Excel workbook, so it has no sheet 'x'; leave out `sheet`"):
        open_rows(path, sheet="x")


def archive(path: Path, **parts: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in parts.items():
            file.writestr(name, text)
    return path


def test_files_that_cannot_be_read_say_what_to_do(tmp_path: Path) -> None:
    encrypted = tmp_path / "locked.xlsx"
    encrypted.write_bytes(locked())
    cases = {
        workbook(tmp_path / "empty.xlsx", Sheet1=[]): "no sheet holds rows below the names of its columns",
        workbook(tmp_path / "header.xlsx", Sheet1=[QA[0]]): "no sheet holds rows below the names of its columns",
        workbook(tmp_path / "twice.xlsx", Sheet1=[["a", "a"], [1, 2]]): "two columns are called 'a'",
        encrypted: "the workbook has a password; save a copy without it",
        archive(tmp_path / "n.numbers", **{"Index/Document.iwa": ""}): "a Numbers document; choose File > Export To",
        archive(tmp_path / "o.xlsx", **{"content.xml": ""}): "an OpenDocument file; save it as .xlsx",
        archive(
            tmp_path / "z.zip", **{"a.csv": "", "b.csv": ""}
        ): r"a zip archive of 2 files \(a\.csv, b\.csv\); unp",
    }
    page = tmp_path / "web.xls"
    page.write_text("<html><table><tr><td>a</td></tr></table></html>")
    cases[page] = "a web page that is called .xls; open it in Excel and save it as .xlsx"
    damaged = tmp_path / "cut.xlsx"
    damaged.write_bytes(workbook(tmp_path / "whole.xlsx", Sheet1=QA).read_bytes()[:2000])
    cases[damaged] = "the workbook is damaged"
    for path, message in cases.items():
        with pytest.raises(DataError, match=message):
            list(open_rows(path))


def locked() -> bytes:
    """An Excel file with a password, as far as a reader looks: a compound file with a stream EncryptedPackage."""
    free, end, fat_sector, none = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD, 0xFFFFFFFF
    header = struct.pack("<8s16sHHHHH6x", bytes.fromhex("d0cf11e0a1b11ae1"), b"", 0x3E, 3, 0xFFFE, 9, 6)
    header += struct.pack("<IIIIIIIII", 0, 1, 1, 0, 4096, end, 0, end, 0) + struct.pack("<109I", 0, *[free] * 108)

    def entry(name: str, kind: int, child: int, start: int, size: int) -> bytes:
        text = name.encode("utf-16le")
        packed = text.ljust(64, b"\0") + struct.pack("<HBBIII", len(text) + 2, kind, 1, none, none, child)
        return packed + b"\0" * 36 + struct.pack("<IQ", start, size)

    fat = struct.pack("<128I", fat_sector, end, *range(3, 10), end, *[free] * 118)
    folder = entry("Root Entry", 5, 1, end, 0) + entry("EncryptedPackage", 2, none, 2, 4096)
    return header + fat + folder.ljust(512, b"\0") + b"x" * 4096


def test_a_sheet_with_cells_far_apart_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = workbook(tmp_path / "far.xlsx", Sheet1=QA)
    book = openpyxl.load_workbook(path)
    book["Sheet1"]["XFD1048576"] = "x"
    book.save(path)
    with pytest.raises(DataError, match="cells up to row 1048576 and column 16384, too far apart"):
        next(read_excel(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return workbook(tmp_path_factory.mktemp("whole") / "a.xlsx", Sheet1=QA).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda xml: b"<a/>",
        lambda xml: b"",
        lambda xml: xml[: len(xml) // 2],
        lambda xml: xml.replace(b"sheetData", b"sheetDate"),
        lambda xml: bytes(len(xml)),
    ],
    ids=["another root", "empty", "cut", "no table", "zeros"],
)
def test_a_damaged_sheet_is_not_told_as_an_empty_one(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    whole, path = workbook(tmp_path / "whole.xlsx", Sheet1=QA), tmp_path / "damaged.xlsx"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            part = source.read(name)
            target.writestr(name, change(part) if name == "xl/worksheets/sheet1.xml" else part)
    with pytest.raises(DataError, match="the workbook is damaged"):
        list(read_excel(path))


def test_a_workbook_of_zero_bytes_is_damaged_and_not_utf_16(tmp_path: Path) -> None:
    path = tmp_path / "zeros.xlsx"
    path.write_bytes(bytes(9000))
    with pytest.raises(DataError, match="zero bytes, so it is damaged"):
        list(open_rows(path))


@hypothesis.given(data=st.data())
def test_a_damaged_workbook_is_read_or_refused(
    told: Any, tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: Any
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.xlsx"
    path.write_bytes(data.draw(strategies.damaged(whole)))
    message = told(lambda: is_workbook(path) and list(read_excel(path)))
    assert message is None or message.startswith(str(path))
