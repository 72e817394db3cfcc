"""Verdicts become rows of data, and prompts that teach nothing are left out and counted."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from judging_samples import FakeJudge, prefers_longer, sampled

from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.samples import Sampled
from mlx_zh.judging.preferences import choose
from mlx_zh.judging.rules import Settings
from mlx_zh.judging.verdicts import PromptVerdict, VerdictFile, by_hand, by_judge, by_rules, refused

GOOD = sampled("3+4=?", "8", "7", "等于 7", "9", reference="7")
SAMPLES = [
    GOOD,
    sampled("1+1=?", "2", "等于 2", reference="2"),
    sampled("2+2=?", "5", "6", reference="4"),
    sampled("5+5=?", "10", "10", reference="10"),
    sampled("6+6=?", "12", reference="12"),
    sampled("8+8=?", "16", "16 ", reference="16", cut=[1]),
]
LEFT_OUT = {"all answers good": 1, "all answers bad": 1, "the answers are the same": 2, "one answer only": 1}


def _by_rules(samples: list[Sampled]) -> dict[str, PromptVerdict]:
    return {one.id: by_rules(one, Settings()) for one in samples}


def _written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_pair_is_the_first_good_answer_and_the_first_bad_one(tmp_path: Path):
    chosen = choose(SAMPLES, _by_rules(SAMPLES), "pairs")
    assert (chosen.prompts, dict(chosen.left_out)) == (1, LEFT_OUT)
    (pair,), report = load_preferences(_written(tmp_path / "pairs.jsonl", chosen.rows))
    assert report.kept == 1
    assert (pair.prompt, pair.chosen, pair.rejected) == (GOOD.prompt, "7", "8")


def test_the_best_answer_is_a_conversation(tmp_path: Path):
    chosen = choose(SAMPLES, _by_rules(SAMPLES), "best")
    (conversation,), _ = load_conversations(_written(tmp_path / "best.jsonl", chosen.rows))
    assert [message.content for message in conversation.messages] == ["3+4=?", "7"]


def test_every_different_answer_has_a_label():
    rows = choose(SAMPLES, _by_rules(SAMPLES), "kto").rows
    said = [(row["completion"][0]["content"], row["label"]) for row in rows]
    assert said == [("8", False), ("7", True), ("等于 7", True), ("9", False)]
    assert all(row["prompt"] == [{"role": "user", "content": "3+4=?"}] for row in rows)


def test_a_judge_s_near_equal_answers_are_left_out():
    samples = [sampled("甲？", "短", "长一些"), sampled("乙？", "同长", "一样"), sampled("丙？", "坏", "更坏的")]
    fair = FakeJudge(prefers_longer)
    verdicts = {one.id: by_judge(one, fair) for one in samples[:2]}
    verdicts[samples[2].id] = refused(samples[2], fair)
    chosen = choose(samples, verdicts, "pairs")
    assert [(row["chosen"]["content"], row["rejected"]["content"]) for row in chosen.rows] == [("长一些", "短")]
    assert chosen.left_out == {"answers nearly equal": 1, "refused by the judge": 1}


@pytest.mark.parametrize(
    ("vote", "pair", "labels"),
    [
        ((0, 2, 1), [("丙", "甲")], [("甲", False), ("丙", True)]),
        ((0, 1, 0), [("甲", "乙")], [("甲", True), ("乙", False)]),
        ((0, 1, "both"), [], []),
        ((0, 1, "neither"), [], []),
        ((0, 1, "skip"), [], []),
    ],
)
def test_a_vote_is_about_two_answers_alone(vote, pair, labels):
    one = sampled("哪个？", "甲", "乙", "丙")
    verdict = {one.id: by_hand(one, vote)}
    pairs = choose([one], verdict, "pairs").rows
    assert [(row["chosen"]["content"], row["rejected"]["content"]) for row in pairs] == pair
    rows = choose([one], verdict, "kto").rows
    assert [(row["completion"][0]["content"], row["label"]) for row in rows] == labels


def test_only_prompts_that_need_a_verdict_wait_for_one():
    chosen = choose(SAMPLES, {}, "pairs")
    assert (chosen.rows, chosen.prompts) == ([], 0)
    assert chosen.left_out == {"one answer only": 1, "the answers are the same": 2}


TEXTS = st.lists(st.sampled_from(["7", "8", " 7", "等于 7", "", "不知道"]), min_size=1, max_size=5)


@hypothesis.given(TEXTS, st.sampled_from(["rule", "judge"]), st.data())
def test_a_chosen_answer_is_never_the_rejected_one(texts: list[str], by: str, data: st.DataObject):
    one = sampled("3+4=?", *texts, reference="7", cut=data.draw(st.lists(st.integers(0, len(texts) - 1))))
    verdict = by_rules(one, Settings()) if by == "rule" else by_judge(one, FakeJudge(prefers_longer))
    for row in choose([one], {one.id: verdict}, "pairs").rows:
        assert row["chosen"]["content"] != row["rejected"]["content"]
    labels = [(row["completion"][0]["content"], row["label"]) for row in choose([one], {one.id: verdict}, "kto").rows]
    assert len({text for text, _ in labels}) == len(labels)


def test_verdicts_come_back_from_their_file_as_they_were(tmp_path: Path):
    file, fair = VerdictFile(tmp_path / "chosen.jsonl"), FakeJudge(prefers_longer)
    two = sampled("甲？", "短", "长一些")
    verdicts = [
        by_rules(GOOD, Settings()),
        by_judge(two, fair),
        by_hand(two, (0, 1, 1)),
        by_hand(two, (0, 1, "skip")),
    ]
    for verdict in verdicts:
        file.append(verdict)
    for verdict in (*verdicts[:2], verdicts[3]):  # of the two votes, the later one counts
        assert file.read(verdict.by, verdict.key, [GOOD, two]) == {verdict.id: verdict}


def test_a_verdict_on_other_answers_is_not_taken(tmp_path: Path):
    file = VerdictFile(tmp_path / "chosen.jsonl")
    file.append(verdict := by_rules(GOOD, Settings()))
    changed = sampled("3+4=?", "8", "7", "等于 7", "10", reference="7")
    assert file.read("rule", verdict.key, [changed]) == {}
    assert file.read("rule", "another key", [GOOD]) == {}


def test_what_a_kill_cut_off_is_decided_again(tmp_path: Path):
    """Cut at every byte: what was whole stays, and what is appended then is read."""
    file = VerdictFile(tmp_path / "chosen.jsonl")
    two = sampled("1+1=?", "2", "3", reference="2")
    for one in (GOOD, two):
        file.append(by_rules(one, Settings()))
    whole, first = file.path.read_bytes(), by_rules(GOOD, Settings())
    for end in range(whole.index(b"\n", 1) + 1, len(whole)):
        file.path.write_bytes(whole[:end])
        read = file.read("rule", first.key, [GOOD, two])
        assert read[GOOD.id] == first
        file.append(by_rules(two, Settings()))
        assert file.read("rule", first.key, [GOOD, two]).keys() == {GOOD.id, two.id}


@hypothesis.given(
    st.recursive(st.none() | st.integers(-2, 2) | st.text(max_size=3), lambda x: st.lists(x, max_size=4)), st.data()
)
def test_a_damaged_line_is_passed_over(tmp_path_factory: pytest.TempPathFactory, value, data: st.DataObject):
    path = tmp_path_factory.mktemp("verdicts") / "chosen.jsonl"
    file, verdict = VerdictFile(path), by_rules(GOOD, Settings())
    line = verdict.as_dict()
    line[data.draw(st.sampled_from(sorted(line)))] = value
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    for read in file.read("rule", verdict.key, [GOOD]).values():
        choose([GOOD], {GOOD.id: read}, "pairs")
        choose([GOOD], {GOOD.id: read}, "kto")
