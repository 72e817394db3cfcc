"""Going back in a cache with recurrent layers, whose state after fewer tokens cannot be had from a later one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

# The end of a prompt that a later turn may write in another way: a template opens the reply, and with some models
# the thinking, and leaves both out of earlier turns. So many tokens before the end, the state is kept.
REPLY_START = 16


@dataclass(frozen=True)
class Snapshot:
    """The states of the recurrent layers after `tokens`, and None for layers with keys, which can be trimmed."""

    tokens: tuple[int, ...]
    states: tuple[list[mx.array] | None, ...]


def is_recurrent(cache: Sequence[Any]) -> bool:
    """Whether some layers are recurrent and all others can be trimmed."""
    from mlx_lm.models.cache import ArraysCache, KVCache

    kinds = {type(layer) for layer in cache}
    return ArraysCache in kinds and kinds <= {ArraysCache, KVCache}


def snapshot(cache: Sequence[Any], tokens: Sequence[int]) -> Snapshot:
    """What it takes to come back to these tokens, which are those in the cache."""
    from mlx_lm.models.cache import ArraysCache

    states = (list(layer.cache) if isinstance(layer, ArraysCache) else None for layer in cache)
    return Snapshot(tuple(tokens), tuple(states))


def restore(cache: Sequence[Any], kept: Snapshot) -> None:
    """Bring the cache back to the tokens of `kept`, with which those in it begin."""
    for layer, state in zip(cache, kept.states, strict=True):
        if state is None:
            layer.trim(layer.offset - len(kept.tokens))
        else:
            layer.cache = list(state)
