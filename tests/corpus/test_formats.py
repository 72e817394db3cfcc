"""Each published form becomes the same conversations; each bad row is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlx_zh.corpus.conversation import Conversation, Message, with_system
from mlx_zh.corpus.formats import iter_conversations, load_conversations
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.errors import DataError
from mlx_zh.recipe import Source

Q, A = Message("user", "你好"), Message("assistant", "你好！")


def lines(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("alpaca", {"instruction": "你好", "input": "", "output": "你好！"}, (Q, A)),
        ("alpaca", {"instruction": "你好", "input": None, "output": "你好！", "history": None}, (Q, A)),
        ("alpaca", {"instruction": "", "input": "你好", "output": "你好！"}, (Q, A)),
        (
            "alpaca",
            {"instruction": "翻译", "input": "cat", "output": " 猫 \n", "prompt": "ignored", "system": "s"},
            (Message("system", "s"), Message("user", "翻译\ncat"), Message("assistant", " 猫 \n")),
        ),
        (
            "alpaca",
            {"instruction": "再见", "output": "bye", "history": [["你好", "你好！"]], "system": " "},
            (Q, A, Message("user", "再见"), Message("assistant", "bye")),
        ),
        ("query-response", {"query": "你好", "response": "你好！", "history": []}, (Q, A)),
        (
            "query-response",
            {"query": "再见", "response": "bye", "history": [["你好", "你好！"]], "system": "s"},
            (Message("system", "s"), Q, A, Message("user", "再见"), Message("assistant", "bye")),
        ),
        ("rounds", {"conversation": [{"human": "你好", "assistant": "你好！"}]}, (Q, A)),
        (
            "rounds",
            {
                "conversation": [
                    {"system": "s", "input": "你好", "output": "你好！"},
                    {"input": "再见", "output": "bye"},
                ]
            },
            (Message("system", "s"), Q, A, Message("user", "再见"), Message("assistant", "bye")),
        ),
        ("alternating", {"id": "1", "data": ["你好", "你好！"]}, (Q, A)),
        (
            "moss",
            {
                "meta_instruction": "",
                "num_turns": 1,
                "chat": {
                    "turn_1": {
                        "Human": "<|Human|>: 你好<eoh>\n",
                        "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                        "Commands": "<|Commands|>: None<eoc>\n",
                        "MOSS": "<|MOSS|>: 你好！<eom>\n",
                    }
                },
            },
            (Q, A),
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]},
            (Q, A),
        ),
        (
            "sharegpt",
            {
                "system": "s",
                "conversations": [{"from": "User", "value": "你好"}, {"role": "assistant", "content": "你好！"}],
            },
            (Message("system", "s"), Q, A),
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
                    {"role": "assistant", "content": "你好！", "name": "x"},
                ]
            },
            (Message("system", "s"), Q, A),
        ),
        (  # LLaMA-Factory's v1
            "messages",
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "value": "s"}]},
                    {"role": "user", "content": [{"type": "text", "value": "你"}, {"type": "text", "value": "好"}]},
                    {"role": "assistant", "content": [{"type": "text", "value": "你好！"}]},
                ]
            },
            (Message("system", "s"), Q, A),
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": ["你", "好"]},
                    {"role": "assistant", "content": [{"type": "text", "content": "你"}, {"text": "好！"}]},
                ]
            },
            (Q, A),
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": "你好"},
                    {"role": "assistant", "content": "你好！"},
                ]
            },
            (Q, A),
        ),
        (
            "belle-seed",
            {"instruction": "你好", "instances": [{"input": "", "output": "你好！"}], "name": "x"},
            (Q, A),
        ),
        ("prompt-response", {"prompt": "你好", "response": "你好！"}, (Q, A)),
        (
            "prompt-response",
            {"prompt": "你好", "completion": "你好！", "system": "s"},
            (Message("system", "s"), Q, A),
        ),
        (  # TRL
            "prompt-response",
            {
                "prompt": [{"role": "user", "content": "你好"}],
                "completion": [{"role": "assistant", "content": "你好！"}],
            },
            (Q, A),
        ),
        ("prompt-response", {"prompt": "你好", "completion": {"role": "assistant", "content": "你好！"}}, (Q, A)),
        ("kto", {"prompt": "你好", "completion": "你好！", "label": True}, (Q, A)),
        (
            "kto",
            {"prompt": "你好", "completion": "你好！", "label": "1", "system": "s"},
            (Message("system", "s"), Q, A),
        ),
        (
            "kto",
            {
                "prompt": [{"role": "user", "content": "你好"}],
                "completion": [{"role": "assistant", "content": "你好！"}],
                "label": 1,
            },
            (Q, A),
        ),
        (
            "rounds",
            {"conversation": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]},
            (Q, A),
        ),
        ("sharegpt", {"conversations": [{"human": "你好", "assistant": "你好！"}]}, (Q, A)),
        (  # a table has a column for each turn of the longest conversation
            "moss",
            {
                "chat": {
                    "turn_10": None,
                    "turn_1": {"Human": "<|Human|>: 你好<eoh>\n", "MOSS": "<|MOSS|>: 你好！<eom>"},
                }
            },
            (Q, A),
        ),
    ],
)
def test_forms(write, format, row, expected):
    path = write(lines(row))
    for asked in ("auto", format):
        conversations, report = load_conversations(path, format=asked)
        assert conversations == [Conversation(expected, f"{path}:1")]
        assert replace(report, unused=[]) == LoadReport(rows=1, kept=1, format=format)


def test_the_replies_in_a_prompt_are_context_only(write):
    turns = [Q, Message("assistant", "在"), Message("user", "再见"), Message("assistant", "再见！")]
    row = {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in turns[:3]],
        "completion": [{"role": "assistant", "content": "再见！"}],
    }
    [talk], _ = load_conversations(write(lines(row)))
    assert [(message.content, message.trained) for message in talk.messages if message.role == "assistant"] == [
        ("在", False),
        ("再见！", True),
    ]


@pytest.mark.parametrize("label", [False, 0, "False", "0"])
def test_an_answer_that_kto_marks_as_bad_is_not_learned(write, label):
    rows = [{"prompt": "a", "completion": "b", "label": not label if label in (False, 0) else "1"}]
    path = write(lines(*rows, {"prompt": "a", "completion": "bad", "label": label}))
    with pytest.raises(DataError, match=r"data\.jsonl:2: 'label' is .*, so this answer is not to be learned"):
        load_conversations(path)
    talks, report = load_conversations(path, on_invalid="skip")
    assert [talk.messages[-1].content for talk in talks] == ["b"]
    assert (report.format, report.dropped) == ("kto", {"answer not to imitate": 1})


def test_a_label_that_is_a_class_says_nothing_of_the_answer(write):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (2, 0, 7)]
    talks, report = load_conversations(write(lines(*rows)))
    assert (len(talks), report.format) == (3, "prompt-response")


def test_turns_are_in_the_order_of_their_numbers(write):
    chat = {f"turn_{n}": {"Human": f"问{n}", "MOSS": f"答{n}"} for n in (1, 10, 2, 3, 4, 5, 6, 7, 8, 9)}
    [talk], _ = load_conversations(write(lines({"chat": chat})))
    assert [message.content for message in talk.messages[::2]] == [f"问{n}" for n in range(1, 11)]


@pytest.mark.parametrize("ours", ["history", "input", "system"])
def test_a_renamed_optional_column_may_be_missing_in_a_row(write, ours):
    value = {"history": [["在吗", "在"]], "input": "补充", "system": "s"}[ours]
    rows = [{"instruction": "问", "output": "答"}, {"instruction": "问", "output": "答", "past": value}]
    first, second = load_conversations(write(lines(*rows)), columns={ours: "past"})[0]
    assert [message.content for message in first.messages] == ["问", "答"]
    assert first.messages != second.messages


def test_not_a_number_is_named(write):
    path = write('{"instruction": "a", "output": "b", "score": NaN}\n{"instruction": "a", "output": NaN}\n')
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: 'output' must be text, got a number that is NaN, which JSON"
    ):
        load_conversations(path)
    assert len(load_conversations(path, on_invalid="skip")[0]) == 1


def test_a_seed_task_with_several_instances(write):
    path = write(
        json.dumps(
            [{"instruction": "写诗", "instances": [{"input": "春", "output": "a"}, {"input": "夏", "output": "b"}]}]
        )
    )
    conversations, report = load_conversations(path)
    assert [c.messages[0].content for c in conversations] == ["写诗\n春", "写诗\n夏"]
    assert {c.source for c in conversations} == {f"{path}[0]"}
    assert (report.rows, report.kept) == (1, 1)


def test_columns_are_renamed(write):
    row = {"question": "你好", "answer_zh": "你好！", "prompt": "ignored", "instruction": "ignored too"}
    path = write(lines(row))
    conversations, _ = load_conversations(path, columns={"instruction": "question", "output": "answer_zh"})
    assert conversations[0].messages == (Q, A)


def test_columns_that_are_not_there(write):
    path = write(lines({"question": "a"}))
    with pytest.raises(DataError, match=r"data\.jsonl:1: no column 'answer' \(columns: question\)"):
        load_conversations(path, columns={"instruction": "question", "output": "answer"}, format="alpaca")
    with pytest.raises(DataError, match=r"no format has a column 'instructoin' \(did you mean 'instruction'\?\)"):
        load_conversations(path, columns={"instructoin": "question"})


def turns(*pairs):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"instruction": "a"}, "missing field", r"'output' is missing \(columns: instruction\)"),
        ({"instruction": "a", "output": None}, "missing field", "'output' is null"),
        ({"instruction": "a", "output": 7}, "wrong type", "'output' must be text, got a number"),
        ({"instruction": ["a"], "output": "b"}, "wrong type", "'instruction' must be text, got a list"),
        ({"instruction": "a", "output": " \n"}, "empty reply", r"message 2 \(assistant\) is empty"),
        ({"instruction": "", "input": "", "output": "b"}, "empty user message", r"message 1 \(user\) is empty"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "wrong type", r"'history'\[0\] must be a pair"),
        (
            {"instruction": "a", "output": "b", "history": "c"},
            "wrong type",
            "'history' must be a list of pairs, got a text",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c", ""]]},
            "empty reply",
            r"message 2 \(assistant\) is empty",
        ),
        ({"instruction": "a", "output": "\ud83d"}, "broken Unicode", "'output' holds half of a surrogate pair"),
        (turns(("human", "a"), ("human", "b")), "roles out of order", "message 2 must be of assistant, got user"),
        (turns(("gpt", "a"), ("human", "b")), "roles out of order", "message 1 must be of user, got assistant"),
        (
            turns(("human", "a"), ("system", "b"), ("gpt", "c")),
            "roles out of order",
            "message 2 must be of assistant, got system",
        ),
        (
            turns(("human", "a"), ("gpt", "b"), ("human", "c")),
            "does not end with assistant",
            "must be of assistant, got user",
        ),
        (turns(("system", "a")), "does not end with assistant", "must be of assistant, got no turn"),
        (
            turns(("human", "a"), ("function_call", "b")),
            "tool message",
            r"'conversations'\[1\]: 'value' must be JSON",
        ),
        (turns(("human", "a"), ("narrator", "b")), "unknown role", "unknown role 'narrator'"),
        ({"conversations": [{"from": "human"}]}, "missing field", "'value' is missing or null"),
        ({"conversations": []}, "wrong type", "'conversations' must be a list of messages, got an empty list"),
        ({"conversations": "x"}, "wrong type", "'conversations' must be a list of messages, got a text"),
        ({"conversations": ["x"]}, "wrong type", r"'conversations'\[0\] must be an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "wrong type",
            "'content' must be text, got a list",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "value": "a"}, {"type": "reasoning"}]}]},
            "wrong type",
            "'content' must be text, got a list with a part of type 'reasoning'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "value": "b"}]}]},
            "wrong type",
            "'content' must be text, got a list with a part that has 2 texts",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong type", "a part that has 0 texts"),
        ({"messages": [{"role": "user", "content": ["a", 1]}]}, "wrong type", "'content' must be text, got a list"),
        ({"messages": [{"content": "x"}]}, "unknown role", "unknown role None"),
        ({"instruction": "a", "instances": []}, "wrong type", "'instances' must be a list of objects"),
    ],
)
def test_bad_rows(write, row, reason, message):
    goods = {
        "conversations": turns(("human", "a"), ("gpt", "b")),
        "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "instances": {"instruction": "a", "instances": [{"output": "b"}]},
        "instruction": {"instruction": "a", "output": "b"},
    }
    good = next(value for key, value in goods.items() if key in row)
    path = write("".join(json.dumps(r) + "\n" for r in (good, row, good)))
    with pytest.raises(DataError, match=message) as caught:
        load_conversations(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: 1 of 3 rows cannot be used") and f"\n  {path}:2: " in text
    assert "data.on_invalid=skip" in text
    conversations, report = load_conversations(path, on_invalid="skip")
    assert [c.source for c in conversations] == [f"{path}:1", f"{path}:3"]
    assert report.dropped == {reason: 1} and report.examples == {reason: [f"{path}:2"]}
    assert (report.rows, report.kept) == (3, 2)


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("rounds", {"conversation": [1]}, "'conversation' must be a list of objects with human and assistant"),
        ("rounds", {"conversation": [{"human": "a"}]}, "'assistant' is missing"),
        ("alternating", {"data": ["a"]}, "the last message must be of assistant, got user"),
        ("alternating", {"data": ["a", 1]}, "'data' must be a list of texts, question and answer in turn"),
        ("moss", {"meta_instruction": "", "chat": []}, "'chat' must be an object of turns with Human and MOSS"),
        (
            "moss",
            {"meta_instruction": "", "chat": {"turn_1": {"Human": "a", "MOSS": "b", "Commands": "Search(1)<eoc>"}}},
            "'Commands' calls a tool, 'Search.1.'",
        ),
    ],
)
def test_bad_rows_of_other_projects_forms(write, format, row, message):
    with pytest.raises(DataError, match=message):
        load_conversations(write(lines(row), "data.jsonl"), format=format)


def test_all_errors_of_a_file_are_counted_and_ten_are_shown(write):
    rows = [{"instruction": "a", "output": "b"}] + [{"instruction": "a"}] * 12 + ["text", None]
    path = write(json.dumps(rows), "data.json")
    with pytest.raises(DataError) as caught:
        load_conversations(path)
    shown = str(caught.value).splitlines()
    assert "14 of 15 rows" in shown[0]
    assert [line.split(": ")[0].strip() for line in shown[1:-1]] == [f"{path}[{i}]" for i in range(1, 11)]
    assert shown[-1].strip() == "… and 4 more"
    _, report = load_conversations(path, on_invalid="skip")
    assert report.dropped == {"missing field": 12, "wrong type": 2}
    assert report.examples["missing field"] == [f"{path}[{i}]" for i in (1, 2, 3)]


def test_skipping_everything_is_an_error(write):
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used \(no row is left\)"):
        load_conversations(write(lines({"instruction": "a"}, {"instruction": "b"})), on_invalid="skip")


def test_broken_lines_are_skipped_on_request_only(write):
    path = write(lines({"instruction": "a", "output": "b"}) + '{"instruction": "a", "outp\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: broken JSON at column 22: Unterminated string"):
        load_conversations(path)
    conversations, report = load_conversations(path, on_invalid="skip")
    assert len(conversations) == 1 and report.dropped == {"broken JSON": 1}


def test_unknown_columns_are_named(write):
    path = write(lines({"author": "x", "title": "y"}))
    with pytest.raises(DataError, match=r"no known format has the columns author, title\. .*alpaca: instruction"):
        load_conversations(path)


def test_the_advice_on_unknown_columns_is_an_entry_of_a_recipe_that_works(write):
    path = write(lines({"问题": "几点了？", "答案: 全文": "三点"}))
    with pytest.raises(DataError) as refused:
        load_conversations(path)
    entry = yaml.safe_load(str(refused.value).partition("the name in this program first: ")[2])
    source = Source(**entry)
    conversations, _ = load_conversations(Path(source.path), columns=source.columns)
    assert [message.content for message in conversations[0].messages] == ["几点了？", "三点"]


def test_rows_that_are_no_objects(write):
    with pytest.raises(DataError, match=r"data\.json\[0\]: a row must be an object .* a text"):
        load_conversations(write('["a", "b"]', "data.json"))


def test_unknown_format_and_option(write):
    path = write(lines({"instruction": "a", "output": "b"}))
    with pytest.raises(DataError, match=r"unknown data format 'alpacca' \(did you mean 'alpaca'\?\)"):
        load_conversations(path, format="alpacca")
    with pytest.raises(ValueError, match="error or skip"):
        load_conversations(path, on_invalid="ignore")


def test_the_generator_gives_rows_before_the_last_is_read(write):
    report = LoadReport()
    rows = iter_conversations(write(lines({"instruction": "a", "output": "b"}) + "{broken\n"), report=report)
    assert next(rows).messages[1].content == "b"
    assert report.rows == 1
    with pytest.raises(DataError, match="1 of 2 rows"):
        next(rows)


def test_with_system():
    conversation = Conversation((Q, A), "x")
    assert with_system(conversation, "s").messages == (Message("system", "s"), Q, A)
    assert with_system(with_system(conversation, "s"), "t").messages[0].content == "s"
    assert with_system(conversation, None) is conversation


def read_independently(path):
    text = path.read_text(encoding="utf-8-sig")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "format", "rows"),
    [
        ("alpaca_zh_demo.json", "alpaca", 1000),
        ("identity.json", "alpaca", 91),
        ("oaast_sft_zh.json", "alpaca", 689),
        ("ruozhiba_qa2449_gpt4o.json", "alpaca", 2449),
        ("belle_zh_seed_tasks.json", "belle-seed", 175),
    ],
)
def test_real_files(samples, name, format, rows):
    path = samples / "sft" / name
    conversations, report = load_conversations(path)
    raw = read_independently(path)
    assert replace(report, unused=[]) == LoadReport(rows=rows, kept=rows, format=format)
    if format == "belle-seed":
        raw = [{**row, **instance} for row in raw for instance in row["instances"]]
    assert len(conversations) == len(raw)
    for row, conversation in zip(raw, conversations, strict=True):
        assert conversation.messages[-1] == Message("assistant", row["output"])
        assert len(conversation.messages) == 2 * len(row.get("history") or []) + 2
        question = conversation.messages[-2].content
        assert question.startswith(row["instruction"]) and question.endswith(row["input"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("modern_poetry_pd_sample.jsonl", "columns author, died, title, date, text, path"),
    ],
)
def test_real_files_of_no_chat_form(samples, name, message):
    with pytest.raises(DataError, match=message):
        load_conversations(samples / "sft" / name)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stands_before_its_reply(tmp_path, key):
    """In a message it is that reply's, in a row that of the last reply."""
    path = tmp_path / "d.jsonl"
    question, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    path.write_text(lines({"messages": [question, {**reply, key: "想"}]}, {"messages": [question, reply], key: "思"}))
    rows, report = load_conversations(path)
    assert [row.messages[-1] for row in rows] == [Message("assistant", "b", reasoning=text) for text in "想思"]
    assert report.unused == []
    path.write_text(lines({"instruction": "c", "output": "d", key: "思"}))
    assert load_conversations(path)[0][0].messages[-1] == Message("assistant", "d", reasoning="思")
    path.write_text(lines({"messages": [{**question, key: "想"}, reply]}))
    with pytest.raises(DataError, match="only a reply can have reasoning"):
        load_conversations(path)
    path.write_text(lines({"messages": [question, {**reply, key: "想"}], key: "思"}))
    with pytest.raises(DataError, match="not that of its last reply"):
        load_conversations(path)


