"""Files that cannot be read are named with line, column and remedy."""

from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from mlx_zh.corpus import json_rows
from mlx_zh.corpus.reader import InvalidRow, read_rows
from mlx_zh.errors import DataError

ROWS = [{"a": "你好", "b": [1, 2.5, None, True]}, {"a": 'x"]},\n{', "b": {}}, {"a": "\u2028", "b": "end"}]


def rows_of(path):
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("window", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_array_in_windows_of_any_size(write, monkeypatch, window, indent, ascii_only):
    monkeypatch.setattr(json_rows, "_CHUNK", window)
    path = write(json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only) + "\n", "data.json")
    assert list(read_rows(path)) == [(f"{path}[{i}]", row) for i, row in enumerate(ROWS)]


def test_lines_whatever_the_name(write):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = write(lines[0] + "\r\n\n  \n" + lines[1] + "\n" + lines[2], "data.json")  # blank lines, no last newline
    assert list(read_rows(path)) == [(f"{path}:{n}", row) for n, row in zip((1, 4, 5), ROWS, strict=True)]


@pytest.mark.parametrize("text", [json.dumps(ROWS), "\n".join(map(json.dumps, ROWS))])
def test_a_byte_order_mark_is_no_part_of_the_data(write, text):
    assert rows_of(write(b"\xef\xbb\xbf" + text.encode())) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        (" \n\n", "holds no rows"),
        ("[ \n]", "the array is empty"),
        ("instruction,output\na,b\n", "not JSON: it begins with 'i'"),
        ('{\n  "a": 1\n}\n', ":1: an object over several lines"),
        ('[{"a": 1},\n {"a": 2},\n {"a": }]', ":3: broken JSON at column 8: Expecting value"),
        ('[{"a": 1},\n {"a": 2}\n {"a": 3}]', ":3: broken JSON at column 2: expected , or ]"),
        ('[{"a": 1},\n {"a": "x', ":2: broken JSON at column 8: Unterminated string"),
        ('[{"a": 1},\n', ":2: broken JSON at column 1: Expecting value"),
        ('[{"a": 1}', ":1: broken JSON at column 10: expected , or ], the file ends"),
        ('[{"a": 1}]\n]', ":2: broken JSON at column 1: text after the end"),
        ("[" + '{"a":' * 100_000, "nested too deeply|recursion"),
        ('[{"a": ' + "1" * 5000 + "}]", "broken JSON at column 2: Exceeds the limit"),
    ],
)
def test_what_is_no_data(write, monkeypatch, content, message):
    monkeypatch.setattr(json_rows, "_CHUNK", 5)
    if len(content) > 1000:
        monkeypatch.undo()
    path = write(content, "data.json")
    with pytest.raises(DataError, match=message) as caught:
        rows_of(path)
    assert str(caught.value).startswith(str(path))


