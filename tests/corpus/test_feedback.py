"""Feedback of the chat, read as training data."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.corpus import feedback
from mlx_zh.corpus.columns import better_answers, guess_columns
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.feedback import CHOICES, labelled, settled, tally
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.invalid_row import InvalidRow
from mlx_zh.corpus.labelled import load_labelled
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.survey import read_head, survey
from mlx_zh.errors import DataError


def row(choice: Any, *answers: Any, asked: Any = "首都？", **more: Any) -> dict[str, Any]:
    """A row as the chat writes it."""
    prompt = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    sampling = [{"temperature": 0.7, "top_p": 0.95, "max_tokens": 1024, "seed": 7} for _ in answers]
    about = {"model": "m", "adapter": "sft", "fingerprint": "f" * 64, "sampling": sampling}
    said = {"kind": "feedback", "version": 1, "prompt": prompt, "answers": list(answers), "choice": choice}
    return {**said, **more, **about, "time": "2026-11-27T13:00:00Z"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes rows as JSON lines; `tail` is what follows the last one."""

    def write(*rows: dict[str, Any], tail: str = "") -> Path:
        path = tmp_path / "feedback.jsonl"
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
        path.write_text(lines + tail, encoding="utf-8")
        return path

    return write


def learned(path: Path) -> list[str]:
    return [conversation.messages[-1].content for conversation in load_conversations(path)[0]]


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(pair.chosen, pair.rejected) for pair in load_preferences(path)[0]]


def labels(path: Path) -> list[tuple[str, bool]]:
    return [(answer.messages[-1].content, answer.label) for answer in load_labelled(path)[0]]


EVERY = (
    row("good", "北京"),
    row("bad", "上海"),
    row(0, "北京。", "南京"),
    row(1, "成都", "北京市"),
    row("both", "是北京", "北京吧"),
    row("neither", "不知道", "东京"),
    row("edited", "西安", edited="北京！"),
)


def test_each_choice_gives_what_the_table_says(write: Any) -> None:
    path = write(*EVERY)
    assert learned(path) == ["北京", "北京。", "北京市", "是北京", "北京吧", "北京！"]
    assert pairs(path) == [("北京。", "南京"), ("北京市", "成都"), ("北京！", "西安")]
    assert labels(path) == [
        *(("北京", True), ("上海", False), ("北京。", True), ("南京", False), ("北京市", True), ("成都", False)),
        *(("是北京", True), ("北京吧", True), ("不知道", False), ("东京", False), ("北京！", True), ("西安", False)),
    ]


def test_rows_that_give_nothing_are_counted_by_reason_and_are_no_error(write: Any) -> None:
    path = write(*EVERY)
    _, sft = load_conversations(path, on_invalid="error")
    _, dpo = load_preferences(path, on_invalid="error")
    assert (sft.format, sft.rows, sft.kept, sft.unused) == ("feedback", 7, 5, [])
    assert sft.dropped == {"answer not to imitate": 2}
    assert (dpo.format, dpo.kept, dpo.unused) == ("feedback", 3, [])
    assert dpo.dropped == {"one answer, no pair": 2, "no answer better than the other": 2}


def test_it_is_an_error_if_nothing_is_left(write: Any) -> None:
    path = write(row("good", "北京"), row("both", "a", "b"))
    with pytest.raises(DataError, match=r"none of its 2 rows .*one answer, no pair 1, no answer better .* 1"):
        load_preferences(path)


def test_what_was_taken_back_is_learned_by_no_kind_of_training(write: Any) -> None:
    said = (row("good", "上海"), row("good", "北京"), row(0, "a", "b"), row("both", "c", "d"))
    path = write(*said, row("withdrawn", "上海"), row("withdrawn", "b", "a"))
    assert learned(path) == ["北京", "c", "d"]
    assert labels(path) == [("北京", True), ("c", True), ("d", True)]
    with pytest.raises(DataError, match="taken back"):
        pairs(path)
    assert learned(write(*said, row("withdrawn", "上海"), row("good", "上海"))) == ["北京", "a", "c", "d", "上海"]
    held = tally(write(*said, row("withdrawn", "上海")), 1)
    assert (held.rows, held.sft, held.latest) == (5, 4, [row("withdrawn", "上海")])


def test_what_was_said_last_of_an_answer_counts(write: Any) -> None:
    path = write(row("good", "上海"), row(0, "a", "b"), row("bad", "上海"), row(1, "a", "b"))
    assert learned(path) == ["b"]
    assert pairs(path) == [("b", "a")]
    assert labels(path) == [("上海", False), ("b", True), ("a", False)]
    assert load_conversations(path)[1].dropped == {"judged again later": 2, "answer not to imitate": 1}
    # Which answer was first does not matter, and another question is another matter.
    path = write(row(0, "a", "b"), row(0, "b", "a"), row("good", "b", asked="二？"), row("bad", "b", asked="三？"))
    assert pairs(path) == [("b", "a")]
    assert learned(path) == ["b", "b"]


@pytest.mark.parametrize("value", [None, 1, "x", ["x"], {"a": 1}])
def test_a_column_with_the_name_of_the_inner_one_says_nothing(write: Any, value: Any) -> None:
    path = write(row("good", "北京", replaced=value), row(0, "北京。", "南京", replaced=value))
    assert learned(path) == ["北京", "北京。"] and pairs(path) == [("北京。", "南京")]


def test_a_vote_on_one_of_two_answers_leaves_the_pair(write: Any) -> None:
    """The better of two answers may be bad all the same: then it is not learned by itself."""
    path = write(row(0, "a", "b"), row("bad", "a"))
    assert pairs(path) == [("a", "b")]
    with pytest.raises(DataError, match="none of its 2 rows"):
        learned(path)


