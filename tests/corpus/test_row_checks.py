"""What is checked of a row after its texts are normalised and its variables are filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from mlx_zh.corpus.conversation import Conversation, Message, Preference
from mlx_zh.corpus.normalize import normalize
from mlx_zh.corpus.row_messages import Change, is_blank
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.sources import DataSource, Item
from mlx_zh.errors import DataError

INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u3164\u180e\ufe0f\u034f\u0007 \u3000\n\t\u00a0\u202e\U000e0041"
invisible = st.text(INVISIBLE, max_size=8)


def read(folder: Path, kind: str, *rows: Any, change: Change | None = normalize, **fields: Any) -> Any:
    """The items of these rows, and the report on them."""
    path, report = folder / "rows.jsonl", LoadReport()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    items: list[Item] = list(DataSource("rows", (str(path),), **fields).items(kind, "skip", report, change))
    return items, report


GOOD = {"instruction": "问", "output": "答"}
GOOD_PAIR = {"prompt": "问", "chosen": "好", "rejected": "坏"}


def test_every_text_of_a_row_is_changed(tmp_path: Path) -> None:
    [talk], _ = read(tmp_path, "sft", {"instruction": "Ａ", "output": "Ｂ", "system": "Ｃ"})
    assert isinstance(talk, Conversation)
    assert talk.messages == (Message("system", "C"), Message("user", "A"), Message("assistant", "B"))
    [pair], _ = read(tmp_path, "dpo", {"prompt": "Ａ", "chosen": "Ｂ", "rejected": "Ｃ"})
    assert isinstance(pair, Preference)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Message("user", "A"),), "B", "C")


@hypothesis.given(text=invisible, side=st.sampled_from(["instruction", "output"]), plain=st.booleans())
def test_a_text_without_a_visible_character_is_empty(
    tmp_path_factory: pytest.TempPathFactory, text: str, side: str, plain: bool
) -> None:
    reason = {"instruction": "empty user message", "output": "empty reply"}[side]
    folder = tmp_path_factory.getbasetemp()
    items, report = read(folder, "sft", GOOD, GOOD | {side: text}, change=None if plain else normalize)
    assert len(items) == 1
    assert (report.rows, report.kept, report.dropped) == (2, 1, {reason: 1})
    _, report = read(folder, "dpo", GOOD_PAIR, GOOD_PAIR | {"rejected": text}, change=None if plain else normalize)
    assert report.dropped == {"empty response": 1}


@hypothesis.given(text=st.text(min_size=1), before=invisible, after=invisible)
def test_what_normalising_makes_equal_or_empty_is_dropped(
    tmp_path_factory: pytest.TempPathFactory, text: str, before: str, after: str
) -> None:
    hypothesis.assume(not is_blank(text) and text.isprintable())
    rejected = normalize(before + text + after)
    _, report = read(
        tmp_path_factory.getbasetemp(), "dpo", GOOD_PAIR, GOOD_PAIR | {"chosen": text, "rejected": rejected}
    )
    equal = normalize(text).strip() == rejected.strip()
    assert report.dropped == ({"identical responses": 1} if equal else {})


@pytest.mark.parametrize(("chosen", "rejected"), [("您好", "您好\u200b"), ("ＡＢＣ", "ABC"), ("e\u0301", "\u00e9")])
def test_a_pair_that_is_equal_once_normalised_is_refused_by_name(tmp_path: Path, chosen: str, rejected: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "问", "chosen": chosen, "rejected": rejected}), encoding="utf-8")
    source = DataSource("pairs", (str(path),))
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: the chosen and the rejected response are the same"):
        list(source.items("dpo", "error", LoadReport(), normalize))
    assert len(list(source.items("dpo", "error", LoadReport()))) == 1  # they are not equal as they are written


def test_a_variable_without_text_leaves_an_empty_reply(tmp_path: Path) -> None:
    items, report = read(tmp_path, "sft", GOOD, GOOD | {"output": "{{name}}"}, variables={"name": "\u200b"})
    assert len(items) == 1
    assert report.dropped == {"empty reply": 1}


def test_a_system_message_that_is_blank_once_normalised_is_left_out(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    rows = [{"messages": [{"role": "system", "content": "\u200b\x07"}, *turns]}, GOOD | {"system": "\ufeff"}]
    for row in rows:
        [talk], _ = read(tmp_path, "sft", row)
        assert [message.role for message in talk.messages] == ["user", "assistant"]


def test_placeholders_are_noted_only_where_there_are_variables(tmp_path: Path) -> None:
    rows = [GOOD | {"instruction": "{{Name}}，{{ who }}"}, GOOD | {"output": "我是{{Name}}"}]
    assert read(tmp_path, "sft", *rows)[1].placeholders == []
    assert read(tmp_path, "sft", *rows, variables={"who": "你"})[1].placeholders == ["Name", "who"]
    many = [GOOD | {"output": "".join(f"{{{{a{i}}}}}" for i in range(3000))}, GOOD | {"output": "{{who}}"}]
    noted = read(tmp_path, "sft", *many, variables={"who": "你"})[1].placeholders
    assert len(noted) == 1001
    assert noted[-1] == "who"
