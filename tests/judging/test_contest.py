"""Two models' answers to the same prompts: wins, ties and losses, and whether they are more than chance."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st
from judging_samples import FakeJudge, prefers_longer, sampled

from mlx_zh.judging.contest import Contest, matched
from mlx_zh.judging.rules import Settings
from mlx_zh.judging.verdicts import by_hand, by_judge, by_rules, refused


def test_prompts_that_both_answered_are_matched():
    first = [sampled("甲？", "一"), sampled("乙？", "二"), sampled("丙？")]
    second = [sampled("乙？", "贰", "两"), sampled("丙？", "三"), sampled("丁？", "四")]
    (one,) = matched(first, second)
    assert (one.prompt[0].content, [answer.text for answer in one.answers]) == ("乙？", ["二", "贰"])


def test_wins_are_counted_for_the_second_model():
    # Right answers of the second only: won. Of both, or of none: tied. Of the first only: lost.
    pairs = [("8", "7"), ("7", "7"), ("8", "9"), ("7", "8"), ("9", "等于 7")]
    samples = [sampled(f"3+4=？{n}", *pair, reference="7") for n, pair in enumerate(pairs)]
    contest = Contest.of(samples, {one.id: by_rules(one, Settings()) for one in samples})
    assert (contest.won, contest.tied, contest.lost) == (2, 2, 1)
    assert contest.win_rate == pytest.approx(2 / 3)


def test_a_judge_s_ties_and_refusals_are_no_wins():
    samples = [
        sampled("甲？", "短", "长一些"),
        sampled("乙？", "同长", "一样"),
        sampled("丙？", "同", "同"),
        sampled("丁？", "一", "二"),
    ]
    fair = FakeJudge(prefers_longer)
    verdicts = {one.id: by_judge(one, fair) for one in samples[:3]} | {samples[3].id: refused(samples[3], fair)}
    assert Contest.of(samples, verdicts) == Contest(won=1, tied=2, lost=0, refused=1)


def test_votes_by_hand_count_but_for_those_skipped():
    samples = [sampled(f"第 {n} 个？", "一", "二") for n in range(5)]
    votes = [0, 1, "both", "neither", "skip"]
    verdicts = {one.id: by_hand(one, (0, 1, vote)) for one, vote in zip(samples, votes, strict=True)}
    assert Contest.of(samples, verdicts) == Contest(won=1, tied=2, lost=1)


def test_ties_alone_say_nothing():
    contest = Contest(won=0, tied=9, lost=0)
    assert (contest.win_rate, contest.interval, contest.noise) == (None, (0, 1), True)


# 1/2 is outside where |wins - losses| / sqrt(wins + losses) > 1.96: 6 of 6 give 2.4, 5 of 6 1.6, 60 of 100 2.0.
@pytest.mark.parametrize(
    ("won", "lost", "noise"), [(6, 0, False), (5, 1, True), (0, 6, False), (59, 41, True), (60, 40, False)]
)
def test_more_than_chance(won: int, lost: int, noise: bool):
    assert Contest(won, 3, lost).noise is noise


@hypothesis.given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_the_models_may_be_exchanged(won: int, tied: int, lost: int):
    one, other = Contest(won, tied, lost), Contest(lost, tied, won)
    assert one.noise == other.noise
    assert one.interval == pytest.approx(tuple(1 - end for end in reversed(other.interval)))
