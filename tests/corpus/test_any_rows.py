"""Any rows of any format, any bytes as a data file: usable rows, or an error that names the file."""

from __future__ import annotations

import hypothesis
import pytest
import strategies
from hypothesis import strategies as st

from mlx_zh.corpus import formats, preferences
from mlx_zh.corpus.conversation import Conversation

said = st.sampled_from(["你好", "Hello", "3 + 4 = 7"]) | strategies.texts
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "USER"])
message = (
    st.fixed_dictionaries({"role": roles, "content": said})
    | st.fixed_dictionaries({"from": roles, "value": said})
    | st.fixed_dictionaries({"role": roles, "text": said})
)
parts = st.fixed_dictionaries(
    {"role": roles, "content": st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": said}), max_size=2)}
)
dialogue = st.lists(message | parts, max_size=4)
turns = st.lists(said, min_size=2, max_size=2)
COLUMNS = {
    "messages": dialogue,
    "conversations": dialogue,
    "instruction": said,
    "input": said | st.fixed_dictionaries({"messages": dialogue}),
    "output": said | turns,
    "system": said,
    "history": st.lists(turns, max_size=2),
    "instances": st.lists(st.fixed_dictionaries({"input": said, "output": said}), max_size=2),
    "prompt": said | dialogue,
    "response": said,
    "completion": said,
    "question": said,
    "chosen": said | message | dialogue,
    "rejected": said | message | dialogue,
    "preferred_output": st.lists(message, max_size=1),
    "non_preferred_output": st.lists(message, max_size=1),
    "query": said,
    "rejected_response": said,
    "context": dialogue,
    "conversation": st.lists(
        st.dictionaries(st.sampled_from(["human", "assistant", "system", "input", "output"]), said), max_size=2
    ),
    "data": st.lists(said, max_size=4),
    "meta_instruction": said,
    "chat": st.dictionaries(
        st.just("turn_1"), st.dictionaries(st.sampled_from(["Human", "MOSS", "Commands"]), said), max_size=1
    ),
    "answer_zh": said,
    "answer_en": said,
}
LOADERS = {
    "sft": (formats.load_conversations, formats.FORMATS),
    "dpo": (preferences.load_preferences, preferences.FORMATS),
}
row = strategies.rows(COLUMNS) | strategies.values
renamed = st.dictionaries(
    st.sampled_from(sorted(COLUMNS)) | strategies.texts, st.sampled_from(sorted(COLUMNS)), max_size=2
)


@pytest.mark.parametrize("kind", LOADERS)
@hypothesis.given(data=st.data())
def test_any_rows(told, tmp_path_factory, kind, data):
    load, known = LOADERS[kind]
    rows = [strategies.as_json(value) for value in data.draw(st.lists(row, max_size=4))]
    text = data.draw(
        st.sampled_from(["\n".join(rows), "[" + ",".join(rows) + "]", "[\n" + ",\n".join(rows) + "\n]\n"])
    )
    path = tmp_path_factory.getbasetemp() / "rows.json"
    path.write_text(text, encoding="utf-8")
    options = {
        "format": data.draw(st.sampled_from(["auto", *known])),
        "on_invalid": data.draw(st.sampled_from(["error", "skip"])),
        "columns": data.draw(st.none() | renamed),
    }

    def use() -> None:
        items, report = load(path, **options)
        assert report.kept + sum(report.dropped.values()) == report.rows
        for item in items:
            said = [m.content for m in (item.messages if isinstance(item, Conversation) else item.prompt)]
            assert all(text.encode() for text in said[1:])  # none is empty, all can be written

    error = told(use)
    assert error is None or "rows.json" in error or "columns" in error


WHOLE = (
    '{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]}\n'
    '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi \\ud83d\\ude42"}]}\n'
).encode()


@hypothesis.given(
    strategies.damaged(WHOLE)
    | st.binary(max_size=60)
    | strategies.damaged(b"[" + WHOLE.replace(b"\n", b",") + b"{}]")
)
def test_any_bytes_as_rows(told, tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(content)
    for load, _ in LOADERS.values():
        error = told(lambda load=load: load(path))
        assert error is None or "rows.jsonl" in error
