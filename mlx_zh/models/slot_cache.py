"""A key-value cache for rows that are at different positions, each in a slot of its own.

The keys of a row begin at index 0 of its slot, and what follows them is masked. So a row that enters or leaves moves
no other row, and its sums have the same terms in the same order whatever the other rows are. (mlx-lm's batch caches
are aligned on the right: there a long row shifts the keys of every shorter one.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

_STEP = 256  # tokens by which the slots grow


class SlotCache:
    """Keys and values of one layer, (rows, heads, capacity, size). All layers of a model share the positions.

    It has the methods of mlx-lm's caches that a model calls in its forward pass. `offset` (rows,) is the position of
    the token that each row computes now, and `length` the number of keys that attention looks at.
    """

    def __init__(self, rows: int) -> None:
        self._rows = mx.arange(rows)
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = mx.zeros((rows,), mx.int32)
        self.length = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store one key and one value, (rows, heads, 1, size), of each row at its position; returns all of them."""
        assert self.keys is not None and self.values is not None
        self.keys[self._rows, :, self.offset] = keys[:, :, 0]
        self.values[self._rows, :, self.offset] = values[:, :, 0]
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def make_mask(self, _count: int, *, window_size: int | None = None, **_: Any) -> mx.array:
        """Which keys each row sees, (rows, 1, 1, length): those up to its own, of the last `window_size` if given."""
        indices, position = mx.arange(self.length)[None], self.offset[:, None]
        seen = indices <= position
        if window_size is not None:
            seen = seen & (indices > position - window_size)
        return seen[:, None, None]

    def fill(self, slots: Sequence[int], keys: mx.array, values: mx.array) -> None:
        """Begin the rows `slots` with the keys and values of one prompt, (1, heads, tokens, size)."""
        tokens = keys.shape[2]
        self.reserve(tokens, keys, values)
        assert self.keys is not None and self.values is not None
        for slot in slots:
            self.keys[slot, :, :tokens] = keys[0]
            self.values[slot, :, :tokens] = values[0]

    def reserve(self, tokens: int, keys: mx.array | None = None, values: mx.array | None = None) -> None:
        """Make room for `tokens` tokens in each slot; the first time, `keys` and `values` give shape and type."""
        keys, values = self.keys if keys is None else keys, self.values if values is None else values
        assert keys is not None and values is not None
        here = 0 if self.keys is None else self.keys.shape[2]
        if tokens <= here:
            return
        capacity = -(-tokens // _STEP) * _STEP
        self.keys, self.values = (
            _grown(old, like, self._rows.size, capacity - here)
            for old, like in ((self.keys, keys), (self.values, values))
        )

    def keep(self, slots: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        chosen = mx.array(list(slots))
        self._rows = mx.arange(len(slots))
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[chosen], self.values[chosen]

    @property
    def state(self) -> list[mx.array]:
        """The arrays, to be evaluated."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]


class StateSlots(ArraysCache):
    """What the rows of a recurrent layer keep: arrays of which each row has one slice."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__(size)
        self._rows = rows

    def fill(self, slots: Sequence[int], *arrays: mx.array) -> None:
        """Begin the rows `slots` with the arrays (1, …) that one prompt left behind."""
        chosen = mx.array(list(slots))
        for index, array in enumerate(arrays):
            here = self.cache[index]
            if here is None:
                here = mx.zeros((self._rows, *array.shape[1:]), array.dtype)
            here[chosen] = array
            self.cache[index] = here

    def reserve(self, _tokens: int) -> None:
        """A state is as large after any number of tokens."""

    def keep(self, slots: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self._rows = len(slots)
        self.filter(mx.array(list(slots)))


def _grown(old: mx.array | None, like: mx.array, rows: int, more: int) -> mx.array:
    new = mx.zeros((rows, like.shape[1], more, like.shape[3]), like.dtype)
    return new if old is None else mx.concatenate([old, new], axis=2)
