"""CSV and TSV files as Excel and others write them: text stays text, and every row has its line."""

from __future__ import annotations

import csv
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.corpus.csv_rows import read_csv
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.errors import DataError

TEXT = "instruction,output\n中国的首都是哪里？,北京。\n一加一等于几？,2\n"
ROWS = [
    {"instruction": "中国的首都是哪里？", "output": "北京。"},
    {"instruction": "一加一等于几？", "output": "2"},
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(write, encoding: str, newline: str):
    path = write(TEXT.replace("\n", newline).encode(encoding), "data.csv")
    assert list(read_csv(path)) == [(f"{path}:2", ROWS[0]), (f"{path}:3", ROWS[1])]


def test_tabs(write):
    path = write(TEXT.replace(",", "\t"), "data.TSV")
    assert [row for _, row in read_csv(path)] == ROWS


def test_text_is_not_guessed_at(write):
    """What pandas makes numbers, nothing or a truth value of."""
    path = write("a,b\n007,NA\nnull,True\n1e3,\n", "data.csv")
    assert [tuple(row.values()) for _, row in read_csv(path)] == [("007", "NA"), ("null", "True"), ("1e3", "")]


def test_a_row_of_several_lines_is_named_by_its_first(write):
    path = write('a,b\n"one\ntwo","x,y"\n\n,\n"he said ""no""",z\n', "data.csv")
    assert list(read_csv(path)) == [
        (f"{path}:2", {"a": "one\ntwo", "b": "x,y"}),
        (f"{path}:6", {"a": 'he said "no"', "b": "z"}),  # a blank line and one of separators alone are no rows
    ]


def test_a_column_without_a_name_is_not_read(write):
    assert [row for _, row in read_csv(write(",a\n0,x\n1,y\n", "data.csv"))] == [{"a": "x"}, {"a": "y"}]


def test_a_comma_without_quotation_marks_moves_no_column(write):
    path = write("instruction,output\n你好,a, b\nx\ny,z\n", "data.csv")
    rows = [row for _, row in read_csv(path)]
    assert [str(row)[:8] for row in rows[:2]] == ["3 fields", "1 fields"]
    assert all(isinstance(row, InvalidRow) for row in rows[:2]) and rows[2] == {"instruction": "y", "output": "z"}
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be used.*\n.*data\.csv:2: 3 fields where the first row"):
        load_conversations(path)
    kept, report = load_conversations(path, on_invalid="skip")
    assert [c.source for c in kept] == [f"{path}:4"] and report.dropped == {"wrong number of fields": 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "data.csv: the file holds no rows"),
        ("a,b\n", "data.csv: the file holds no rows below"),
        ("a,b,a\n1,2,3\n", "data.csv:1: two columns are called 'a'"),
        ("a;b\n1;2\n", "data.csv:1: only one column, 'a;b'. It seems to be separated by ';'"),
        ('a,b\nx,y\nc,"d\ne,f\n', "data.csv:3: not readable as CSV: unexpected end of data. Is a quotation mark"),
        ('a,b\nx,"y"z\n', "data.csv:2: not readable as CSV"),
        ("a,b\nx,caf\xe9\n".encode("latin-1"), "data.csv:2: the text is not UTF-8"),
        ("a,b\nna\xefve,r\xe9sum\xe9s\n".encode("latin-1"), "data.csv:2: the text is not UTF-8"),
        ("a,b\n".encode("utf-16-le"), "data.csv: the text is UTF-16"),
        ("a,b\nc,d\n".encode("utf-16")[:-1], "data.csv: the UTF-16 text is damaged"),
        (b"PK\x03\x04rest", "data.csv: a damaged zip archive"),
    ],
)
def test_what_is_no_csv(write, content: str | bytes, words: str):
    path = write(content, "data.csv")
    with pytest.raises(DataError) as error:
        list(read_csv(path))
    assert words in str(error.value)


def bad_rows(path: Path) -> dict[str, tuple[str, str]]:
    """The line, reason and details of each row that cannot be used."""
    return {
        place.rpartition(":")[2]: (row.reason, str(row))
        for place, row in read_csv(path)
        if isinstance(row, InvalidRow)
    }


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_bytes_that_are_no_text_cost_their_row(write, encoding):
    line = "今天天气很好,我们一起去公园散步\n".encode(encoding)
    path = write(b"a,b\n" + line * 3 + b"x,caf\xff\n" + line, "data.csv")
    assert bad_rows(path) == {"5": ("not UTF-8", "1 bytes of the row are no text in the file's encoding")}
    assert [row for _, row in read_csv(path)].count({"a": "今天天气很好", "b": "我们一起去公园散步"}) == 4


def test_a_row_in_gb18030_among_utf8_is_one_bad_row(write):
    """Read as GB18030, Chinese in UTF-8 is nonsense of rare characters."""
    line = "今天天气很好我们一起去公园散步,好的\n"
    path = write(("a,b\n" + line * 20).encode() + line.encode("gb18030"), "data.csv")
    assert bad_rows(path).keys() == {"22"}


