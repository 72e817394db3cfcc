"""The version of the numbers that training and exams compute.

A change that moves losses, gradients or log-probs by more than the rounding of their float32 gets a new version. A
run is not finished with other numbers than it was begun with, and stored log-probs of another version are not used.
"""

from __future__ import annotations

from mlx_zh.system import device

# Version -> the back ends whose numbers it changed. Version 1 is that of mlx-zh 0.2.0, which wrote no version.
CHANGES: dict[int, frozenset[str]] = {
    # Sums over the vocabulary and over all gradients are made in groups (`core.sums`). Before, log-probs were up to
    # 3e-4 nats too high, and the gradient norm of full fine-tuning was up to 3 % too small.
    2: frozenset({"cpu"}),
}


def version() -> int:
    """The newest version that changed the numbers of this back end."""
    return max((number for number, back_ends in CHANGES.items() if device.back_end() in back_ends), default=1)


def recorded() -> dict[str, int]:
    """What a record of results says of the numbers. It is empty for version 1, as in records of mlx-zh 0.2.0."""
    return {"numbers": version()} if version() > 1 else {}
