"""Where a model's arrays are, so that many can be exchanged without walking through trees of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Place = tuple[Any, Any]  # the module, dict or list that holds an array, and its name or number there


def place_of(module: nn.Module, name: str) -> Place:
    """The place of the array with a dotted `name`. Raises KeyError or IndexError if there is none."""
    *path, last = name.split(".")
    holder: Any = module
    for part in path:
        holder = holder[_key(holder, part)]
    key = _key(holder, last)
    if not isinstance(holder[key], mx.array):
        raise KeyError(name)
    return holder, key


def _key(holder: Any, part: str) -> Any:
    return int(part) if isinstance(holder, list) else part


def trained_places(module: nn.Module) -> list[Place]:
    """The places of a module's trained arrays, in the order of its `trainable_parameters`."""
    places: list[Place] = []
    _add_trained(places, module)
    return places


def _add_trained(places: list[Place], holder: Any) -> None:
    items: Iterable[tuple[Any, Any]] = enumerate(holder) if isinstance(holder, list) else holder.items()
    if isinstance(holder, nn.Module):
        frozen = holder._no_grad
        items = [(key, value) for key, value in items if key not in frozen and not key.startswith("_")]
    for key, value in items:
        if isinstance(value, mx.array):
            places.append((holder, key))
        elif isinstance(value, dict | list):
            _add_trained(places, value)


def put(places: Sequence[Place], arrays: Sequence[mx.array]) -> None:
    """Put each array in its place."""
    for (holder, key), array in zip(places, arrays, strict=True):
        holder[key] = array
