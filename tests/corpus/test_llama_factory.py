"""LLaMA-Factory's dataset_info.json: the entries that its documentation shows, and entries that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import strategies
from hypothesis import strategies as st

from mlx_zh.corpus.columns import Guess
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.llama_factory import is_dataset_info, read_entries
from mlx_zh.errors import DataError


def table(folder: Path, **entries: Any) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    (folder / "data.json").write_text("[]")
    return path


@pytest.mark.parametrize(
    ("entry", "guess"),
    [
        ({}, Guess("sft", "alpaca", {}, "given")),
        (
            {"columns": {"prompt": "问", "query": "补充", "response": "答", "system": "系统", "history": "以前"}},
            Guess(
                "sft",
                "alpaca",
                {"instruction": "问", "input": "补充", "output": "答", "system": "系统", "history": "以前"},
                "given",
            ),
        ),
        (
            {"ranking": True, "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}},
            Guess("dpo", "alpaca", {"instruction": "question", "chosen": "good", "rejected": "bad"}, "given"),
        ),
        ({"formatting": "sharegpt"}, Guess("sft", "sharegpt", {}, "given")),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": {
                    "role_tag": "role",
                    "content_tag": "content",
                    "user_tag": "user",
                    "assistant_tag": "assistant",
                },
            },
            Guess("sft", "sharegpt", {"conversations": "messages"}, "given"),
        ),
        (
            {"formatting": "sharegpt", "ranking": True, "columns": {"messages": "conversations", "system": "sys"}},
            Guess("dpo", "sharegpt", {"system": "sys"}, "given"),
        ),
    ],
)
def test_entries(tmp_path: Path, entry: dict[str, Any], guess: Guess) -> None:
    path = table(tmp_path, mine={"file_name": "data.json", "num_samples": 100, **entry})
    assert is_dataset_info(path)
    (read,) = read_entries(path)
    assert (read.name, read.path, read.guess, read.max_samples) == ("mine", tmp_path / "data.json", guess, 100)


def test_entries_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        good={"file_name": "data.json"},
        hub={"hf_hub_url": "org/set"},
        gone={"file_name": "gone.json"},
        seen={"file_name": "data.json", "columns": {"images": "images"}},
        tags={"file_name": "data.json", "formatting": "sharegpt", "tags": {"user_tag": "顾客"}},
        keys={"file_name": "data.json", "formatting": "sharegpt", "tags": {"role_tag": "speaker"}},
    )
    reasons = {entry.name: entry.reason for entry in read_entries(path) if entry.guess is None}
    assert reasons == {
        "hub": "it names no file (file_name); only files on this disk are read",
        "gone": f"there is no file {tmp_path / 'gone.json'}",
        "seen": "columns.images is not supported",
        "tags": "the role '顾客' (user_tag) is not supported",
        "keys": "messages with the keys speaker and value are not supported",
    }


def test_a_table_without_a_usable_entry_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set in it can be used:\n  hub: it names no file"):
        read_entries(table(tmp_path, hub={"ms_hub_url": "org/set"}))


def test_data_is_no_table_of_data_sets(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ('[{"instruction": "a"}]', '{"instruction": "a"}', "{}", "", '{"a": {"prompt": "x"}}', "{" * 100_000):
        path.write_text(text)
        assert not is_dataset_info(path)


entry = st.fixed_dictionaries(
    {"file_name": st.just("data.json") | strategies.values},
    optional={
        "formatting": st.sampled_from(["alpaca", "sharegpt"]) | strategies.values,
        "ranking": st.booleans() | strategies.values,
        "columns": strategies.values
        | st.dictionaries(st.sampled_from(["prompt", "messages", "chosen"]), strategies.texts),
        "tags": strategies.values | st.dictionaries(st.sampled_from(["role_tag", "user_tag"]), strategies.texts),
        "num_samples": strategies.values,
    },
)


@hypothesis.given(st.dictionaries(strategies.texts, entry, min_size=1, max_size=3))
def test_any_entry(told: Any, tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("table")
    (folder / "data.json").write_text("[]")
    path = folder / "dataset_info.json"
    path.write_text(strategies.as_json(entries))
    told(lambda: is_dataset_info(path) and read_entries(path))


def test_the_column_of_kto_is_read(tmp_path: Path) -> None:
    """As in LLaMA-Factory's kto_en_demo.json: messages, and label: true or false."""
    rows = [
        {
            "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": said}],
            "label": said == "好",
        }
        for said in ("好", "坏")
    ]
    (tmp_path / "kto.json").write_text(json.dumps(rows), encoding="utf-8")
    keys = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "kto_tag": "label"}
    path = table(tmp_path, kto={"file_name": "kto.json", "formatting": "sharegpt", "columns": columns, "tags": keys})
    [entry] = read_entries(path)
    assert entry.guess is not None
    assert entry.guess.columns == {"conversations": "messages", "kto_tag": "label"} and entry.guess.kind == "kto"
    talks, report = load_conversations(
        entry.path, format=entry.guess.format, columns=entry.guess.columns, on_invalid="skip"
    )
    assert [talk.messages[-1].content for talk in talks] == ["好"]
    assert report.dropped == {"answer not to imitate": 1}
    assert report.unused == []
