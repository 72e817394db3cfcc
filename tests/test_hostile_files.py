"""1 MB of anything costs little: processor time within a wide limit, and memory."""

from __future__ import annotations

import math

import hostile
import pytest


@pytest.mark.parametrize("name", hostile.CASES)
def test_a_small_file_costs_little(name: str):
    """Without their bounds most of these take gigabytes, or minutes: `hostile.SECONDS` of processor time end them."""
    result = hostile.measured(name)
    assert math.isfinite(result["seconds"]), result["end"]
    assert result["megabytes"] < 300
    assert result["end"] == "read" or result["end"].endswith("Error")
