"""Statistics against values worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import product

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mlx_zh.exams import statistics


def rights(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text])


def test_macro_counts_subjects_and_micro_counts_questions():
    correct = {"small": rights("11"), "large": rights("10000000")}
    assert statistics.macro(correct) == pytest.approx((1 + 1 / 8) / 2)
    assert statistics.micro(correct) == pytest.approx(3 / 10)


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


def paired(won: int, lost: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The answers of two models to `size` questions; the second wins and loses so many."""
    before, after = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    after[:won] = True
    before[won : won + lost] = True
    return before, after


def exact(subjects: list[tuple[int, int, int]]) -> dict[float, float]:
    """The probability of every difference of the macro averages, from the trinomial of each subject."""
    total = sum(size for *_, size in subjects)
    whole = {Fraction(0): 1.0}
    for won, lost, size in subjects:
        added = size / total
        gain, loss = (won + added) / (size + 2 * added), (lost + added) / (size + 2 * added)
        one: Counter[Fraction] = Counter()
        for w, n in product(range(size + 1), repeat=2):
            if w + n <= size:
                ways = math.comb(size, w) * math.comb(size - w, n)
                difference = Fraction(w - n, size * len(subjects))
                one[difference] += ways * gain**w * loss**n * (1 - gain - loss) ** (size - w - n)
        both: Counter[Fraction] = Counter()
        for (a, p), (b, q) in product(whole.items(), one.items()):
            both[a + b] += p * q
        whole = both
    return {float(difference): p for difference, p in sorted(whole.items())}


@pytest.mark.parametrize(
    "subjects", [[(2, 1, 12)], [(9, 1, 30)], [(5, 0, 40)], [(3, 0, 7), (1, 2, 11)], [(2, 0, 3), (0, 1, 5), (6, 1, 9)]]
)
def test_interval_and_p_are_those_of_the_exact_distribution(subjects: list[tuple[int, int, int]]):
    pairs = {str(i): paired(*subject) for i, subject in enumerate(subjects)}
    found = statistics.compare(
        {k: b for k, (b, _) in pairs.items()}, {k: a for k, (_, a) in pairs.items()}, 40_000, 1
    )
    distribution = exact(subjects)
    below, above = (sum(p for d, p in distribution.items() if d * side >= 0) for side in (-1, 1))
    p = min(1.0, 2 * min(below, above))
    assert found.p == pytest.approx(p, abs=5 * 2 * math.sqrt(0.25 / 40_000))  # five standard errors of a tail
    cumulated = dict(zip(distribution, np.cumsum(list(distribution.values())), strict=True))
    error = 5 * math.sqrt(0.025 * 0.975 / 40_000)
    low, high = found.interval
    values = list(cumulated)
    assert cumulated[min(values, key=lambda d: abs(d - low))] >= 0.025 - error
    assert cumulated[min(values, key=lambda d: abs(d - high))] >= 0.975 - error
    assert sum(q for d, q in distribution.items() if d < low - 1e-9) <= 0.025 + error
    assert sum(q for d, q in distribution.items() if d < high - 1e-9) <= 0.975 + error


@hypothesis.given(
    st.lists(
        st.integers(1, 30).flatmap(
            lambda size: st.tuples(st.integers(0, size), st.integers(0, size), st.just(size)).filter(
                lambda one: one[0] + one[1] <= size
            )
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([1, 10, 39, 100, 1000]),
    st.integers(0, 5),
)
def test_noise_stands_beside_an_interval_with_0_and_only_there(subjects, samples: int, seed: int):
    pairs = {str(i): paired(*subject) for i, subject in enumerate(subjects)}
    before, after = ({k: pair[side] for k, pair in pairs.items()} for side in (0, 1))
    found = statistics.compare(before, after, samples, seed)
    low, high = found.interval
    assert found.noise == (low <= 0 <= high) == (found.p >= statistics.NOISE)
    assert found.noise or (low > 0) == (found.difference > 0)


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: of won + lost fair coins one side shows at most min(won, lost) times."""
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


@pytest.mark.parametrize(
    ("won", "lost"), [(1, 0), (2, 0), (3, 1), (5, 0), (6, 0), (7, 1), (9, 1), (12, 3), (10, 0), (30, 25), (70, 0)]
)
def test_one_subject_is_judged_as_mcnemar_s_exact_test_does(won: int, lost: int):
    before, after = paired(won, lost, 200)
    found = statistics.compare({"a": before}, {"a": after}, 20_000, seed=0)
    assert found.noise == (mcnemar(won, lost) >= 0.05)


def test_two_questions_prove_nothing():
    before, after = paired(2, 0, 2)
    assert statistics.compare({"a": before}, {"a": after}, 1000, seed=0).noise


def test_comparison_counts_won_and_lost():
    before = {"a": rights("1100"), "b": rights("1010")}
    after = {"a": rights("1111"), "b": rights("0010")}
    found = statistics.compare(before, after, 400, seed=0)
    assert (found.won, found.lost) == (2, 1)
    assert found.difference == pytest.approx((1.0 + 0.25) / 2 - 0.5)
    assert found.noise
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_comparison_of_equals_has_no_width():
    same = {"a": rights("1100"), "b": rights("1010")}
    assert statistics.compare(same, same, 100, seed=0).interval == (0.0, 0.0)


def test_a_paired_interval_is_narrower_than_two_separate_ones():
    # 200 questions; the models agree on all but 10, all of them won. With one more of each, won is 11 / 202 and lost
    # 1 / 202: mean 10 / 202 = 0.0495, sd = sqrt((12 / 202 - 0.0495^2) / 200) = 0.0169, so about 0.0164 to 0.0826.
    before = {"a": rights("1" * 100 + "0" * 100)}
    after = {"a": rights("1" * 110 + "0" * 90)}
    found = statistics.compare(before, after, 20_000, seed=0)
    assert found.interval == (pytest.approx(0.0164, abs=0.005), pytest.approx(0.0826, abs=0.005))
    assert found.p < 0.01 and not found.noise


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
