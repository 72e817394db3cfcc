"""Statistics against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_zh.exams import statistics


def rights(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text])


def test_macro_counts_subjects_and_micro_counts_questions():
    correct = {"small": rights("11"), "large": rights("10000000")}
    assert statistics.macro(correct) == pytest.approx((1 + 1 / 8) / 2)
    assert statistics.micro(correct) == pytest.approx(3 / 10)


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (0, 0, 1.0),  # nothing differs
        (1, 0, 1.0),  # one coin: 2 * 1/2
        (3, 1, 0.625),  # 2 * (C(4,0) + C(4,1)) / 16
        (1, 3, 0.625),
        (5, 5, 1.0),  # 2 * (more than half), held at 1
        (10, 0, 2 / 1024),
        (12, 3, 2 * (1 + 15 + 105 + 455) / 2**15),
        (2000, 2000, 1.0),  # far beyond what a float holds as a power
    ],
)
def test_mcnemar_exact(won: int, lost: int, p: float):
    assert statistics.mcnemar_exact(won, lost) == pytest.approx(p)


def test_bootstrap_of_certainty_is_a_point():
    correct = {"all": rights("1111"), "none": rights("000")}
    assert statistics.bootstrap_macro(correct, 500, seed=1) == (0.5, 0.5)


def test_bootstrap_agrees_with_the_normal_interval():
    # 400 questions, half right: sd = sqrt(.25 / 400) = 0.025, so 0.5 +- 1.96 * 0.025.
    low, high = statistics.bootstrap_macro({"one": rights("10" * 200)}, 20_000, seed=0)
    assert (low, high) == (pytest.approx(0.451, abs=0.003), pytest.approx(0.549, abs=0.003))
    # Two such subjects: the mean of two, sd = 0.025 / sqrt(2).
    both = {"one": rights("10" * 200), "two": rights("10" * 200)}
    low, high = statistics.bootstrap_macro(both, 20_000, seed=0)
    assert (low, high) == (pytest.approx(0.4654, abs=0.003), pytest.approx(0.5346, abs=0.003))


def test_bootstrap_is_a_function_of_its_seed():
    correct = {"one": rights("1101001"), "two": rights("011")}
    first, again, other = (statistics.bootstrap_macro(correct, 300, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_chance_interval_depends_on_sizes_only():
    # 300 questions at 1/4: sd = sqrt(.1875 / 300) = 0.025.
    low, high = statistics.chance_interval({"one": rights("1" * 300)}, 20_000, seed=0)
    assert (low, high) == (pytest.approx(0.201, abs=0.004), pytest.approx(0.299, abs=0.004))


def test_comparison_counts_won_and_lost():
    before = {"a": rights("1100"), "b": rights("1010")}
    after = {"a": rights("1111"), "b": rights("0010")}
    found = statistics.compare(before, after, 400, seed=0)
    assert (found.won, found.lost) == (2, 1)
    assert found.difference == pytest.approx((1.0 + 0.25) / 2 - 0.5)
    assert found.p == 1.0 and found.noise  # 2 * (1 + 3) / 8
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_comparison_of_equals_has_no_width():
    same = {"a": rights("1100"), "b": rights("1010")}
    assert statistics.compare(same, same, 100, seed=0).interval == (0.0, 0.0)


def test_a_paired_interval_is_narrower_than_two_separate_ones():
    # 200 questions; the models agree on all but 10, all of them won: sd = sqrt(.05 * .95 / 200) = 0.0154.
    before = {"a": rights("1" * 100 + "0" * 100)}
    after = {"a": rights("1" * 110 + "0" * 90)}
    found = statistics.compare(before, after, 20_000, seed=0)
    assert found.interval == (pytest.approx(0.02, abs=0.004), pytest.approx(0.08, abs=0.006))
    assert found.p == pytest.approx(2 / 1024) and not found.noise


def test_calibration_error_by_hand():
    # Bins (0.2, 0.3]: one wrong at 0.3: gap 0.3. (0.5, 0.6]: 0.55 right and 0.6 wrong: |0.5 - 0.575| = 0.075.
    # (0.9, 1]: 1.0 right: gap 0. Weighted: (1 * 0.3 + 2 * 0.075 + 1 * 0) / 4.
    confidence = np.array([0.3, 0.55, 0.6, 1.0])
    assert statistics.calibration_error(confidence, rights("0101")) == pytest.approx((0.3 + 0.15) / 4)


def test_confidence_is_a_share_among_the_four_letters():
    # e^-1 : e^-1 : e^-2 : e^-2, whatever the mass of the four together.
    logprobs = np.array([[-1.0, -1.0, -2.0, -2.0], [-101.0, -101.0, -102.0, -102.0]])
    expected = 1 / (2 + 2 / np.e)
    assert statistics.letter_confidence(logprobs) == pytest.approx([expected, expected])
