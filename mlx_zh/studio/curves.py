"""Curves as a chart draws them: few enough points, and smoothed."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]  # x, y

MOST_POINTS = 2000  # that a chart draws of a curve


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points in order: the first, the last, and the lowest and highest of each stretch.

    Peaks are kept, which every tenth point would not show.
    """
    if len(points) <= most or most < 4:
        return list(points)
    inner = points[1:-1]
    buckets = (most - 2) // 2
    kept = [points[0]]
    for number in range(buckets):
        bucket = inner[number * len(inner) // buckets : (number + 1) * len(inner) // buckets]
        low, high = min(bucket, key=_height), max(bucket, key=_height)
        kept += sorted({low, high})
    return [*kept, points[-1]]


def _height(point: Point) -> float:
    return point[1]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """An exponential moving average over about a twentieth of the points, and at most over 50.

    Its start is corrected for its few points, as Adam's is (https://arxiv.org/abs/1412.6980, section 3). Of fewer
    than 40 points nothing is left out: the result is the points themselves.
    """
    span = min(len(points) // 20, 50)
    if span < 2:
        return list(points)
    weight = 1 - 1 / span
    average, share, result = 0.0, 1.0, []
    for x, y in points:
        average = weight * average + (1 - weight) * y
        share *= weight
        result.append((x, average / (1 - share)))
    return result
