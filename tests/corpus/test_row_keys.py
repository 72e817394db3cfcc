"""Keys that change what a row means are honoured, or the row is refused by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.normalize import normalize
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.row_keys import FALSE_REFUSED, HARMLESS, NOT_TRAINED, REFUSED
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.scan import _item, _row
from mlx_zh.corpus.sources import DataSource
from mlx_zh.errors import DataError

USER, REPLY = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
TALK = {"messages": [USER, REPLY]}
GOOD = [{"instruction": "问", "output": "答"}, TALK, {"prompt": "问", "completion": "答"}]
PAIR = {"prompt": "问", "chosen": "好", "rejected": "坏"}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Reads one row; the reason for which it was dropped, or its item."""

    def read(row: dict[str, Any], kind: str = "sft") -> Any:
        path, report = tmp_path / "row.jsonl", LoadReport()
        path.write_text(json.dumps(row), encoding="utf-8")
        try:
            items = list(DataSource("row", (str(path),)).items(kind, "skip", report, normalize))
        except DataError:
            return next(iter(report.dropped))
        return items[0]

    return read


@pytest.fixture
def renderer(byte_tokenizer: Any) -> Renderer:
    """ChatML with a token a byte."""
    return Renderer(byte_tokenizer)


CONTENT = [[{"a": 1}], "[{}]", "text", {"a": 1}]
NOTHING = [None, [], {}, "", "[]", False]


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_is_refused_by_name_in_a_row_and_in_a_message(key: str, load: Any, tmp_path: Path) -> None:
    for value in CONTENT:
        for row in [*(good | {key: value} for good in GOOD), {"messages": [USER, REPLY | {key: value}]}]:
            assert load(row) == REFUSED[key]
        assert load(PAIR | {key: value}, "dpo") == REFUSED[key]
    for value in NOTHING:
        for row in [*(good | {key: value} for good in GOOD), {"messages": [USER, REPLY | {key: value}]}]:
            assert load(row).messages == (Message("user", "问"), Message("assistant", "答"))
    path = tmp_path / "named.jsonl"
    path.write_text(json.dumps({"messages": [USER, REPLY | {key: "x y"}]}), encoding="utf-8")
    with pytest.raises(DataError, match=rf"named\.jsonl:1: 'messages'\[1\]: '{key}' is not supported"):
        load_conversations(path)


@pytest.mark.parametrize("key", FALSE_REFUSED)
def test_an_answer_that_a_row_says_is_not_to_be_learned_is_refused(key: str, load: Any) -> None:
    for good in GOOD:
        assert load(good | {key: False}) == FALSE_REFUSED[key]
        assert load(good | {key: True}).messages[-1] == Message("assistant", "答")
    assert load(PAIR | {key: False}, "dpo") == FALSE_REFUSED[key]


def test_a_label_of_zero_is_a_class(load: Any) -> None:
    assert load(GOOD[0] | {"label": 0}).messages[-1].content == "答"
    assert load(GOOD[0] | {"kto_tag": 0}) == "answer not to imitate"
    assert load(GOOD[0] | {"label": "False"}) == "answer not to imitate"
    assert load(GOOD[0] | {"weight": "65"}).messages[-1].content == "答"


@pytest.mark.parametrize("key", NOT_TRAINED)
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_a_reply_of_weight_0_is_context(key: str, no: Any, load: Any, renderer: Renderer) -> None:
    wrong = {"role": "assistant", "content": "三", key: no}
    item = load({"messages": [USER, wrong, USER, REPLY | {key: 1}]})
    plain = load({"messages": [USER, wrong | {key: 1}, USER, REPLY]})
    assert [message.trained for message in item.messages] == [True, False, True, True]
    assert _item(json.loads(json.dumps(_row(item)))) == item
    rendered, whole = renderer.conversation(item), renderer.conversation(plain)
    assert rendered is not None and whole is not None
    assert rendered.tokens.tolist() == whole.tokens.tolist()
    only = renderer.conversation(plain, train_on="last")
    assert only is not None
    assert rendered.trained.tolist() == only.trained.tolist()
    everything = renderer.conversation(item, train_on="all")
    assert everything is not None
    assert not everything.trained[whole.trained & ~only.trained].any()
    assert everything.trained[1:].sum() == len(whole.tokens) - 1 - (whole.trained & ~only.trained).sum()

    assert load({"messages": [USER, REPLY | {key: no}]}) == "not to be trained"
    assert load({"messages": [USER, REPLY | {key: 0.5}]}) == "weight of a message"
    pair = {"messages": [USER], "chosen": REPLY | {key: no}, "rejected": {"role": "assistant", "content": "坏"}}
    assert load(pair, "dpo") == "not to be trained"


