"""Keys that no format has, whose names say that they change what a row means."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.key_names import kind_of_name
from mlx_zh.corpus.normalize import normalize
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.sources import DataSource
from mlx_zh.errors import DataError

USER, REPLY = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
ROWS = [{"instruction": "问", "output": "答"}, {"messages": [USER, REPLY]}, {"query": "问", "response": "答"}]
NAMES = {
    "media": "image_path imageUrl IMG_URL img video_path audioFile num_images 图片链接",
    "learned": "is_train trainable loss_weight calculate_loss compute_loss train_on weights do_train 是否训练",
    "unlearned": "masked is_masked label_mask no_loss ignore_loss skip exclude not_for_training maskLoss",
    "good": "is_good good is_correct isCorrect preferred is_chosen thumbs_up upvoted is_correct_answer 是否正确",
    "bad": "is_bad is_wrong thumbs_down is_rejected isRejected downvoted",
    "rejected": "rejected_answer rejected_output bad_answer dispreferred_response",
    "system": "system_prompt systemMessage sys_prompt system-instruction 系统提示词",
    "history": "chat_history previous_messages conversationHistory past_turns 历史对话",
    "mark": "chosen_avg_rating rating_chosen chosen-reward",
    "margin": "margin reward_margin",
    "": "weight_kg training_data train_station correct_answer correct_answers good_answer medical_history history_id "
    "imagination operating_system chosen_model token_count labels correctness human_verified model 编号",
}


@pytest.mark.parametrize("kind", NAMES)
def test_the_words_of_a_name_tell_its_kind(kind: str) -> None:
    assert {name: kind_of_name(name) for name in NAMES[kind].split()} == dict.fromkeys(NAMES[kind].split(), kind)


def read(tmp_path: Any, row: dict[str, Any], kind: str = "sft") -> Any:
    """The item of a row, or the reason for which it was dropped."""
    path, report = tmp_path / "row.jsonl", LoadReport()
    path.write_text(json.dumps(row), encoding="utf-8")
    try:
        [item] = DataSource("row", (str(path),)).items(kind, "skip", report, normalize)
    except DataError:
        return next(iter(report.dropped))
    assert item.messages if kind == "sft" else item.prompt
    return item


YES, NO = [True, 1, "true", "是", "1"], [False, 0, "false", "否", "0"]
EXPECTED: dict[str, list[tuple[list[Any], str]]] = {
    "media": [(["a.jpg", ["a.jpg"], {"path": "a"}], "not only text")],
    "learned": [(NO, "not to be trained"), ([0.5, "0.5", 2], "weight of a row"), ([[0, 1], [True]], "mask")],
    "unlearned": [(YES, "mask"), ([[0, 1]], "mask")],
    "good": [(NO, "answer not to imitate")],
    "bad": [(YES, "answer not to imitate")],
    "rejected": [(["坏", [USER, REPLY]], "preference pair")],
    "history": [(["早", [["早", "好"]]], "part of the conversation not read")],
}
HARMLESS: dict[str, list[Any]] = {
    "media": [None, "", [], 0],
    "learned": [None, "", *YES, "train.jsonl"],
    "unlearned": [None, "", *NO],
    "good": [None, "", *YES],
    "bad": [None, "", *NO],
    "rejected": [None, "", []],
    "history": [None, "", [], "[]"],
}


@hypothesis.given(data=st.data(), kind=st.sampled_from(sorted(EXPECTED)), row=st.sampled_from(ROWS))
def test_a_key_that_changes_the_meaning_refuses_its_row(
    tmp_path_factory: Any, data: st.DataObject, kind: str, row: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    name = data.draw(st.sampled_from(NAMES[kind].split()))
    values, reason = data.draw(st.sampled_from(EXPECTED[kind]))
    extra = data.draw(st.dictionaries(st.sampled_from(NAMES[""].split()), st.just("x"), max_size=2))
    assert read(folder, {**row, **extra, name: data.draw(st.sampled_from(values))}) == reason
    item = read(folder, {**row, **extra, name: data.draw(st.sampled_from(HARMLESS[kind]))})
    assert item.messages == (Message("user", "问"), Message("assistant", "答"))


@hypothesis.given(data=st.data(), kind=st.sampled_from(["media", "learned", "unlearned", "good", "bad"]))
def test_a_key_of_a_message_that_changes_its_meaning(tmp_path_factory: Any, data: st.DataObject, kind: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    name = data.draw(st.sampled_from(NAMES[kind].split()))
    values, reason = data.draw(st.sampled_from(EXPECTED[kind]))
    value = data.draw(st.sampled_from(values))
    result = read(folder, {"messages": [USER, REPLY | {name: value}, USER, REPLY]})
    if reason == "not to be trained":
        assert [message.trained for message in result.messages] == [True, False, True, True]
    else:
        assert result == reason.replace("of a row", "of a message")


@pytest.mark.parametrize("name", NAMES["mark"].split())
def test_marks_of_a_pair_in_reverse(name: str, tmp_path: Any) -> None:
    pair = {"prompt": "问", "chosen": "好", "rejected": "坏"}
    other = name.replace("chosen", "rejected")
    assert read(tmp_path, pair | {name: 1, other: "4.5"}, "dpo") == "pair in reverse"
    assert read(tmp_path, pair | {name: 4.5, other: 1}, "dpo").chosen == "好"
    assert read(tmp_path, pair | {name: 1}, "dpo").chosen == "好"
    assert read(tmp_path, pair | {"margin": -0.5}, "dpo") == "pair in reverse"
    assert read(tmp_path, pair | {"margin": 0.5, "rejected_model": "x"}, "dpo").rejected == "坏"


def test_a_picture_beside_a_raw_text_is_only_named(tmp_path: Any) -> None:
    path, report = tmp_path / "text.jsonl", LoadReport()
    path.write_text(json.dumps({"text": "一段新闻。", "image_url": "a.jpg", "is_good": False}), encoding="utf-8")
    [document] = DataSource("text", (str(path),)).items("sft", "error", report, normalize)
    assert document.text == "一段新闻。"
    assert report.unused == ["image_url", "is_good"]


def test_a_switch_that_is_honoured_is_not_called_unused(tmp_path: Any) -> None:
    path, report = tmp_path / "row.jsonl", LoadReport()
    rows = [{"messages": [USER, REPLY | {"trainable": False, "mood": "x"}, USER, REPLY]}]
    path.write_text(json.dumps(rows), encoding="utf-8")
    list(DataSource("row", (str(path),)).items("sft", "error", report, normalize))
    assert report.unused == ["messages[].mood"]


def test_no_name_makes_an_error(tmp_path: Any) -> None:
    for first, second in itertools.product(["is", "loss", "image", "", "🙂", "_" * 99], repeat=2):
        assert isinstance(kind_of_name(f"{first}_{second}"), str)
