"""What must be the same on every rank before any works: versions of packages, and what decides who waits for whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlx_zh.stages.run_folder import package_versions

if TYPE_CHECKING:
    from mlx_zh.distributed.world import World
    from mlx_zh.recipe import Recipe

_READING = ("datasets",)  # what these packages read is compared later, by its digest


def require(world: World, recipe: Recipe, command: str, options: Mapping[str, object]) -> None:
    """Raise DistributedError on every rank if versions, budget or options of the command line differ."""
    versions = {name: version for name, version in package_versions().items() if name not in _READING}
    values = {"command": command, **versions, "budget": recipe.budget, **options}
    world.agree(values, differences, "Give every machine the same versions, recipe and options.")


def differences(first: Mapping[str, object], other: Mapping[str, object]) -> str:
    """The values that differ, as `mlx 0.31.0 -> 0.30.0`; empty if none does."""
    named = [
        f"{key} {first.get(key)} -> {other.get(key)}"
        for key in {**first, **other}
        if first.get(key) != other.get(key)
    ]
    return "; ".join(named)