def said(path) -> list[tuple[str, str]]:
    """Roles and texts of a file's only conversation."""
    [conversation], _ = load_conversations(path)
    return [(message.role, message.content) for message in conversation.messages]


def test_dolly_has_its_text_in_context(write):
    row = {"instruction": "问", "context": "资料", "response": "答", "category": "qa"}
    assert said(write(lines(row))) == [("user", "问\n资料"), ("assistant", "答")]
    assert said(write(lines({"instruction": "问", "input": "资料", "response": "答"}))) == said(write(lines(row)))
    with pytest.raises(DataError, match="an 'input' and a 'context'"):
        load_conversations(write(lines(row | {"input": "别的"})))


def test_belles_dialogues_are_turns(write):
    row = {"instruction": "Human:你好\nAssistant:你好！\n请讲\nHuman:再见\nAssistant:", "input": "", "output": "拜"}
    turns = [("user", "你好"), ("assistant", "你好！\n请讲"), ("user", "再见"), ("assistant", "拜")]
    assert said(write(lines(row))) == turns
    for question in (
        "Human:你好",
        "说说 Human: 和 Assistant:",
        "Human:a\nHuman:b\nAssistant:",
        "Human: a Assistant:",
    ):
        assert said(write(lines({"instruction": question, "output": "b"}))) == [
            ("user", question),
            ("assistant", "b"),
        ]


