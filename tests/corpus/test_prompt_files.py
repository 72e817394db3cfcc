"""Prompts from files of every form, with the known answer where the row has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_zh.corpus.prompts import read_prompts
from mlx_zh.corpus.samples import Sampled, SampledAnswer, prompt_id, read_samples
from mlx_zh.errors import DataError
from mlx_zh.system.storage import append_json


def asked(path: Path) -> list[tuple[list[tuple[str, str]], str | None]]:
    return [([(m.role, m.content) for m in p.messages], p.reference) for p in read_prompts(path)]


USER, SYSTEM = {"role": "user", "content": "问"}, {"role": "system", "content": "系统"}
REPLY = {"role": "assistant", "content": "答"}
ONE = [([("user", "问")], "答")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "问"}, [([("user", "问")], None)]),
        ({"prompt": "问", "answer": "答"}, ONE),
        ({"question": "1+1", "answer": 2}, [([("user", "1+1")], "2")]),
        ({"prompt": "问", "reference": ""}, [([("user", "问")], None)]),
        ({"prompt": [SYSTEM, USER]}, [([("system", "系统"), ("user", "问")], None)]),
        ({"prompt": "问", "system": "系统", "solution": "答"}, [([("system", "系统"), ("user", "问")], "答")]),
        ({"messages": [USER]}, [([("user", "问")], None)]),
        ({"messages": [USER], "answer": "答"}, ONE),
        ({"messages": [USER, REPLY]}, ONE),
        ({"messages": [USER, REPLY, USER]}, [([("user", "问"), ("assistant", "答"), ("user", "问")], None)]),
        ({"conversations": [{"from": "human", "value": "问"}]}, [([("user", "问")], None)]),
        ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}, ONE),
        ({"instruction": "加", "input": "1 2"}, [([("user", "加\n1 2")], None)]),
        ({"instruction": "问", "output": ""}, [([("user", "问")], None)]),
        ({"instruction": "问", "output": "答"}, ONE),
        ({"query": "问", "response": "答", "history": [["一", "二"]]}, None),
        ({"prompt": "问", "chosen": "答", "rejected": "错"}, ONE),
        ({"messages": [USER], "chosen": REPLY, "rejected": {"role": "assistant", "content": "错"}}, ONE),
        ({"prompt": "问", "completion": "答", "label": True}, ONE),
    ],
)
def test_a_row_of_any_form_is_a_prompt(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    history = [([("user", "一"), ("assistant", "二"), ("user", "问")], "答")]
    assert asked(path) == (history if expected is None else expected)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "第一问\n\n 第二问\n", [([("user", "第一问")], None), ([("user", "第二问")], None)]),
        ("a.txt", '{"prompt": "问", "answer": "答"}\n', ONE),
        ("a.csv", "问题,答案\n问,答\n", ONE),
        ("a.csv", "题目\n问\n", [([("user", "问")], None)]),
        ("a.json", '[{"prompt": "问", "answer": "答"}]', ONE),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, text: str, expected: Any) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert asked(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "  "}, "is empty"),
        ({"prompt": 3}, "must be text, got a number"),
        ({"messages": [REPLY]}, "must be of user"),
        ({"width": 3, "height": 4}, "no known format"),
    ],
)
def test_a_row_that_asks_nothing_is_named(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=problem):
        asked(path)


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": [SYSTEM, USER], "answer": "答"}) + "\n", encoding="utf-8")
    [prompt] = read_prompts(path)
    key = prompt_id(prompt.messages)
    sampled = Sampled(key, prompt.messages, "答", (SampledAnswer("一\n二\u2028", "stop", 4, 2**48 - 1),))
    file = tmp_path / "answers.jsonl"
    append_json(file, sampled.as_dict())
    append_json(file, sampled.as_dict())  # a prompt counts once
    assert asked(file)[0] == ([("system", "系统"), ("user", "问")], "答")
    with file.open("a", encoding="utf-8") as torn:
        torn.write('{"kind": "samples", "version": 1, "id": "00')
    assert read_samples(file) == [sampled]
    assert len(key) == 16