def test_a_broken_array_is_not_read_to_its_end(write, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK", 64)
    path = write('[{"a": x' + " " * 10_000 + "]")
    reads = []
    more = json_rows.JsonWindow._more
    monkeypatch.setattr(json_rows.JsonWindow, "_more", lambda window: (reads.append(1), more(window)))
    with pytest.raises(DataError, match="column 8"):
        rows_of(path)
    assert len(reads) <= 2


def test_broken_lines_are_rows_of_their_own(write):
    path = write('{"a": 1}\n{"a": \n{"a": 3}\n' + '{"a":' * 100_000 + "\n" + '{"a": ' + "1" * 5000 + "}\n")
    found = rows_of(path)
    assert found[0] == {"a": 1} and found[2] == {"a": 3}
    assert [row.reason for row in found if isinstance(row, InvalidRow)] == [
        "broken JSON",
        "nested too deeply",
        "broken JSON",
    ]
    assert str(found[1]) == "broken JSON at column 7: Expecting value"


CHINESE = "中国的首都是北京，他们在那里工作和学习。"


@pytest.mark.parametrize("name", ["lines", "array", "columns", "document"])
def test_json_in_gb18030_is_read(write, name):
    """As tables are. The first rows are ASCII, so the encoding shows only later."""
    rows = [{"a": "x"}, {"a": CHINESE}, {"a": "誠實\\"}, {"a": "这是我们的"}]  # 誠 has a backslash as its second byte
    texts = {
        "lines": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "array": json.dumps(rows, ensure_ascii=False),
        "columns": json.dumps({"a": [row["a"] for row in rows], "b": ["y"] * 4}, ensure_ascii=False),
        "document": json.dumps({"data": rows}, ensure_ascii=False, indent=1),
    }
    read = rows_of(write(texts[name].encode("gb18030")))
    assert [row["a"] for row in read] == [row["a"] for row in rows]


@pytest.mark.parametrize("as_array", [False, True])
def test_a_row_in_another_encoding_than_gb18030_is_one_bad_row(write, as_array):
    good, other = json.dumps({"a": CHINESE}, ensure_ascii=False), json.dumps({"a": CHINESE[:11]}, ensure_ascii=False)
    rows = [good.encode("gb18030")] * 9 + [other.encode(), b'{"a": "\xff\xff"}']
    read = rows_of(write(b"[" + b",".join(rows) + b"]" if as_array else b"\n".join(rows)))
    assert [row["a"] for row in read[:9]] == [CHINESE] * 9
    assert [row.reason for row in read[9:]] == ["not UTF-8"] * 2


def test_texts_in_other_encodings_are_named(write):
    big5 = '{"a": "這個問題怎麼回答，我們不知道"}\n'.encode("big5")
    with pytest.raises(DataError, match=r"looks like Big5; convert it: iconv -f BIG5-HKSCS"):
        rows_of(write(big5))
    with pytest.raises(DataError, match=r"data\.jsonl:1: the text is not UTF-8; convert the file"):
        rows_of(write('{"a": "é à"}\n'.encode("latin1")))


def test_marks_in_joined_files_and_commas_after_rows(write):
    assert rows_of(write('\ufeff{"a": 1}\n\ufeff{"a": 2}\n'.encode())) == [{"a": 1}, {"a": 2}]
    first, _ = rows_of(write(b'{"a": 1},\n{"a": 2},\n'))
    assert str(first) == "broken JSON at column 9: there is a comma after the row; take it out"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html>\n<html>", "a web page, not the data"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"Rar!\x1a\x07\x00", "a 7z or RAR archive"),
        (b"7z\xbc\xaf'\x1c", "a 7z or RAR archive"),
    ],
)
def test_files_of_other_kinds_are_named(write, content, what):
    with pytest.raises(DataError, match=rf"data\.jsonl: {what}"):
        rows_of(write(content))


def test_a_line_in_gbk_among_others_is_one_bad_row(write):
    """Of the eight bytes of 世界和平, the last two (c6 bd) happen to be a character in UTF-8."""
    good = '{"a": "你好"}\n'.encode()
    rows = rows_of(write(good * 3 + '{"a": "世界和平"}\n'.encode("gbk") + good))
    assert [str(row) for row in rows if isinstance(row, InvalidRow)] == [
        "the line is not UTF-8, it looks like GBK (6 bytes)"
    ]
    assert rows.count({"a": "你好"}) == 4


def test_bytes_of_no_encoding(write):
    with pytest.raises(DataError, match=r"data\.jsonl:2: the text is not UTF-8; .* correct this line"):
        rows_of(write(b'{"a": 1}\n{"a": "\xff\xff"}\n'))


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [json.dumps(ROWS, ensure_ascii=False), "\r\n".join(map(json.dumps, ROWS))])
def test_utf16_with_a_byte_order_mark(write, mark, text):
    assert rows_of(write(("\ufeff" + text).encode(mark))) == ROWS


def test_utf16_that_is_damaged(write):
    with pytest.raises(DataError, match=r"data\.jsonl: the UTF-16 text is damaged; save it again as UTF-8"):
        rows_of(write('[{"a": "你好"}]'.encode("utf-16")[:-1]))


