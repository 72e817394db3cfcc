"""PEFT's patterns mean what PEFT means by them, and no pattern takes long."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.models.adapters.patterns import read_patterns

PATH = "model.layers.11.self_attn.q_proj"


def as_peft(pattern: str, path: str) -> bool:
    """`get_pattern_key` of PEFT 0.17."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


EXPRESSIONS = st.recursive(
    st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a.]", r"\d", "1", "^", "$"]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        )
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, st.text("ab1.", max_size=8))
def test_a_pattern_matches_what_peft_matches(pattern: str, path: str):
    try:
        patterns = read_patterns({pattern: 2})
    except ValueError:
        assert pattern.count("(?:") > 2  # only repetitions within repetitions are refused
        return
    is_name = re.fullmatch(r"(?:[\w-]|\\?\.)+", pattern) is not None
    expected = as_peft(re.escape(pattern.replace("\\", "")) if is_name else pattern, path)
    assert (patterns.value(path, 1) == 2) == expected


@given(st.lists(st.text(string.ascii_lowercase + "_", min_size=1, max_size=3), min_size=1, max_size=5), st.data())
def test_a_name_is_a_path_or_its_end(parts: list[str], data):
    first = data.draw(st.integers(0, len(parts) - 1))
    name, path = ".".join(parts[first:]), ".".join(parts)
    assert read_patterns({name: 2}).value(path, 1) == 2
    assert read_patterns({name.replace(".", r"\."): 2}).value(path, 1) == 2
    assert read_patterns({"x" + name: 2}).value(path, 1) == 1


def test_the_first_pattern_counts():
    patterns = read_patterns({"k_proj": 1, r"layers\.1\d\..*": 2, "q_proj": 3, "self_attn.q_proj": 4})
    assert [patterns.value(path, 9) for path in (PATH, PATH.replace("11", "2"), "model.norm")] == [2, 3, 9]


@pytest.mark.parametrize("pattern", ["x?" * 60 + "x" * 60, "(x*)*y", "(?:x|x)*" * 20, ".*" * 150, "x{0,99}" * 40])
def test_patterns_that_python_would_match_for_years(pattern):
    """Each does a bounded number of steps: positions times parts, at most twice nested."""
    assert read_patterns({pattern: 2}).value("x" * 400 + "z", 1) == (2 if pattern.startswith(".") else 1)


@pytest.mark.parametrize(
    "pattern", ["(a", "a)", "[", r"\1", "(?=a)", "(?P<n>a)", "a**", "((a*)*)*", "a" * 300 + "|" * 200]
)
def test_patterns_that_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        read_patterns({pattern: 2})