def test_history_as_messages_as_exchanges_and_as_text(write):
    turns = [("user", "早"), ("assistant", "好"), ("user", "问"), ("assistant", "答")]
    messages = [{"role": "user", "content": "早"}, {"role": "assistant", "content": "好"}]
    for history in (messages, [{"query": "早", "response": "好"}], [["早", "好"]], '[["早", "好"]]'):
        assert said(write(lines({"query": "问", "response": "答", "history": history}))) == turns
    for nothing in (None, [], "", "[]", float("nan")):
        assert said(write(lines({"query": "问", "response": "答", "history": nothing}))) == turns[2:]


def test_roles_of_other_names(write):
    for user, assistant in (("prompter", "AI"), ("用户", "助手"), ("human", "bing")):
        turns = [
            {"from": "developer", "value": "海盗"},
            {"from": user, "value": "问"},
            {"from": assistant, "value": "答"},
        ]
        assert said(write(lines({"conversations": turns}))) == [
            ("system", "海盗"),
            ("user", "问"),
            ("assistant", "答"),
        ]


def test_messages_of_a_tree_are_no_raw_text(write):
    with pytest.raises(DataError, match="no known format has the columns message_id, parent_id, text, role"):
        load_conversations(write(lines({"message_id": "1", "parent_id": None, "text": "hi", "role": "prompter"})))