def test_names_of_columns_that_are_no_text(write):
    with pytest.raises(DataError, match=r"data\.csv:1: the text is not UTF-8"):
        list(read_csv(write(b"a,caf\xff\n" + "今天,天气\n".encode() * 9, "data.csv")))


@pytest.mark.parametrize(("separator", "name"), [(",", "a.csv"), ("\t", "a.csv"), ("\t", "a.tsv")])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_as_excel_writes_it(write, separator, name, encoding):
    text = f"\ufeffa{separator}b\r\n你好{separator}好\r\n"
    path = write(text.encode(encoding), name)
    assert list(read_csv(path)) == [(f"{path}:2", {"a": "你好", "b": "好"})]


KOREAN = (
    "안녕하세요 오늘은 날씨가 좋아서 친구들과 함께 공원에 갔습니다",
    "대한민국의 수도는 서울이며 인구는 약 구백만 명입니다",
    "책을 읽는 것은 지식을 넓히고 생각을 깊게 하는 좋은 방법이다",
    "질문에 대한 답변을 한국어로 자세하게 설명해 주세요",
)
JAPANESE = (
    "今日は天気が良かったので、友達と一緒に公園へ行きました。",
    "日本の首都は東京で、人口は約千四百万人です。",
    "この問題の解決方法を日本語で詳しく説明してください。",
    "読書は知識を広げ、考えを深めるための良い方法である。",
)


@pytest.mark.parametrize(("encoding", "texts"), [("euc_kr", KOREAN), ("euc_jp", JAPANESE)])
def test_korean_and_japanese_are_not_taken_for_chinese(write, encoding, texts):
    lines = "a,b\n" + "".join(f"{a},{b}\n" for a in texts for b in texts)
    with pytest.raises(DataError, match="as GB18030 it is hardly Chinese"):
        list(read_csv(write(lines.encode(encoding), "data.csv")))
    assert len(list(read_csv(write(lines, "data.csv")))) == 16


def test_real_chinese_is_taken_for_chinese(samples, write):
    for path in sorted((samples / "ceval" / "val").glob("*.csv")) + sorted((samples / "cmmlu").rglob("*.csv")):
        text = path.read_text(encoding="utf-8")
        rows = [row for _, row in read_csv(write(text.encode("gb18030"), "data.csv"))]
        assert rows == [row for _, row in read_csv(write(text, "data.csv"))]


def test_missing(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        list(read_csv(tmp_path / "none.csv"))


def test_a_long_field(write):
    """Longer than the 131,072 characters that Python's csv takes by itself."""
    path = write(f"a,b\nx,{'好' * 200_000}\n", "data.csv")
    assert len(next(read_csv(path))[1]["b"]) == 200_000


def test_columns_are_guessed_and_named_as_in_json(write):
    path = write("问题,chosen,rejected\n你好,您好！,走开\n", "data.csv")
    (pair,), report = load_preferences(path, columns={"question": "问题"})
    assert (pair.prompt[0].content, pair.chosen, pair.rejected) == ("你好", "您好！", "走开")
    assert report.format == "orca"
    with pytest.raises(DataError, match="no known format has the columns 问题, chosen, rejected"):
        load_preferences(path)


CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.tuples(CELL, CELL), min_size=1), st.sampled_from(["csv", "tsv"]))
def test_whatever_csv_writes_is_read_back(rows: list[tuple[str, str]], kind: str):
    """But for rows that hold no text."""
    rows.append(("last", "row"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data.{kind}"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, "excel" if kind == "csv" else "excel-tab").writerows([("a", "b"), *rows])
        found = [tuple(row.values()) for _, row in read_csv(path)]
    assert found == [row for row in rows if any(cell.strip() for cell in row)]


def test_memory_does_not_grow_with_the_file(write):
    path = write("instruction,output\n" + f"问题,{'答' * 300}\n" * 30_000, "data.csv")  # 27 MB
    tracemalloc.start()
    rows = sum(1 for _ in read_csv(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 30_000 and peak < 8 << 20


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_json_lines_under_another_name_are_read_as_what_they_are(write, name: str):
    path = write('{"instruction": "问", "output": "答"}\n', name)
    assert list(read_csv(path)) == [(f"{path}:1", {"instruction": "问", "output": "答"})]


def test_a_byte_order_mark_in_gb18030_is_no_part_of_the_first_name(write):
    path = write("\ufeffinstruction,output\n问题一,回答一\n".encode("gb18030"), "a.csv")
    assert list(read_csv(path)) == [(f"{path}:2", {"instruction": "问题一", "output": "回答一"})]


@pytest.mark.parametrize("line", ["sep=,", '"sep=,"', "sep=;"])
def test_excels_own_line_is_named(write, line: str):
    path = write(f"{line}\ninstruction,output\na,b\n", "a.csv")
    with pytest.raises(DataError, match=r"a\.csv:1: delete this line"):
        list(read_csv(path))
