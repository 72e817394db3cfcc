"""A JSON document that is one object gives its rows, and JSON lines stay JSON lines."""

from __future__ import annotations

import json
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

from mlx_zh.corpus import json_rows
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.reader import InvalidRow, read_rows
from mlx_zh.errors import DataError

ROWS = [{"instruction": "问一", "output": "答一"}, {"instruction": "问二", "output": None}]
COLUMNS = {"instruction": ["问一", "问二"], "output": ["答一", None]}
FORMS = {
    **{key: {key: ROWS} for key in ("data", "train", "rows", "examples")},
    "others": {"version": "1.0", "n": 2, "data": ROWS, "info": {"a": [1]}},
    "splits": {"test": [{"instruction": "x"}], "train": ROWS, "validation": [{"instruction": "y"}]},
    "table": {"schema": {"fields": [{"name": "instruction"}]}, "data": ROWS},
    "lists": COLUMNS,
    "columns": {name: {"0": values[0], "1": values[1]} for name, values in COLUMNS.items()},
    "index": {"0": ROWS[0], "1": ROWS[1]},
    "split": {"columns": list(COLUMNS), "index": [0, 1], "data": [list(row.values()) for row in ROWS]},
}


def rows_of(path):
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_forms(write, monkeypatch, form, indent, window):
    monkeypatch.setattr(json_rows, "_CHUNK", window)
    path = write("\n " + json.dumps(FORMS[form], ensure_ascii=False, indent=indent) + "\n\n", "data.json")
    assert list(read_rows(path)) == [(f"{path}[0]", ROWS[0]), (f"{path}[1]", ROWS[1])]


MESSAGES = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
OTHER = [MESSAGES[0], {"role": "assistant", "content": "差"}]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "1", "data": ["问", "答"]},
        {"messages": MESSAGES},
        {"messages": MESSAGES, "examples": MESSAGES},
        {"conversation": [{"human": "问", "assistant": "答"}]},
        {"meta_instruction": "", "chat": {"turn_1": {"Human": "问", "MOSS": "答"}}},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"instruction": "问", "output": "答", "history": []},
    ],
)
def test_one_row_stays_a_row(write, row):
    path = write(json.dumps(row))
    assert list(read_rows(path)) == [(f"{path}:1", row)]
    ((talk,), _) = load_conversations(path)
    assert [message.content for message in talk.messages] == ["问", "答"]


def test_one_pair_stays_a_pair(write):
    ((pair,), _) = load_preferences(write(json.dumps({"chosen": MESSAGES, "rejected": OTHER})))
    assert (pair.chosen, pair.rejected) == ("答", "差")


@pytest.mark.parametrize("form", FORMS)
def test_several_lines_are_rows_whatever_their_keys(write, form):
    line = json.dumps(FORMS[form])
    assert rows_of(write(f"{line}\n{line}\n")) == [FORMS[form]] * 2


def test_a_first_line_that_is_cut_off_is_one_bad_row(write):
    path = write('{"instruction": "问\n{"instruction": "问一", "output": "答一"}\n')
    first, second = rows_of(path)
    assert isinstance(first, InvalidRow)
    assert second == ROWS[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": 1\n}\n', ":1: an object over several lines"),
        ("{\n}\n", ":1: an object over several lines"),
        ('{\n"test": [{"a": 1}]}', ":1: an object over several lines"),
        ('{"a": [\n1], "b": [1, 2]}', ":1: an object over several lines"),
        ('{"data": [\n{"a": 1}]}\nx', ":3: broken JSON at column 1: text after the end of the object"),
        ('{"data": [\n{"a": }]}', ":2: broken JSON at column 7: Expecting value"),
        ('{"data": [\n{"a": 1}', ":2: broken JSON at column 9: expected , or ], the file ends"),
        ('{"data": [\n{"a": 1}], 5: 1}', ":2: broken JSON at column 12: expected a key in quotes"),
    ],
)
def test_what_is_no_table(write, text, message):
    path = write(text, "data.json")
    with pytest.raises(DataError) as error:
        rows_of(path)
    assert str(error.value).startswith(f"{path}{message}")


def test_a_long_list_is_never_wholly_in_memory(write):
    row = {"instruction": "问" * 500, "output": "答" * 500}
    path = write('{"version": 1,\n"data": [' + ",\n".join([json.dumps(row)] * 4000) + "]}", "data.json")
    assert path.stat().st_size > 24_000_000
    tracemalloc.start()
    assert sum(row["output"] == "答" * 500 for _, row in read_rows(path)) == 4000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10_000_000


columns = st.integers(1, 4).flatmap(
    lambda rows: st.dictionaries(
        st.text(min_size=1).filter(lambda name: name not in ("data", "columns", "index") and not name.isdecimal()),
        st.lists(st.text() | st.integers() | st.none(), min_size=rows, max_size=rows),
        min_size=2,
        max_size=4,
    )
)


@hypothesis.given(table=columns, indent=st.none() | st.integers(0, 3))
def test_any_table_is_the_same_in_every_form(tmp_path_factory, table, indent):
    count = len(next(iter(table.values())))
    rows = [{name: values[i] for name, values in table.items()} for i in range(count)]
    documents = [
        table,
        {name: {str(i): value for i, value in enumerate(values)} for name, values in table.items()},
        {str(i): row for i, row in enumerate(rows)},
        {"columns": list(table), "data": [list(row.values()) for row in rows]},
        {"data": rows},
        rows,
    ]
    path = tmp_path_factory.getbasetemp() / "table.json"
    for document in documents:
        path.write_text(json.dumps(document, indent=indent), encoding="utf-8")
        assert rows_of(path) == rows
