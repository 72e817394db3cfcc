"""The rules that find faults in an answer: the table's own examples, and what they make of a whole prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.samples import Sampled, SampledAnswer
from mlx_zh.errors import RecipeError
from mlx_zh.judging.rules import Settings, faults, key, right, rules, score

EXAMPLES = [(rule.name, example) for rule in rules()[1] for example in rule.examples]


def _asked(prompt: str, reference: str | None = None) -> Sampled:
    return Sampled("0" * 16, (Message("user", prompt),), reference, ())


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_the_examples_of_the_table(name: str, example: Mapping[str, Any]):
    sampled = _asked(example["prompt"], example.get("reference"))
    answer = SampledAnswer(example["answer"], example.get("finish", "stop"), 1, 1)
    found = faults(sampled, answer, Settings(**example.get("settings", {})))
    assert (name in found) == example["fault"]


def test_every_rule_has_an_answer_with_its_fault_and_one_without():
    for rule in rules()[1]:
        assert {example["fault"] for example in rule.examples} == {True, False}


def test_a_score_adds_the_penalties():
    # wrong: 1, cut off: 1/2
    assert score(["answer", "truncated"]) == -1.5
    assert score([]) == 0


def test_a_solution_without_number_or_letter_decides_nothing():
    assert right(_asked("那条河叫什么？", "月河"), "清河") is None
    assert right(_asked("3+4=?"), "7") is None
    # A letter decides only where the prompt has choices.
    assert right(_asked("哪个选项？", "A"), "B") is None


def test_options_count_with_their_texts():
    sampled = _asked("首都是？\nA. 上海\nB. 北京\nC. 广州\nD. 深圳", "B")
    assert right(sampled, "北京") is True
    assert right(sampled, "上海") is False


def test_the_system_message_may_name_another_language():
    english = "West Lake is a lake in the city of Hangzhou that is known for its beauty."
    prompt = (Message("system", "Always answer in English."), Message("user", "请介绍一下杭州的西湖。"))
    assert faults(Sampled("0" * 16, prompt, None, ()), SampledAnswer(english, "stop", 1, 1), Settings()) == []


def test_other_settings_have_another_key():
    assert len({key(Settings()), key(Settings(longest=10)), key(Settings(format="json"))}) == 3


@pytest.mark.parametrize("pattern", ["(", "[a", "*"])
def test_a_format_that_is_no_expression_is_refused(pattern: str):
    with pytest.raises(RecipeError, match="--format"):
        Settings(format=pattern)
