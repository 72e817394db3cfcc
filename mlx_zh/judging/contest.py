"""Two models' answers to the same prompts: who wins how often, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mlx_zh.corpus.samples import Sampled
from mlx_zh.exams.statistics import Interval, wilson
from mlx_zh.judging.verdicts import PromptVerdict


def matched(first: Iterable[Sampled], second: Iterable[Sampled]) -> list[Sampled]:
    """The prompts that both models answered, each with the first answer of the first and of the second model."""
    others = {sampled.id: sampled for sampled in second if sampled.answers}
    return [
        Sampled(one.id, one.prompt, one.reference, (one.answers[0], others[one.id].answers[0]))
        for one in sorted(first, key=lambda sampled: sampled.id)
        if one.answers and one.id in others
    ]


@dataclass(frozen=True, slots=True)
class Contest:
    """The second model against the first. Ties are prompts where neither answer was better."""

    won: int
    tied: int
    lost: int
    refused: int = 0  # prompts that the judge refused; they are in none of the others

    @staticmethod
    def of(samples: Sequence[Sampled], verdicts: Mapping[str, PromptVerdict]) -> Contest:
        """The count over matched prompts that have a verdict."""
        decided = [verdicts[one.id] for one in samples if one.id in verdicts]
        skipped = [v.refused or (v.vote is not None and v.vote[2] == "skip") for v in decided]
        winners = [verdict.better(0, 1) for verdict, skip in zip(decided, skipped, strict=True) if not skip]
        return Contest(winners.count(1), winners.count(None), winners.count(0), sum(v.refused for v in decided))

    @staticmethod
    def by_scores(before: Mapping[str, PromptVerdict], after: Mapping[str, PromptVerdict]) -> Contest:
        """The count over the prompts of both: each is won by the higher mean score of all its answers."""
        means = [[fmean(v.scores) for v in (before[id], after[id])] for id in before.keys() & after.keys()]
        won, lost = sum(one < other for one, other in means), sum(one > other for one, other in means)
        return Contest(won, len(means) - won - lost, lost)

    @property
    def win_rate(self) -> float | None:
        """The share of prompts won among those that were no tie; None where all were."""
        decided = self.won + self.lost
        return self.won / decided if decided else None

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the win rate, (0, 1) where all prompts were ties."""
        return wilson(self.won, self.won + self.lost)

    @property
    def noise(self) -> bool:
        """Whether the interval holds 1/2: the models may be equally good."""
        low, high = self.interval
        return low <= 0.5 <= high

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        counts = {"won": self.won, "tied": self.tied, "lost": self.lost, "refused": self.refused}
        return {**counts, "win_rate": self.win_rate, "interval": list(self.interval), "noise": self.noise}
