"""Values that users' files may hold: right ones, nearly right ones, and any."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

texts = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\n\n", "\ud800", "<|im_end|>", "a" * 300, "你好", "\x00", "\x1b[2J"]
)
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([10**400, -1, 0, 2**31, 2**63, 2**64, 1e308, float("nan"), float("inf")])
)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


def rows(columns: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these columns, each with a fitting value or with any."""
    return st.fixed_dictionaries({}, optional={name: fitting | values for name, fitting in columns.items()})


def as_json(value: Any) -> str:
    """JSON, of what no JSON can say too (NaN, half a surrogate pair as an escape)."""
    return json.dumps(value)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file with a few bytes changed, taken out or put in, perhaps cut short."""
    position = st.integers(0, max(len(whole) - 1, 0))
    change = st.tuples(position, st.integers(0, 8), st.binary(max_size=8))

    def apply(changes: list[tuple[int, int, bytes]], end: int) -> bytes:
        data = bytearray(whole)
        for at, size, put in changes:
            data[at : at + size] = put
        return bytes(data[:end]) if end < len(whole) // 2 else bytes(data)

    return st.builds(apply, st.lists(change, min_size=1, max_size=4), st.integers(0, len(whole)))
