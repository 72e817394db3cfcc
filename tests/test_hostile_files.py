"""1 MB of anything costs little: processor time within a wide limit, and memory."""

from __future__ import annotations

from collections.abc import Iterator

import hostile
import pytest


@pytest.fixture(scope="module")
def measurer() -> Iterator[hostile.Measurer]:
    with hostile.Measurer() as measurer:
        yield measurer


@pytest.mark.parametrize("name", [name for name in hostile.CASES if name not in hostile.LONG])
def test_a_small_file_costs_little(name: str, measurer: hostile.Measurer):
    """Without their bounds most of these take gigabytes, or minutes: `hostile.SECONDS` of processor time end them."""
    result = measurer.measure(name)
    assert result["megabytes"] < 300, result["end"]
    assert hostile.is_expected(name, result["end"]), result["end"]