@pytest.mark.parametrize(
    ("encoding", "name"), [("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")]
)
def test_other_encodings_of_two_or_four_bytes(write, encoding, name):
    with pytest.raises(DataError, match=f"{name}; convert it: iconv -f {name} -t UTF-8"):
        rows_of(write('[{"a": "你好"}]'.encode(encoding)))


def test_missing_file_folder_and_forbidden_file(tmp_path, write):
    with pytest.raises(DataError, match="no such file"):
        rows_of(tmp_path / "none.json")
    write("[]", "some.json")
    with pytest.raises(DataError, match=r"a folder; name one file in it; it has some\.json"):
        rows_of(tmp_path)


def test_a_file_that_may_not_be_read(write, monkeypatch):
    path = write("[]")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        rows_of(path)


@pytest.mark.parametrize("window", [7, 1 << 20])
def test_a_row_of_an_array_with_a_bad_byte_is_one_bad_row(tmp_path, monkeypatch, window):
    monkeypatch.setattr(json_rows, "_CHUNK", window)
    path = tmp_path / "a.json"
    path.write_bytes('[{"a": "好"}, {"a": "你\udce5\udca5"},\n{"a": "好"}]'.encode(errors="surrogateescape"))
    first, (place, second), third = read_rows(path)
    assert first[1] == third[1] == {"a": "好"}
    assert place == f"{path}[1]"
    assert (second.reason, str(second)) == ("not UTF-8", "2 bytes of the line are not UTF-8")


def test_a_row_of_a_parquet_file_with_a_bad_byte_is_one_bad_row(tmp_path):
    offsets, data = pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xffc")
    column = pyarrow.StringArray.from_buffers(3, offsets, data)
    parquet.write_table(pyarrow.table({"a": column}), tmp_path / "a.parquet")
    first, second, third = rows_of(tmp_path / "a.parquet")
    assert (first, third) == ({"a": "a"}, {"a": "c"})
    assert (second.reason, str(second)) == ("not UTF-8", "a text of the row is not UTF-8")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": 1}\n{"a": [1, 2, ], "b": 1}\n', "2: broken JSON at column 14: there is a comma before ]"),
        ('{"a": 1}\n{"a": ",}", }\n', "2: broken JSON at column 13: there is a comma before }"),
    ],
)
def test_a_comma_too_many_in_a_line(write, text, place):
    path = write(text)
    first, second = rows_of(path)
    assert first == {"a": 1}
    assert f"{path}:2: {second}".startswith(f"{path}:{place}")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"a": 1},\n{"a": 2},\n]', "3: broken JSON at column 1: there is a comma before ]; take it out"),
        ('[{"a": 1},\n{"a": 2,}]', "2: broken JSON at column 9: there is a comma before }; take it out"),
        ('{"data": [\n{"a": 1},\n{"a": 2},\n]}', "4: broken JSON at column 1: there is a comma before ]; take"),
        ('{\n"data": [{"a": 1}],\n}', "3: broken JSON at column 1: there is a comma before }; take it out"),
    ],
)
def test_a_comma_too_many_in_a_document(write, text, place):
    path = write(text, "data.json")
    with pytest.raises(DataError) as error:
        rows_of(path)
    assert str(error.value).startswith(f"{path}:{place}")


def test_a_line_with_a_bad_byte_is_one_bad_row(tmp_path):
    """Of a set with a million rows, one byte must not be the end."""
    path = tmp_path / "a.jsonl"
    lines = ['{"a": "你\udce5\udca5"}', '{"a": "好"}', '{"a": "caf\udce9"}', '{"a": "1"}']
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    (_, first), second, (_, third), fourth = read_rows(path)
    assert (second, fourth) == ((f"{path}:2", {"a": "好"}), (f"{path}:4", {"a": "1"}))
    assert (first.reason, str(first)) == ("not UTF-8", "2 bytes of the line are not UTF-8")
    assert (third.reason, str(third)) == ("not UTF-8", "1 bytes of the line are not UTF-8")
