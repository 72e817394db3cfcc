"""Each published form of preference data becomes the same pairs; each bad row is named."""

from __future__ import annotations

import json

import pytest

from mlx_zh.corpus.conversation import Message, Preference
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.errors import DataError

S, Q, A, R = Message("system", "s"), Message("user", "你好"), Message("assistant", "你好！"), Message("user", "再见")


def role(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def share(message: Message) -> dict[str, str]:
    return {"from": {"user": "human", "assistant": "gpt"}.get(message.role, message.role), "value": message.content}


GOOD, BAD = Message("assistant", "好"), Message("assistant", " no\n")
BOTH = {"chosen": "好", "rejected": " no\n"}


@pytest.mark.parametrize(
    ("format", "row", "prompt"),
    [
        ("alpaca", {"instruction": "你好", "input": "", "output": ["好", " no\n", "worst"]}, (Q,)),
        ("alpaca", {"instruction": "再见", "output": ["好", " no\n"], "history": [["你好", "你好！"]]}, (Q, A, R)),
        ("alpaca", {"instruction": "你好", "system": "s", **BOTH}, (S, Q)),
        ("sharegpt", {"conversations": [share(Q)], "chosen": share(GOOD), "rejected": share(BAD)}, (Q,)),
        ("sharegpt", {"conversations": [share(m) for m in (S, Q, A, R)], **BOTH}, (S, Q, A, R)),
        ("messages", {"messages": [role(Q)], "chosen": role(GOOD), "rejected": role(BAD)}, (Q,)),
        ("swift", {"messages": [role(m) for m in (S, Q, GOOD)], "rejected_response": " no\n"}, (S, Q)),
        (
            "context",
            {
                "context": [{"role": "human", "text": "你好"}],
                "chosen": {"role": "assistant", "text": "好"},
                "rejected": {"role": "assistant", "text": " no\n"},
            },
            (Q,),
        ),
        ("prompt", {"prompt": "你好", **BOTH}, (Q,)),
        ("prompt", {"prompt": "你好", "system": "s", **BOTH}, (S, Q)),
        ("prompt", {"prompt": [role(Q)], "chosen": [role(GOOD)], "rejected": [role(BAD)]}, (Q,)),
        ("prompt", {"prompt": "你好", "chosen": [role(Q), role(GOOD)], "rejected": [role(Q), role(BAD)]}, (Q,)),
        ("implicit", {"chosen": [role(m) for m in (S, Q, GOOD)], "rejected": [role(m) for m in (S, Q, BAD)]}, (S, Q)),
        ("orca", {"system": "s", "question": "你好", **BOTH}, (S, Q)),
        ("orca", {"system": "", "question": "你好", **BOTH}, (Q,)),
        (
            "openai",
            {
                "input": {"messages": [role(S), role(Q)]},
                "preferred_output": [role(GOOD)],
                "non_preferred_output": [role(BAD)],
            },
            (S, Q),
        ),
    ],
)
def test_forms(tmp_path, format, row, prompt):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([row], ensure_ascii=False), encoding="utf-8")
    for asked in ("auto", format):
        pairs, report = load_preferences(path, format=asked)
        assert pairs == [Preference(prompt, "好", " no\n", f"{path}[0]")]
        assert report == LoadReport(rows=1, kept=1, format=format)


WHOLE = {"chosen": [role(m) for m in (S, Q, GOOD)], "rejected": [role(m) for m in (S, Q, BAD)]}


@pytest.mark.parametrize("name", ["context", "question", "prompt", "instruction", "messages", "conversations"])
@pytest.mark.parametrize("given", ["text", "messages"])
@pytest.mark.parametrize("answers", ["text", "message", "list", "whole", "without system", "rest"])
def test_every_prompt_beside_every_form_of_answers(write, name, given, answers):
    """The system message stands in the prompt's messages, in the row, or in whole conversations."""
    if given == "text" and name in ("messages", "conversations"):
        return
    row = {name: [role(S), role(Q)]} if given == "messages" else {name: "你好", "system": "s"}
    row |= {
        "text": BOTH,
        "message": {"chosen": role(GOOD), "rejected": share(BAD)},
        "list": {"chosen": [role(GOOD)], "rejected": [share(BAD)]},
        "whole": WHOLE,
        "without system": {key: turns[1:] for key, turns in WHOLE.items()},
        "rest": {
            "chosen": [role(m) for m in (A, R, GOOD)],
            "rejected": [role(m) for m in (A, R, BAD)],
        },
    }[answers]
    [pair], _ = load_preferences(write(json.dumps(row, ensure_ascii=False)))
    assert (pair.chosen, pair.rejected) == ("好", " no\n")
    assert pair.prompt == ((S, Q, A, R) if answers == "rest" else (S, Q))


def test_a_text_beside_a_question_is_refused_or_mapped(write):
    path = write(json.dumps({"context": "资料", "question": "你好", **BOTH}))
    with pytest.raises(DataError, match=r"'context' is not read beside this question; .* input: context"):
        load_preferences(path)
    [pair], _ = load_preferences(path, columns={"instruction": "question", "input": "context"})
    assert pair.prompt == (Message("user", "你好\n资料"),)


def test_earlier_turns_beside_a_question_and_ms_swifts_query(write):
    rows = [
        {"prompt": "你好", **BOTH, "history": [["早", "好"]]},
        {
            "query": "你好",
            "response": BOTH["chosen"],
            "rejected_response": BOTH["rejected"],
            "history": [["早", "好"]],
        },
    ]
    for row in rows:
        [pair], _ = load_preferences(write(json.dumps(row)))
        assert [message.content for message in pair.prompt] == ["早", "好", "你好"]
        assert (pair.chosen, pair.rejected) == (BOTH["chosen"], BOTH["rejected"])


