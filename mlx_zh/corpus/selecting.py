"""Which training rows are worth learning from: orders of rows by content, length and a model's scores.

Every method is a total order of the rows of a group (a source, or all sources), of which the first are kept. Ties are
broken by a seeded hash of a row's text. So a larger count keeps the rows of a smaller one, and rows that are added to
a set leave the order of the others by `random`, `longest` and `ifd` as it was.

`longest`: arXiv 2402.04833. `ifd`: arXiv 2308.12032, equation 3; rows whose question makes the reply less likely (a
ratio of 1 or more) are dropped, and of the others the highest ratios come first. `diverse`: one row of each cluster
after another; the clusters are those of `corpus.clusters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mlx_zh.system.splitmix import mix64

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
SCORES = ("longest", "ifd")  # methods that give each row a score, the highest first
METHODS = ("random", "diverse", *SCORES)


@dataclass(frozen=True)
class SelectSettings:
    """Which rows are selected, and how many: `count` rows or `fraction` of them; all that are eligible with neither.

    `model` is a digest of the model that scores, and of how it reads rows; empty without a score by a model.
    """

    methods: tuple[str, ...]
    count: int | None = None
    fraction: float | None = None
    per_source: bool = True  # every source keeps its share of the rows
    model: str = ""


@dataclass(frozen=True)
class Candidates:
    """The N rows among which is chosen."""

    hashes: npt.NDArray[np.uint64]  # (N,) of the rows' texts
    clusters: Indices | None = None  # (N,) for `diverse`
    scores: dict[str, Floats] = field(default_factory=dict)  # by method: (N,); NaN for a row without one

    def eligible(self) -> npt.NDArray[np.bool_]:
        """Whether each row (N,) can be selected: it has its scores, and an IFD below 1."""
        able = np.ones(len(self.hashes), dtype=bool)
        for name, scores in self.scores.items():
            able &= scores < 1 if name == "ifd" else np.isfinite(scores)  # NaN is not below 1
        return able


def ordered(candidates: Candidates, group: Indices, methods: Sequence[str], seed: int) -> Indices:
    """The eligible rows of `group` (G,), the first to be kept in front."""
    rows = group[candidates.eligible()[group]]
    ties = mix64(candidates.hashes[rows] ^ mix64(np.array([seed], dtype=np.uint64)))
    score = _score([candidates.scores[name][rows] for name in methods if name in SCORES], len(rows))
    best_first = np.lexsort((rows, ties, -score))
    if "diverse" not in methods:
        return rows[best_first]
    assert candidates.clusters is not None
    rows, ties, score = rows[best_first], ties[best_first], score[best_first]
    turn = _rank_in(candidates.clusters[rows])
    return rows[np.lexsort((rows, ties, -score, turn))]


def _score(scores: Sequence[Floats], count: int) -> npt.NDArray[np.float64]:
    """One score a row (count,): the only one, the mean rank of several, or 0 without any."""
    if len(scores) < 2:
        return scores[0].astype(np.float64) if scores else np.zeros(count)
    ranks = [np.searchsorted(np.sort(values), values) for values in scores]
    return np.mean(ranks, axis=0)


def _rank_in(clusters: Indices) -> Indices:
    """How many earlier rows each row's cluster has, (R,)."""
    order = np.argsort(clusters, kind="stable")
    sorted_clusters = clusters[order]
    first = np.searchsorted(sorted_clusters, sorted_clusters)
    ranks = np.empty(len(clusters), dtype=np.int64)
    ranks[order] = np.arange(len(clusters)) - first
    return ranks


def quotas(wanted: int, sizes: Sequence[int]) -> list[int]:
    """`wanted` shared among groups in proportion to their `sizes`, by the largest remainders; none gets more rows
    than it has."""
    total = sum(sizes)
    if wanted >= total:
        return list(sizes)
    exact = [wanted * size / total for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: wanted - sum(shares)]:
        shares[i] += 1
    return shares
