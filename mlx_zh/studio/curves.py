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


def smoothed(points: Sequence[Point], weight: float = 0.9) -> list[Point]:
    """An exponential moving average whose start is corrected for its few points, as Adam's is.

    Adam: https://arxiv.org/abs/1412.6980, section 3.
    """
    average, share, result = 0.0, 1.0, []
    for x, y in points:
        average = weight * average + (1 - weight) * y
        share *= weight
        result.append((x, average / (1 - share)))
    return result
