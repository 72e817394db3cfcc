"""Columns by their names and by what is in them, as people call them and as they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import strategies
from hypothesis import strategies as st

from mlx_zh.corpus.columns import FORMATS, Guess, better_answers, given_columns, guess_columns
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.survey import read_head, survey

Q, A = "几点开门？", "早上九点开门，欢迎光临。"
TURNS = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]


def rows(*columns: str, values: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """Some rows: questions, answers and other texts in the order of the columns."""
    texts = values or (Q, A, "门店", "x")
    return [dict(zip(columns, [f"{text}{i}" for text in texts], strict=False)) for i in range(3)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("问题", "答案"), {"prompt": "问题", "response": "答案"}),
        (("提问", "回答"), {"prompt": "提问", "response": "回答"}),
        (("问", "答"), {"prompt": "问", "response": "答"}),
        (("用户", "助手"), {"prompt": "用户", "response": "助手"}),
        (("客户问题（必填）", "标准答案*"), {"prompt": "客户问题（必填）", "response": "标准答案*"}),
        (("question", "answer"), {"prompt": "question", "response": "answer"}),
        (("Question", "Answer"), {"prompt": "Question", "response": "Answer"}),
        (("Prompt", "Completion"), {"prompt": "Prompt", "response": "Completion"}),
        (("query", "response"), {}),
        (("Query", "Response"), {"prompt": "Query", "response": "Response"}),
        (("Ｑ", "Ａ"), {"prompt": "Ｑ", "response": "Ａ"}),
        (("指令", "输出"), {"prompt": "指令", "response": "输出"}),
        (("input", "output"), {"prompt": "input", "response": "output"}),
        (("输入", "输出"), {"prompt": "输入", "response": "输出"}),
        (("指令", "输出", "输入"), {"instruction": "指令", "input": "输入", "output": "输出"}),
        (("问题", "答案", "系统提示"), {"prompt": "问题", "response": "答案", "system": "系统提示"}),
        (("问题", "答案", "问题类型"), {"prompt": "问题", "response": "答案"}),
        (("标题", "内容"), {"prompt": "标题", "response": "内容"}),
        (("question", "好的回答", "差的回答"), {"prompt": "question", "chosen": "好的回答", "rejected": "差的回答"}),
        (("问题", "chosen", "rejected"), {"prompt": "问题"}),
    ],
)
def test_names_tell_the_columns(columns: tuple[str, ...], expected: dict[str, str]) -> None:
    guess = guess_columns(rows(*columns))
    assert guess is not None
    assert guess.columns == expected
    assert guess.kind == ("dpo" if "rejected" in {*columns, *expected} else "sft")


@pytest.mark.parametrize(
    ("row", "kind", "format"),
    [
        ({"instruction": Q, "input": "", "output": A}, "sft", "alpaca"),
        ({"messages": TURNS}, "sft", "messages"),
        ({"prompt": Q, "response": A}, "sft", "prompt-response"),
        ({"prompt": Q, "chosen": A, "rejected": "不知道"}, "dpo", "prompt"),
    ],
)
def test_a_known_format_needs_no_mapping(row: dict[str, Any], kind: Any, format: str) -> None:
    assert guess_columns([row]) == Guess(kind, format)


def test_a_dialogue_is_known_by_its_values() -> None:
    guess = guess_columns([{"dialog": TURNS, "id": "1"}])
    assert guess is not None
    assert (guess.format, guess.columns) == ("messages", {"messages": "dialog"})


def test_history_is_used_where_it_is_a_list() -> None:
    guess = guess_columns([{"问题": Q, "答案": A, "历史对话": [["你好", "您好"]]}])
    assert guess is not None
    assert guess.columns == {"instruction": "问题", "output": "答案", "history": "历史对话"}
    written = guess_columns([{"问题": Q, "答案": A, "历史对话": "无"}])
    assert written is not None and written.columns == {"prompt": "问题", "response": "答案"}


def test_of_two_columns_the_one_with_shorter_texts_is_the_question() -> None:
    guess = guess_columns(rows("乙", "甲", values=(A, Q)))
    assert guess is not None
    assert (guess.columns, guess.basis) == ({"prompt": "甲", "response": "乙"}, "content")


def test_numbers_codes_and_categories_are_no_questions() -> None:
    table = [
        {"no": str(i), "k": f"SKU-{i}", "where": "东湖店", "p": f"{Q}{i}", "r": f"{A}{i}", "day": f"2024-05-{i:02d}"}
        for i in range(1, 21)
    ]
    guess = guess_columns(table)
    assert guess is not None
    assert (guess.columns, guess.basis) == ({"prompt": "p", "response": "r"}, "content")


def test_one_name_that_is_known_leaves_one_column_for_the_other() -> None:
    guess = guess_columns(rows("答案", "甲", values=(A, Q)))
    assert guess is not None
    assert guess.columns == {"prompt": "甲", "response": "答案"}


@pytest.mark.parametrize(
    "table",
    [
        [],
        [{}],
        [{"text": A, "label": 3}],
        [{"a": 1, "b": 2}],
        rows("甲", "乙", "丙", values=("一二三四五", "六七八九十", "天地玄黄")),
        [{"问题": None, "答案": None}],
    ],
)
def test_what_cannot_be_told_is_not_guessed(table: list[dict[str, Any]]) -> None:
    guess = guess_columns(table)
    assert guess is None or guess.basis == "names"


def test_the_users_own_mapping_decides() -> None:
    table = rows("问题", "答案", "标题")
    guess = given_columns({"prompt": "标题", "response": "问题"}, table)
    assert guess is not None
    assert (guess.kind, guess.format, guess.basis) == ("sft", "prompt-response", "given")
    assert given_columns({"prompt": "标题"}, table) is None
    assert given_columns({"prompt": "没有", "response": "答案"}, table) is None
    assert given_columns({"frage": "标题", "response": "答案"}, table) is None


def test_the_format_is_named_where_another_one_would_be_recognised() -> None:
    table = [{"messages": "自由文字", "问题": Q, "答案": A}]
    guess = guess_columns(table)
    assert guess is not None
    assert (guess.format, guess.explicit) == ("prompt-response", True)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": Q, "chosen": A, "rejected": "不"}, {"response": "chosen"}),
        ({"question": Q, "chosen": A, "rejected": "不"}, {"prompt": "question", "response": "chosen"}),
        ({"instruction": Q, "chosen": A, "rejected": "不"}, {"output": "chosen"}),
        ({"问": Q, "好的回答": A, "差的回答": "不"}, {"prompt": "问", "response": "好的回答"}),
        ({"messages": TURNS, "rejected_response": "不"}, {"messages": "messages"}),
        ({"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "不"}]}, {"messages": "chosen"}),
    ],
)
def test_the_better_answers_of_pairs_can_be_learned_too(row: dict[str, Any], columns: dict[str, str]) -> None:
    guess = guess_columns([row])
    assert guess is not None and guess.kind == "dpo"
    better = better_answers(guess, [row])
    assert better is not None
    assert better.columns == columns


# Whatever is guessed can be read.

NAMES = """问题 答案 提问 回答 问 答 指令 输入 输出 系统 history 历史 标题 内容 question answer query response input
output chosen rejected 好的回答 差的回答 messages 对话 text id 类型 a q"""
names = st.sampled_from(NAMES.split())
cells = st.sampled_from([Q, A, "短", "", "1", "x" * 50]) | strategies.texts
anything = cells | st.just(TURNS) | st.just([[Q, A]]) | strategies.values
tables = st.lists(st.dictionaries(names | strategies.texts, anything, max_size=5), max_size=5)
even = st.lists(names | strategies.texts, min_size=1, max_size=5, unique=True).flatmap(
    lambda columns: st.lists(st.fixed_dictionaries(dict.fromkeys(columns, cells)), min_size=1, max_size=5)
)


@hypothesis.given(even | tables)
def test_a_guess_maps_names_of_its_format_to_columns_of_the_file(table: list[dict[str, Any]]) -> None:
    guess = guess_columns(table)
    if guess is None:
        return
    form = FORMATS[guess.kind][guess.format]
    assert guess.columns.keys() <= set(form.columns)
    assert set(guess.columns.values()) <= {name for row in table for name in row}
    assert len(set(guess.columns.values())) == len(guess.columns)


@hypothesis.given(even)
def test_what_a_survey_counts_is_what_the_reader_gives(
    told: Any, tmp_path_factory: pytest.TempPathFactory, table: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text("\n".join(map(strategies.as_json, table)))
    head = read_head(path)
    guess = guess_columns(head.rows)
    if guess is None:
        return
    result = survey(path, head, guess)
    assert result.rows == len(table) and 0 <= result.repeated < max(result.usable, 1)
    if result.usable:
        load: Any = load_conversations if guess.kind == "sft" else load_preferences
        format = guess.format if guess.explicit else "auto"
        items, report = load(path, columns=guess.columns, format=format, on_invalid="skip")
        assert (report.rows, report.kept, len(items)) == (result.rows, result.usable, result.usable)
        assert report.dropped == dict(result.reasons)
        assert all(sample in items for sample in result.samples)


def test_a_survey_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [
        "问题,答案",
        *[f"第{i}问,第{i}答" for i in range(50)],
        "第0问,第0答",
        ",没有问题",
        "没有答案,",
        "太,多,了",
    ]
    path.write_text("\n".join(lines), encoding="gb18030")
    head = read_head(path)
    guess = guess_columns(head.rows)
    assert guess is not None
    result = survey(path, head, guess)
    assert (result.rows, result.usable, result.repeated) == (54, 51, 1)
    assert [(row.place, row.reason) for row in result.unusable] == [
        (f"{path}:53", "empty user message"),
        (f"{path}:54", "empty reply"),
        (f"{path}:55", "wrong number of fields"),
    ]
    assert len(result.samples) == 3
    assert head.examples() == {"问题": "第0问", "答案": "第0答"}
    assert not head.without_names()


def test_a_table_without_names_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("几点开门？,九点。\n几点关门？,五点。\n")
    assert read_head(path).without_names()