def test_xlams_calls(write):
    calls = [{"name": "天气", "arguments": {"城市": "北京"}}]
    tools = [{"name": "天气", "description": "查天气", "parameters": {"城市": {"type": "str"}}}]
    row = {"query": "北京天气", "answers": json.dumps(calls), "tools": json.dumps(tools)}
    [conversation], _ = load_conversations(write(lines(row)))
    described, asked, reply = conversation.messages
    assert (described.role, asked, reply.content) == ("tools", Message("user", "北京天气"), "")
    assert json.loads(reply.calls) == calls
    assert json.loads(described.content)[0]["function"]["name"] == "天气"


def test_glaives_dialogues(write):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    system = f"SYSTEM: You are helpful, with access to functions -\n{json.dumps(tool, indent=1)}\n"
    call = """<functioncall> {"name": "f", "arguments": '{"a": "it\'s"}'} <|endoftext|>"""
    chat = (
        f"USER: hi\n\n\nASSISTANT: hello <|endoftext|>\n\n\nUSER: call\n\n\nASSISTANT: {call}\n\n\n"
        'FUNCTION RESPONSE: {"r": 1}\n\n\nASSISTANT: done <|endoftext|>\n'
    )
    [conversation], _ = load_conversations(write(lines({"system": system, "chat": chat})))
    described, head, *turns = conversation.messages
    assert json.loads(described.content) == [{"type": "function", "function": tool}]
    assert head == Message("system", "You are helpful, with access to functions")
    assert [(turn.role, turn.content) for turn in turns] == [
        ("user", "hi"), ("assistant", "hello"), ("user", "call"), ("assistant", ""), ("tool", '{"r": 1}'),
        ("assistant", "done"),
    ]  # fmt: skip
    assert json.loads(turns[3].calls) == [{"name": "f", "arguments": {"a": "it's"}}]
    with pytest.raises(DataError, match="the call in 'chat' is not JSON"):
        load_conversations(write(lines({"system": "", "chat": "USER: a\nASSISTANT: <functioncall> f(1)"})))
    [plain], _ = load_conversations(write(lines({"system": "SYSTEM: hi", "chat": "USER: a\n\nASSISTANT: b"})))
    assert [message.role for message in plain.messages] == ["system", "user", "assistant"]