def test_a_conversation_cut_before_its_trained_reply_is_dropped(load: Any, renderer: Renderer) -> None:
    item = load({"messages": [USER, REPLY | {"weight": 0}, USER, REPLY | {"content": "答" * 99}]})
    first = renderer.conversation(load(TALK))
    dropped: Counter[str] = Counter()
    assert first is not None
    assert renderer.conversation(item, max_length=len(first.tokens), dropped=dropped) is None
    assert dropped == {"not to be trained": 1}


def test_the_system_column_is_honoured_by_every_format(load: Any) -> None:
    system = {"system": "海盗"}
    sharegpt = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
    for row in [*GOOD, sharegpt, {"query": "问", "response": "答"}]:
        assert load(row | system).messages == (Message("system", "海盗"), *load(row).messages)
    whole = {"chosen": [USER, REPLY], "rejected": [USER, REPLY | {"content": "坏"}]}
    for row in [PAIR, whole, {"messages": [USER], "chosen": REPLY, "rejected": REPLY | {"content": "坏"}}]:
        assert load(row | system, "dpo").prompt[0] == Message("system", "海盗")
    own = {"messages": [{"role": "system", "content": "海盗"}, USER, REPLY]}
    assert load(own | system).messages == load(own).messages
    assert load(own | {"system": "诗人"}) == "two system messages"


def test_the_system_column_can_have_another_name(tmp_path: Path) -> None:
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(TALK | {"persona": "海盗"}), encoding="utf-8")
    [talk], _ = load_conversations(path, columns={"system": "persona"})
    assert talk.messages[0] == Message("system", "海盗")
    path.write_text(json.dumps(PAIR | {"persona": "海盗"}), encoding="utf-8")
    [pair], _ = load_preferences(path, columns={"system": "persona"})
    assert pair.prompt[0] == Message("system", "海盗")


def test_earlier_turns_beside_prompt_and_response_are_honoured(load: Any) -> None:
    row = {"prompt": "问", "response": "答", "history": [["早", "好"]]}
    assert [message.content for message in load(row).messages] == ["早", "好", "问", "答"]


def test_replies_without_loss_of_xtuner_are_context(load: Any) -> None:
    rounds = [{"input": "问", "output": "错", "output_with_loss": False}, {"input": "再", "output": "对"}]
    assert [message.trained for message in load({"conversation": rounds}).messages] == [True, False, True, True]


def test_columns_that_nothing_reads_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [GOOD[0] | {"id": 1, "分数": 3}, GOOD[0] | {"note": "x", "分数": 1, "tools": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert load_conversations(path)[1].unused == ["分数", "note"]
    path.write_text(json.dumps({"q": "问", "output": "答", "label": 2}), encoding="utf-8")
    assert load_conversations(path, columns={"instruction": "q"})[1].unused == ["label"]


def test_the_table_in_the_documentation_is_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    table = text.split("### Keys that change what a row means")[1].split("\n### ")[0]
    listed = {
        key.strip("` "): line.split("|")[3].strip() for line in table.splitlines() if line.startswith("| `")
        for key in line.split("|")[1].split(",")
    }  # fmt: skip
    reasons = {key: f"refused: {reason}" for key, reason in REFUSED.items()}
    reasons |= {f"{key}: false": f"refused: {reason}" for key, reason in FALSE_REFUSED.items()}
    assert {key: what for key, what in listed.items() if what.startswith("refused")} == reasons
    assert f"except these: {', '.join(f'`{name}`' for name in HARMLESS)}." in " ".join(table.split())
    context = {key for key, what in listed.items() if what == "honoured: the reply is context only"}
    assert context == {f"{key}: 0" for key in NOT_TRAINED}