def test_transcripts(write):
    start = "\n\nHuman: 你好\n\nAssistant: 你好！\n\nHuman: 再见\n\nAssistant:"
    rows = [
        {"chosen": f"{start} 好", "rejected": f"{start} 坏"},
        {"prompt": start, "chosen": " 好", "rejected": " 坏"},
    ]
    for row in rows:
        [pair], _ = load_preferences(write(json.dumps(row, ensure_ascii=False)))
        assert pair.prompt == (Q, A, R)
        assert (pair.chosen.strip(), pair.rejected.strip()) == ("好", "坏")
    for row, message in (
        ({"chosen": f"{start} 好", "rejected": "坏"}, "differ before the last reply"),
        (
            {"chosen": f"{start} 好\n\nHuman: 嗯", "rejected": f"{start} 好\n\nHuman: 嗯"},
            "'chosen' must end with the",
        ),
    ):
        with pytest.raises(DataError, match=message):
            load_preferences(write(json.dumps(row, ensure_ascii=False)))


def test_rejected_messages_of_ms_swift(write):
    row = {"messages": WHOLE["chosen"], "rejected_messages": WHOLE["rejected"]}
    [pair], report = load_preferences(write(json.dumps(row)))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((S, Q), "好", " no\n")
    assert report.format == "swift"


def test_columns_are_renamed(write):
    path = write(json.dumps({"question": "你好", "answer_zh": "好", "answer_en": " no\n"}))
    columns = {"prompt": "question", "chosen": "answer_zh", "rejected": "answer_en"}
    assert load_preferences(path, columns=columns)[0] == [Preference((Q,), "好", " no\n", f"{path}:1")]


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": " b\n"}, "identical responses", "are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty response", "the chosen response is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty response", "the rejected response is empty"),
        ({"prompt": "a", "chosen": "b"}, "missing field", r"'rejected' is missing \(columns: prompt, chosen\)"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "missing field", "'rejected' is null"),
        ({"prompt": "a", "chosen": "b", "rejected": 1}, "wrong type", "'rejected' must be text, got a number"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty user message", r"message 1 \(user\) is empty"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [role(Q)]},
            "roles out of order",
            "'rejected' must be of assistant",
        ),
        ({"prompt": [role(Q), role(A)], **BOTH}, "does not end with user", "must be of user, got assistant"),
        (
            {"prompt": "a", "chosen": [role(Q), role(GOOD)], "rejected": [role(R), role(BAD)]},
            "prompts differ",
            "differ before the last reply",
        ),
        (
            {"prompt": "a", "chosen": [role(Q), role(GOOD)], "rejected": [role(Q), role(R)]},
            "does not end with assistant",
            "'rejected' must end with the assistant's",
        ),
    ],
)
def test_bad_rows(write, row, reason, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write("".join(json.dumps(r) + "\n" for r in (good, row)))
    with pytest.raises(DataError, match=message) as caught:
        load_preferences(path)
    assert f"\n  {path}:2: " in str(caught.value) and "data.on_invalid=skip" in str(caught.value)
    pairs, report = load_preferences(path, on_invalid="skip")
    assert len(pairs) == 1 and report.dropped == {reason: 1}


def test_one_output_is_no_ranking(write):
    path = write(json.dumps({"instruction": "a", "output": ["b"]}))
    with pytest.raises(DataError, match="at least two responses, the best first"):
        load_preferences(path)


def test_a_file_of_conversations_is_no_preference_data(write):
    with pytest.raises(DataError, match=r"no known format has the columns instruction, output\. .*orca: system"):
        load_preferences(write(json.dumps({"instruction": "a", "output": "b"})))
    with pytest.raises(DataError, match=r"columns: \{prompt: 问, chosen: 好, rejected: 坏\}\}$"):
        load_preferences(write(json.dumps({"问": "a", "好": "b", "坏": "c"}, ensure_ascii=False)))


@pytest.mark.parametrize(
    ("name", "format", "rows", "chosen_of"),
    [
        ("dpo_en_demo.json", "sharegpt", 300, lambda row: row["chosen"]["value"]),
        ("dpo_zh_demo.json", "sharegpt", 300, lambda row: row["chosen"]["value"]),
        ("oaast_rm_zh.json", "alpaca", 775, lambda row: row["output"][0]),
        ("orca_dpo_pairs_validation.jsonl", "openai", 284, lambda row: row["preferred_output"][0]["content"]),
    ],
)
def test_real_files(samples, name, format, rows, chosen_of):
    path = samples / "dpo" / name
    text = path.read_text(encoding="utf-8")
    raw = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    # Three rows of oaast_rm_zh repeat a response.
    repeated = [r for r in raw if format == "alpaca" and r["output"][0].strip() == r["output"][1].strip()]
    assert len(repeated) == (3 if format == "alpaca" else 0)
    pairs, report = load_preferences(path, on_invalid="skip")
    assert (report.rows, report.kept, report.format) == (rows, rows - len(repeated), format)
    assert report.dropped == ({"identical responses": 3} if repeated else {})
    assert [pair.chosen for pair in pairs] == [chosen_of(row) for row in raw if row not in repeated]
    assert {pair.prompt[-1].role for pair in pairs} == {"user"}