def test_inner_thoughts_of_moss_are_reasoning(write):
    turn = {
        "Human": "<|Human|>: 问<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: 想<eot>\n",
        "MOSS": "<|MOSS|>: 答<eom>",
    }
    [conversation], _ = load_conversations(write(lines({"chat": {"turn_1": turn}})))
    assert conversation.messages[-1] == Message("assistant", "答", reasoning="想")


def test_an_unknown_format_is_answered_with_the_columns_to_write(write):
    with pytest.raises(DataError, match=r"columns: \{prompt: question, response: 答案\}\}$"):
        load_conversations(write(lines({"question": "问", "答案": "答"})))
    with pytest.raises(DataError, match=r"columns: \{instruction: x, output: y\}\}$"):
        load_conversations(write(lines({"x": 1, "y": 2, "z": 3})))


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_rows_of_json_in_a_txt_file_are_no_document(write, encoding):
    row = json.dumps({"instruction": "你们在哪里工作", "output": "我们在北京工作"}, ensure_ascii=False)
    expected = [("user", "你们在哪里工作"), ("assistant", "我们在北京工作")]
    for text in (row, f"[\n {row}]", f"{row}\n"):
        path = write(text.encode(encoding), "data.txt")
        assert said(path) == expected
        [document], _ = load_conversations(path, format="text")
        assert document.text == text
    for prose in ("[1] 参考文献", "{花括号}", "{\n", "[[1, 2]]"):
        [document], _ = load_conversations(write(prose, "data.txt"))
        assert document.text == prose
