"""Which rows a method puts first, and how a count is shared among sources."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.corpus.selecting import METHODS, Candidates, ordered, quotas
from mlx_zh.system.splitmix import mix64

METHOD_SETS = [(name,) for name in METHODS] + [("diverse", "ifd"), ("diverse", "longest"), ("longest", "ifd")]


def candidates(ifd: list[float], longest: list[float], clusters: list[int]) -> Candidates:
    hashes = mix64(np.arange(len(ifd), dtype=np.uint64))
    scores = {"ifd": np.array(ifd, np.float32), "longest": np.array(longest, np.float32)}
    return Candidates(hashes, np.array(clusters), scores)


def order(methods: tuple[str, ...], rows: Candidates) -> list[int]:
    kept = {name: scores for name, scores in rows.scores.items() if name in methods}
    own = Candidates(rows.hashes, rows.clusters, kept)
    return ordered(own, np.arange(len(rows.hashes)), methods, seed=1).tolist()


ROWS = candidates([0.5, 0.9, 1.2, 0.7, 1.0, np.nan, 0.8], [1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 1, 1])


def test_the_highest_ifd_below_one_comes_first():
    """Rows 2 and 4 have an IFD of 1 or more and row 5 has none: the paper drops such rows."""
    assert order(("ifd",), ROWS) == [1, 6, 3, 0]


def test_the_longest_reply_comes_first():
    assert order(("longest",), ROWS) == [6, 5, 4, 3, 2, 1, 0]


def test_clusters_take_turns_each_with_its_best_row():
    """Cluster 0 has rows 1, 3, 0 in this order, and cluster 1 has row 6: 1 (0.9) and 6 (0.8), then 3, then 0."""
    assert order(("diverse", "ifd"), ROWS) == [1, 6, 3, 0]
    assert order(("diverse", "longest"), ROWS) == [6, 3, 5, 2, 4, 1, 0]


def test_every_row_of_a_small_cluster_comes_before_the_rest_of_a_large_one():
    rows = candidates([0.5] * 50, [1.0] * 50, [0] * 45 + [1] * 5)
    assert set(range(45, 50)) < set(order(("diverse",), rows)[:10])


def test_equal_scores_are_ordered_by_the_hash_and_not_by_the_place():
    rows = candidates([0.5] * 40, [1.0] * 40, [0] * 40)
    first = order(("longest",), rows)
    assert sorted(first) == list(range(40)) and first != list(range(40))
    shuffled = np.random.default_rng(0).permutation(40)
    moved = Candidates(rows.hashes[shuffled], None, {"longest": np.ones(40, np.float32)})
    again = ordered(moved, np.arange(40), ("longest",), seed=1)
    assert shuffled[again].tolist() == first


@pytest.mark.parametrize("methods", [("random",), ("longest",), ("ifd",)])
@given(scores=st.lists(st.sampled_from([0.1, 0.5, 0.9, 1.1]), min_size=2, max_size=60), kept=st.integers(1, 59))
def test_a_set_that_grows_keeps_its_order(methods: tuple[str, ...], scores: list[float], kept: int):
    """The order of the earlier rows among themselves is what it was before the others were added."""
    kept = min(kept, len(scores))
    whole = order(methods, candidates(scores, scores, [0] * len(scores)))
    before = order(methods, candidates(scores[:kept], scores[:kept], [0] * kept))
    assert [row for row in whole if row < kept] == before


@pytest.mark.parametrize("methods", METHOD_SETS)
def test_an_order_has_every_eligible_row_once(methods: tuple[str, ...]):
    eligible = {0, 1, 3, 6} if "ifd" in methods else set(range(7))
    assert sorted(order(methods, ROWS)) == sorted(eligible)


@given(wanted=st.integers(0, 200), sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_count_is_shared_in_proportion(wanted: int, sizes: list[int]):
    shares = quotas(wanted, sizes)
    assert sum(shares) == min(wanted, sum(sizes))
    for share, size in zip(shares, sizes, strict=True):
        assert share <= size
        if wanted < sum(sizes):
            assert abs(share - wanted * size / sum(sizes)) < 1


def test_shares_by_hand():
    """10 of 60 and 30 are 6.67 and 3.33 rows: 6 and 3, and the row that is left goes to the larger remainder."""
    assert quotas(10, [60, 30]) == [7, 3]
