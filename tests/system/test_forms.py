"""The form of JSON values that are read from files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.exams.answers import Answer
from mlx_zh.pipeline.state import Record
from mlx_zh.stages.budgeting import BudgetRecord
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import parse_json
from mlx_zh.training.metrics import MetricsLine

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ANSWER = Answer("law", "0", "A", None, (-1.0, -2.0), 0.5, 12, False).as_dict()


class Pair(TypedDict):
    first: int
    second: list[str] | None


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (1, float, True),
        (1.5, int, False),
        (True, int, False),
        (True, float, False),
        (True, bool, True),
        (None, int | None, True),
        ("a", Literal["a", 1], True),
        (1, Literal["a", 1], True),
        (True, Literal["a", 1], False),
        ("b", Literal["a", 1], False),
        ("字", int | None, False),
        ([1, 2.5], list[float], True),
        ([1, "2"], list[float], False),
        ({"a": [1]}, dict[str, list[int]], True),
        ({"a": 1}, dict[str, list[int]], False),
        ({"first": 1, "second": None, "more": 0}, Pair, True),
        ({"first": 1}, Pair, False),
        ({"first": 1, "second": [1]}, Pair, False),
        ({"inputs": {"x": []}}, Record, True),
        ({"inputs": {}, "more": 0}, Record, False),
        ({"outputs": None}, Record, False),
        ({"step": 1, "epoch": 0.5, "loss": 2.0}, MetricsLine, True),
        ({"step": 1, "epoch": 0.5, "loss": None}, MetricsLine, False),
        ({"epoch": 0.5}, MetricsLine, False),
        (ANSWER, Answer, True),
        ({}, BudgetRecord, False),
    ],
)
def test_a_value_fits_a_form_or_not(value: Any, form: Any, expected: bool) -> None:
    assert fits(value, form) is expected


@given(JSON)
def test_any_value_has_an_answer(value: Any) -> None:
    for form in (int, str, list[int], dict[str, Pair], Pair, Record, Answer, BudgetRecord, MetricsLine):
        assert not fits(value, form) or isinstance(value, int | str | list | dict)


@given(st.sampled_from(sorted(ANSWER)), JSON)
def test_an_answer_is_read_back_as_it_was_or_is_a_type_error(name: str, value: Any) -> None:
    fields = ANSWER | {name: value}
    try:
        answer = Answer.of(fields)
    except TypeError:
        return
    stored = answer.as_dict()[name]
    assert stored == (tuple(value) if isinstance(value, list) else value) or value != value
    hash((answer.subject, answer.truth, answer.choice))


def test_a_record_of_a_step_is_read_back() -> None:
    record = Record({"seed": 0}, {"sft/summary.json": "0"}, 1.0, None, 0.5)
    assert fits(asdict(record), Record)


def test_a_whole_number_that_no_float_can_hold_is_refused() -> None:
    assert parse_json("9" * 308) == int("9" * 308)
    with pytest.raises(ValueError, match="309 digits"):
        parse_json(f"[{'9' * 309}]")