def test_earlier_replies_of_the_prompt_are_context_only(write: Any) -> None:
    asked = [
        {"role": "system", "content": "简短。"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "甲"},
        {"role": "user", "content": "二"},
    ]
    ((conversation,), _) = load_conversations(write(row("good", "乙", asked=asked)))
    assert conversation.messages == (
        Message("system", "简短。"),
        Message("user", "一"),
        Message("assistant", "甲", trained=False),
        Message("user", "二"),
        Message("assistant", "乙"),
    )


def test_a_last_line_that_a_killed_program_left_is_counted(write: Any) -> None:
    half = json.dumps(row("good", "上海"), ensure_ascii=False)[:40]
    path = write(row("good", "北京"), tail=half)
    assert learned(path) == ["北京"]
    assert load_conversations(path)[1].dropped == {"half-written last line": 1}
    assert (tally(path).rows, tally(path).unusable) == (1, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("great", "a"), "'choice' must be one of"),
        (row(True, "a", "b"), "'choice' must be one of"),
        (row(1.0, "a", "b"), "'choice' must be one of"),
        (row(None, "a"), "'choice' must be one of"),
        (row([], "a"), "'choice' must be one of"),
        (row(2, "a", "b"), "'choice' must be one of"),
        (row("good", "a", "b"), "'answers' must be a list of 1 texts"),
        (row("both", "a"), "'answers' must be a list of 2 texts"),
        (row("good", 3), "must be text, got a number"),
        (row("good", " "), "is empty"),
        (row("edited", "a"), "'edited' must be text, got a null"),
        (row("edited", "a", edited="a "), "are the same"),
        (row(0, "a", "a"), "are the same"),
        (row("good", "a", asked=[]), "must be a list of messages"),
        (row("good", "a", asked=[{"role": "assistant", "content": "b"}]), "must be of user"),
        (row("good", "\ud800"), "half of a surrogate pair"),
    ],
)
def test_a_row_that_is_wrong_is_an_error_like_any_other(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(row("good", "a", asked="x")) + "\n" + json.dumps(bad) + "\n")
    for load in (load_conversations, load_preferences, load_labelled):
        with pytest.raises(DataError, match=f"f.jsonl:2: .*{message}"):
            load(path)
    assert (tally(path).rows, tally(path).unusable) == (1, 1)


def test_init_reads_it_for_both_stages(write: Any) -> None:
    path = write(*EVERY)
    head = read_head(path)
    guess = guess_columns(head.rows)
    assert guess is not None and (guess.kind, guess.format) == ("dpo", "feedback")
    sft = better_answers(guess, head.rows)
    assert sft is not None and (sft.kind, sft.format, sft.explicit) == ("sft", "feedback", False)
    surveyed = survey(path, head, guess)
    assert (surveyed.rows, surveyed.usable, surveyed.unusable) == (7, 3, [])
    only_votes = guess_columns([row("good", "a"), row("bad", "b")])
    assert only_votes is not None and (only_votes.kind, only_votes.format) == ("sft", "feedback")


def test_the_tally_is_what_training_gets(write: Any) -> None:
    counted = tally(write(*EVERY, row("bad", "北京")), latest=2)
    assert counted.choices == {"good": 1, "bad": 2, 0: 1, 1: 1, "both": 1, "neither": 1, "edited": 1}
    assert (counted.rows, counted.sft, counted.dpo, counted.kto) == (8, 5, 3, 12)
    assert counted.latest is not None and [one["choice"] for one in counted.latest] == ["edited", "bad"]
    assert tally(Path("nowhere.jsonl")).rows == 0


texts = st.sampled_from(["甲", "乙", "丙", "丁"])
rows = st.builds(
    lambda choice, first, second, asked: row(
        choice,
        *((first, second) if choice in (0, 1, "both", "neither") else (first,)),
        asked=asked,
        **({"edited": second} if choice == "edited" else {}),
    ),
    st.sampled_from(CHOICES),
    texts,
    texts,
    st.sampled_from(["一？", "二？"]),
)


@given(st.lists(rows, max_size=12))
def test_no_answer_is_both_good_and_bad_and_no_pair_stands_both_ways(history: list[dict[str, Any]]) -> None:
    said: dict[tuple[str, str], bool] = {}
    preferred: dict[tuple[str, frozenset[str]], str] = {}
    for one in history:  # the plain rule: what is said later replaces what was said before
        try:
            judged = feedback.judgement_of(one)
        except InvalidRow:
            continue
        asked = judged.prompt[-1].content
        said.update({(asked, answer): good for answer, good in judged.votes})
        if judged.pair is not None:
            preferred[asked, frozenset(judged.pair)] = judged.pair[0]

    votes: list[tuple[tuple[str, str], bool]] = []
    chosen: list[tuple[tuple[str, frozenset[str]], str]] = []
    good = []
    for _, one in settled(("f", one) for one in history):
        for read in (_votes(votes), _pairs(chosen), _good(good)):
            with suppress(InvalidRow):
                read(one)
    assert len(votes) == len(dict(votes)) and dict(votes) == said
    assert len(chosen) == len(dict(chosen)) and dict(chosen) == preferred
    assert sorted(good) == sorted(key for key, is_good in said.items() if is_good)


def _votes(into: list[Any]) -> Any:
    return lambda one: into.extend(((m[-2].content, m[-1].content), good) for m, good in labelled(one))


def _good(into: list[Any]) -> Any:
    return lambda one: into.extend((m[-2].content, m[-1].content) for m in feedback.conversations(one))


def _pairs(into: list[Any]) -> Any:
    def read(one: dict[str, Any]) -> None:
        prompt, better, other = feedback.pair_of(one)
        into.append(((prompt[-1].content, frozenset((better.content, other.content))), better.content))

    return read
