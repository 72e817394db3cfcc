"""Keys that change what a row means are honoured, or the row is refused by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.normalize import normalize
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.row_keys import (
    FALSE_REFUSED,
    HARMLESS,
    MARKS,
    NOT_POSITIVE_REFUSED,
    NOT_TRAINED,
    REFUSED_IN_MESSAGE,
    REFUSED_IN_ROW,
    UNREAD,
    WEIGHTS,
)
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.scan import _item, _row
from mlx_zh.corpus.sources import DataSource
from mlx_zh.corpus.tools import has_content
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


@pytest.mark.parametrize("key", REFUSED_IN_ROW)
def test_a_refused_key_is_refused_by_name_in_a_row(key: str, load: Any) -> None:
    for value in CONTENT:
        for row in (good | {key: value} for good in GOOD):
            assert load(row) == REFUSED_IN_ROW[key]
        assert load(PAIR | {key: value}, "dpo") == REFUSED_IN_ROW[key]
    for value in NOTHING if REFUSED_IN_ROW[key] != "mask" else NOTHING[:-1]:
        for row in (good | {key: value} for good in GOOD):
            assert load(row).messages == (Message("user", "问"), Message("assistant", "答"))


@pytest.mark.parametrize("key", REFUSED_IN_MESSAGE)
def test_a_refused_key_is_refused_by_name_in_a_message(key: str, load: Any, tmp_path: Path) -> None:
    for value in CONTENT:
        assert load({"messages": [USER, REPLY | {key: value}]}) == REFUSED_IN_MESSAGE[key]
    for value in NOTHING if REFUSED_IN_MESSAGE[key] != "mask" else NOTHING[:-1]:
        assert load({"messages": [USER, REPLY | {key: value}]}).messages[-1] == Message("assistant", "答")
    path = tmp_path / "named.jsonl"
    path.write_text(json.dumps({"messages": [USER, REPLY | {key: "x y"}]}), encoding="utf-8")
    with pytest.raises(DataError, match=rf"named\.jsonl:1: 'messages'\[1\]: '{key}' is not supported"):
        load_conversations(path)


@pytest.mark.parametrize("value", [True, False, 0, 1, [0, 1], "assistant"])
def test_a_mask_is_refused_unless_it_names_the_user(value: Any, load: Any) -> None:
    assert load(TALK | {"mask": value}) == "mask"
    assert load(TALK | {"mask": "User"}) == load(TALK)


@pytest.mark.parametrize("key", WEIGHTS)
def test_a_row_that_weighs_more_or_less_than_others_is_refused(key: str, load: Any) -> None:
    for value in (0.5, 2, -1):
        assert load(TALK | {key: value}) == "weight of a row"
    for value in (1, 1.0, True, None):
        assert load(TALK | {key: value}) == load(TALK)


@pytest.mark.parametrize("key", NOT_POSITIVE_REFUSED)
def test_an_answer_with_a_score_of_nothing_is_refused(key: str, load: Any) -> None:
    for value in (0, -0.5, False):
        assert load(TALK | {key: value}) == "answer not to imitate"
    assert load(TALK | {key: 4.5}) == load(TALK)


@pytest.mark.parametrize("names", MARKS)
def test_a_pair_whose_better_answer_has_the_lower_score_is_refused(names: tuple[str, str], load: Any) -> None:
    better, worse = names
    assert load(PAIR | {better: 1, worse: 4.5}, "dpo") == "pair in reverse"
    assert load(PAIR | {better: "1", worse: "2"}, "dpo") == "pair in reverse"  # as a table has them
    for marks in ({better: 4.5, worse: 1}, {better: 1}, {better: "A", worse: "B"}):
        assert load(PAIR | marks, "dpo") == load(PAIR, "dpo")


@pytest.mark.parametrize("key", ["rejected", "rejected_response", "rejected_messages", "non_preferred_output"])
def test_a_pair_is_learned_from_for_sft_only_if_the_columns_say_so(key: str, tmp_path: Path, load: Any) -> None:
    worse = [USER, REPLY] if key == "rejected_messages" else "坏"
    for good in GOOD:
        assert load(good | {key: worse}) == "preference pair"
        assert load(good | {key: None}) == load(good)
    path = tmp_path / "pair.jsonl"
    path.write_text(json.dumps({"prompt": "问", "chosen": "好", key: worse}), encoding="utf-8")
    [talk], _ = load_conversations(path, columns={"response": "chosen"})
    assert talk.messages[-1] == Message("assistant", "好")
    path.write_text(json.dumps(TALK | {key: worse}), encoding="utf-8")
    assert load_conversations(path, columns={"messages": "messages"})[0][0].messages == load(TALK).messages


def test_turns_that_a_format_does_not_read_are_refused(load: Any) -> None:
    belle = {"instruction": "问", "instances": [{"input": "", "output": "答"}]}
    for row in (TALK | {"history": [["早", "好"]]}, belle | {"system": "海盗"}, belle | {"history": [["早", "好"]]}):
        assert load(row) == "part of the conversation not read"
    assert load(TALK | {"history": []}) == load(TALK)


MEDIA_TOKENS = [
    *("<|image|>", "<|image_1|>", "<|vision_start|>", "<|video_pad|>", "<|AUDIO|>", "<image_soft_token>"),
    *("<|begin_of_image|>", "<|audio_1|>", "<image_1>", "<image 2>", "<image_placeholder>", "<Img>a/b.jpg</Img>"),
    *("<audio>声.wav</audio>", "<video>a.mp4</video>"),
]


@pytest.mark.parametrize("token", MEDIA_TOKENS)
def test_a_placeholder_of_a_picture_is_refused_in_every_text(token: str, load: Any) -> None:
    assert load({"prompt": f"看{token}，这是什么？", "response": "猫"}) == "not only text"
    assert load({"prompt": "问", "response": f"答{token}"}) == "not only text"
    assert load({"prompt": "问", "response": "答", "system": f"看{token}"}) == "not only text"
    assert load(PAIR | {"rejected": f"坏{token}"}, "dpo") == "not only text"


@pytest.mark.parametrize("tag", ["image", "video", "audio"])
def test_a_tag_of_html_is_refused_only_where_it_stands_for_a_picture(tag: str, load: Any) -> None:
    for prose in (f"HTML 的 <{tag}> 标签怎么用？", f"```html\n<{tag}>\n  <p>x</p>\n</{tag}>\n```\n这是什么？"):
        row = {"prompt": prose, "response": f"例如：\n<{tag}>"}
        assert load(row).messages[0].content == prose
        assert load(row | {f"{tag}s": []}) == "not only text"
    for question in (f"<{tag}>\n这是什么？", f"这是什么？\n<{tag}>"):
        assert load({"prompt": question, "response": "猫"}) == "not only text"
        assert load({"prompt": question.upper(), "response": "猫"}) == "not only text"


def test_keys_of_messages_that_nothing_reads_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [USER | {"name": "小明"}, REPLY | {"emotion": "喜", "id": "1", "refusal": None}]},
        {"conversations": [], "messages": [USER, REPLY | {"weight": 1}]},
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert load_conversations(path)[1].unused == ["messages[].name", "messages[].emotion", "conversations"]


VALUES = st.sampled_from([None, "", [], {}, 0, 1, 0.5, -1, True, False, "x", "[]", ["x"], {"a": 1}])
EXTRA = st.dictionaries(
    st.sampled_from(
        sorted({*REFUSED_IN_ROW, *REFUSED_IN_MESSAGE, *UNREAD, *FALSE_REFUSED, *NOT_POSITIVE_REFUSED, *WEIGHTS})
    )
    | st.sampled_from([*NOT_TRAINED, *HARMLESS, "名字", "name", "emotion"]),
    VALUES,
    max_size=3,
)


@hypothesis.given(row=EXTRA, reply=EXTRA, data=st.data())
def test_every_key_is_used_or_harmless_or_told_or_refuses_its_row(
    tmp_path_factory: Any, row: dict[str, Any], reply: dict[str, Any], data: st.DataObject
) -> None:
    """A row that is kept says the same as without its extra keys, except that a reply may be context only."""
    path = tmp_path_factory.getbasetemp() / "keys.jsonl"
    talk = {"messages": [USER, REPLY | reply, USER, REPLY], **row}
    path.write_text(json.dumps(talk), encoding="utf-8")
    report = LoadReport()
    try:
        [item] = DataSource("keys", (str(path),)).items("sft", "skip", report, normalize)
    except DataError:
        [reason] = report.dropped
        known = {*REFUSED_IN_ROW.values(), *REFUSED_IN_MESSAGE.values(), *UNREAD.values(), *FALSE_REFUSED.values()}
        assert reason in known | {"answer not to imitate", "weight of a row", "weight of a message", "wrong type"}
        return
    meaning = {key: value for key, value in row.items() if has_content(value)}
    if "system" in meaning:
        assert item.messages[0] == Message("system", "x")
    turns = [message for message in item.messages if message.role not in ("system", "tools")]
    off = [key for key in NOT_TRAINED if key in reply and reply[key] is not None and not reply[key]]
    assert [(m.content, m.trained) for m in turns] == [
        ("问", True), ("答", not off), ("问", True), ("答", True)
    ]  # fmt: skip
    told = set(report.unused)
    for key in row:
        assert key in told or key in {*HARMLESS, "system", *REFUSED_IN_ROW, *UNREAD, "tools", "functions"}
    for key, value in reply.items():
        read = {*NOT_TRAINED, *REFUSED_IN_MESSAGE, *HARMLESS, "tool_calls", "function_call"}
        assert f"messages[].{key}" in told or key in read or not has_content(value)


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
    assert load(GOOD[0] | {"weight": "heavy"}).messages[-1].content == "答"


@pytest.mark.parametrize("no", ["0", "0.0", "false", "FALSE", "否", "no"])
def test_tables_write_numbers_and_false_as_text(no: str, load: Any) -> None:
    assert load(GOOD[0] | {"kto_tag": no}) == "answer not to imitate"
    for key in ("weight", "loss", "train"):
        assert load(GOOD[0] | {key: no}) == "not to be trained"
        assert load({"messages": [USER, REPLY | {"weight": no}, USER, REPLY]}).messages[1].trained is False
    assert load(GOOD[0] | {"score": "-1.5"}) == load(GOOD[0] | {"reward": "0"}) == "answer not to imitate"
    assert load(GOOD[0] | {"weight": "0.5"}) == "weight of a row"
    kto = {"prompt": "问", "completion": "答", "label": "0"}
    assert load(kto) == "answer not to imitate"
    assert load(kto | {"label": 0.0}) == "answer not to imitate"  # pandas makes numbers of true, false and nothing
    assert load(kto | {"label": "1"}).messages[-1].content == "答"


@pytest.mark.parametrize("key", ["label", "kto_tag", "score", "rating", "reward", "is_correct"])
def test_a_mark_of_a_message_says_whether_it_is_to_be_imitated(key: str, load: Any) -> None:
    assert load({"messages": [USER, REPLY | {key: False}, USER, REPLY]}) == "answer not to imitate"
    assert load({"messages": [USER, REPLY | {key: True}]}) == load(TALK)


@pytest.mark.parametrize("key", ["input", "context"])
def test_a_text_beside_a_question_is_refused_unless_the_question_repeats_it(key: str, load: Any) -> None:
    for row in ({"prompt": "问", "response": "答"}, {"query": "问", "response": "答"}):
        assert load(row | {key: "资料"}) == "part of the conversation not read"
        assert load(row | {key: "问"}) == load(row | {key: ""}) == load(row | {key: None}) == load(row)
    assert load(GOOD[0] | {"context": "资料"}) == "part of the conversation not read"
    assert load(PAIR | {key: "资料"}, "dpo") == "part of the conversation not read"
    assert load(TALK | {key: "资料"}) == load(TALK)


@pytest.mark.parametrize("key", ["system_prompt", "systemMessage", "sys_prompt", "System Prompt", "系统提示词"])
def test_a_system_prompt_under_another_name_is_honoured(key: str, load: Any) -> None:
    for row in [*GOOD, {"query": "问", "response": "答"}]:
        assert load(row | {key: "海盗"}) == load(row | {"system": "海盗"})
        assert load(row | {key: ""}) == load(row)
    assert load(PAIR | {key: "海盗"}, "dpo") == load(PAIR | {"system": "海盗"}, "dpo")
    assert load(GOOD[0] | {key: "海盗", "system": "海盗"}) == load(GOOD[0] | {"system": "海盗"})
    assert load(GOOD[0] | {key: "海盗", "system": "诗人"}) == "two system messages"
    belle = {"instruction": "问", "instances": [{"input": "", "output": "答"}]}
    assert load(belle | {key: "海盗"}) == "part of the conversation not read"


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


def test_reasoning_can_have_another_name(tmp_path: Path) -> None:
    path = tmp_path / "row.jsonl"
    rows = [{"Question": "问", "Complex_CoT": "想", "Response": "答"}, {"Question": "问", "Response": "答"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"prompt": "Question", "response": "Response", "reasoning_content": "Complex_CoT"}
    talks, _ = load_conversations(path, columns=columns)
    assert [talk.messages[-1].reasoning for talk in talks] == ["想", ""]


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
    rows = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines() if line.startswith("| `")]
    listed = {
        (key.strip("` |"), place): what.strip(" |") for keys, place, what in rows for key in keys.split(",")
    }  # fmt: skip

    def keys_of(what: str, where: str) -> set[str]:
        return {key for (key, place), text in listed.items() if text == what and where in place}

    for where, refused in (("row", REFUSED_IN_ROW), ("message", REFUSED_IN_MESSAGE)):
        for reason in set(refused.values()):
            assert keys_of(f"refused: {reason}", where) == {key for key, value in refused.items() if value == reason}
    for reason in ("not to be trained", "answer not to imitate"):
        expected = {f"{key}: false" for key, value in FALSE_REFUSED.items() if value == reason}
        expected |= {f"{key}: -1" for key, value in NOT_POSITIVE_REFUSED.items() if value == reason}
        assert keys_of(f"refused: {reason}", "row") == expected
    for reason in set(UNREAD.values()):
        assert keys_of(f"refused: {reason}", "row") == {key for key, value in UNREAD.items() if value == reason}
    assert f"These are not named: {', '.join(f'`{name}`' for name in HARMLESS)}." in " ".join(table.split())
    assert keys_of("honoured: the reply is context only", "message") == {f"{key}: 0" for key in NOT_TRAINED}
