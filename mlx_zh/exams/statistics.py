"""What a score means: confidence intervals, paired comparisons, calibration. Pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypedDict

import numpy as np
import numpy.typing as npt

Booleans = npt.NDArray[np.bool_]
Interval = tuple[float, float]

LEVEL = 0.95  # of the intervals
NOISE = 0.05  # p of a difference whose interval ends at 0: 1 - LEVEL


def macro(correct: Mapping[str, Booleans]) -> float:
    """The mean over subjects of their accuracies: what C-Eval and CMMLU report."""
    return float(np.mean([subject.mean() for subject in correct.values()]))


def micro(correct: Mapping[str, Booleans]) -> float:
    """The share of right answers among all questions."""
    return float(np.concatenate(list(correct.values())).mean())


def bootstrap_macro(correct: Mapping[str, Booleans], samples: int, seed: int) -> Interval:
    """Percentile bootstrap interval of `macro`; questions are resampled within each subject (stratified).

    Of n questions with k right answers, a resample has Binomial(n, k / n) right answers, which is drawn directly.
    """
    return _simulated_macro([(len(s), float(s.mean())) for s in correct.values()], samples, seed)


def chance_interval(correct: Mapping[str, Booleans], samples: int, seed: int, chance: float = 0.25) -> Interval:
    """The interval of `macro` for someone who guesses and is right with probability `chance`."""
    return _simulated_macro([(len(s), chance) for s in correct.values()], samples, seed)


def _simulated_macro(subjects: Sequence[tuple[int, float]], samples: int, seed: int) -> Interval:
    generator = np.random.default_rng(seed)
    drawn = [generator.binomial(size, rate, samples) / size for size, rate in subjects]  # each (samples,)
    return _percentiles(np.mean(drawn, axis=0))


def _percentiles(values: npt.NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class ComparisonFigures(TypedDict):
    """A `Comparison` as plain values."""

    difference: float
    interval: Interval  # a list in JSON
    won: int
    lost: int
    p: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model against another on the same questions."""

    difference: float  # of the macro averages, fractions of 1
    interval: Interval  # of the difference: 95 %, see `compare`
    won: int  # questions that only this model answers right
    lost: int  # questions that only the other model answers right
    p: float  # two-sided, of the same draws as the interval

    @property
    def noise(self) -> bool:
        """Whether 0 is inside the interval, which is the case where p is `NOISE` or more."""
        return self.interval[0] <= 0 <= self.interval[1]

    def as_dict(self) -> ComparisonFigures:
        """Plain values."""
        return {
            "difference": self.difference,
            "interval": self.interval,
            "won": self.won,
            "lost": self.lost,
            "p": self.p,
        }


def compare(before: Mapping[str, Booleans], after: Mapping[str, Booleans], samples: int, seed: int) -> Comparison:
    """`after` against `before`, which must have the same subjects, and the same questions in the same order.

    Interval and p are of one statistic, the difference of the macro averages, and of the same `samples` draws of a
    paired bootstrap that is stratified by subject. Before drawing, one question won and one lost are added, shared
    out among the subjects by their sizes (Bonett and Price 2012, J. Educ. Behav. Stat. 37(4)): the plain bootstrap
    takes two questions, both won, for a certain gain. For one subject p is then close to McNemar's exact test.
    """
    won = {key: int((after[key] & ~before[key]).sum()) for key in before}
    lost = {key: int((before[key] & ~after[key]).sum()) for key in before}
    total = sum(map(len, before.values()))
    generator = np.random.default_rng(seed)
    drawn = []
    for key, subject in before.items():
        size = len(subject)
        added = size / total  # of one question won and one lost
        rates = [(won[key] + added) / (size + 2 * added), (lost[key] + added) / (size + 2 * added)]
        counts = generator.multinomial(size, [*rates, max(0.0, 1 - sum(rates))], samples)  # (samples, 3)
        drawn.append((counts[:, 0] - counts[:, 1]) / size)
    differ = any(won.values()) or any(lost.values())
    interval, p = _interval_and_p(np.mean(drawn, axis=0)) if differ else ((0.0, 0.0), 1.0)
    return Comparison(macro(after) - macro(before), interval, sum(won.values()), sum(lost.values()), p)


def _interval_and_p(drawn: npt.NDArray[np.float64]) -> tuple[Interval, float]:
    """The percentile interval of draws (samples,), and the two-sided p; it is below `NOISE` where 0 is outside.

    Of n draws, k of them at 0 or below, p is 2 (k + 1) / (n + 1), or that of the other side where it is smaller. So p
    is at least `NOISE` from the `tail`-th draw on, which is the end of the interval.
    """
    ordered = np.sort(np.round(drawn, 12))  # rounded, because sums of fractions miss 0 by a rounding error
    samples = len(ordered)
    tail = next(k for k in range(samples + 1) if 2 * (k + 1) / (samples + 1) >= NOISE)
    interval = (float(ordered[tail - 1]), float(ordered[samples - tail])) if tail else (-1.0, 1.0)
    fewer = min(int((ordered <= 0).sum()), int((ordered >= 0).sum()))
    return interval, min(1.0, 2 * (fewer + 1) / (samples + 1))


def wilson(successes: float, trials: int) -> Interval:
    """The Wilson score interval of a rate, 95 % (Wilson 1927, J. Am. Stat. Assoc. 22(158)); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    rate, weight = successes / trials, z * z / trials
    centre = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / trials + weight / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration_error(confidence: npt.NDArray[np.float64], correct: Booleans, bins: int = 10) -> float:
    """Expected calibration error (arXiv:1706.04599, eq. 3): |accuracy - confidence| in bins of equal width, averaged
    by their sizes. `confidence` and `correct` are (N,)."""
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (N,)
    gaps = [
        abs(float(correct[bin_of == b].mean()) - float(confidence[bin_of == b].mean())) * int((bin_of == b).sum())
        for b in range(bins)
        if (bin_of == b).any()
    ]
    return float(sum(gaps) / len(confidence))


def letter_confidence(logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The chosen letter's probability among the four, (N,), from log-probs (N, 4)."""
    shifted = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    return np.asarray(1 / shifted.sum(axis=1))


def holm(p: Sequence[float]) -> list[float]:
    """p of several tests, adjusted so that one false alarm among all is at most as likely as in one test (Holm 1979,
    Scand. J. Stat. 6(2)): the k-th smallest of n is multiplied by n - k + 1, and none is below a smaller one."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted
