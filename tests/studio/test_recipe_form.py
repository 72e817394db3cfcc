"""The form is the recipe's: every key, with its kind, limits, default and an explanation in both languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_zh.errors import RecipeError
from mlx_zh.language.catalogue import read
from mlx_zh.recipe import Recipe
from mlx_zh.recipe_text.values import compose, inline
from mlx_zh.studio.recipe_check import check_recipe
from mlx_zh.studio.recipe_form import ASKED, FIRST, about_code, fields
from mlx_zh.studio.yaml_edit import with_value

BASE = "name: one\nmodel:\n  path: smollm2-135m-instruct\n"


def test_every_key_of_a_recipe_has_a_field_and_an_explanation() -> None:
    listed = fields()
    recipe = Recipe.model_validate({"name": "one", "model": {"path": "x"}, "rounds": {}})
    values = recipe.model_dump(mode="json", by_alias=True)
    sections = {"data.registry", "data.variables", "evaluate.folder"}  # their keys are the user's

    def leaves(section: dict[str, Any], prefix: str) -> set[str]:
        keys: set[str] = set()
        for name, value in section.items():
            key = f"{prefix}{name}"
            keys |= leaves(value, f"{key}.") if isinstance(value, dict) and key not in sections else {key}
        return keys

    shown = leaves(values, "")
    assert shown - set(listed) <= {"model.quantize", "data.sft.select", "data.dpo.select"}  # sections that are absent
    assert {*ASKED, *FIRST} <= set(listed)
    codes = {about_code(key) for key in listed}
    assert codes == set(read("keys"))  # none is missing, none is stale


def test_kinds_limits_and_defaults_are_those_of_the_types() -> None:
    listed = fields()
    assert listed["sft.learning_rate"].kind == "number" and listed["sft.learning_rate"].default == 1e-4
    assert listed["dpo.learning_rate"].default == 5e-6
    assert listed["data.validation_fraction"].limits == "≥ 0, ≤ 0.5"
    assert listed["sft.epochs"].limits == "> 0"
    assert listed["model.quantize.bits"].choices == (2, 3, 4, 5, 6, 8)
    assert listed["evaluate.split"].choices == (None, "val", "test")
    assert listed["lora.rslora"].kind == "switch"
    assert "export.from" in listed  # by the name that recipes use
    assert listed["sft.epochs"].about("zh").startswith("每行学习几遍")


@pytest.mark.parametrize("key", sorted(set(fields()) - {"name", "model.path"}))
def test_each_default_can_be_written_and_is_taken(key: str) -> None:
    """A field that shows its default, and is then left as it is, gives a recipe that is the same."""
    field = fields()[key]
    if key.startswith(("rounds.", "model.quantize.")) or ".select." in key:
        return  # writing one makes the section
    value = field.read(field.shown(field.default))
    recipe, findings = check_recipe(with_value(BASE, field.parts, value), Path("one.yaml"))
    assert findings == []
    assert recipe == check_recipe(BASE, Path("one.yaml"))[0]


def test_what_is_entered_is_read_as_in_a_recipe() -> None:
    listed = fields()
    assert listed["sft.learning_rate"].read("1e-5") == 1e-5
    assert listed["sft.max_steps"].read("") is None
    assert listed["data.system"].read("你是客服：请回答\n") == "你是客服：请回答\n"
    assert listed["evaluate.prompts"].read("[你好, 再见]") == ["你好", "再见"]
    assert listed["sft.epochs"].read("两遍") == "两遍"  # the recipe's own check says what is wrong
    with pytest.raises(RecipeError, match="empty"):
        listed["sft.epochs"].read(" ")
    with pytest.raises(RecipeError, match="YAML"):
        listed["evaluate.prompts"].read("[a")


def test_a_mistake_is_told_with_its_key_and_line() -> None:
    text = BASE + "sft:\n  epochs: 两遍\n  epoch: 3\nlora: {rank: 0}\n"
    recipe, findings = check_recipe(text, Path("a b/one.yaml"))
    assert recipe is None
    assert [(finding.line, finding.dotted) for finding in findings] == [
        (5, "sft.epochs"), (6, "sft.epoch"), (7, "lora.rank"),
    ]  # fmt: skip
    assert findings[0].text == "sft.epochs must be a number, found '两遍'."
    assert "did you mean sft.epochs?" in findings[1].text


@pytest.mark.parametrize(
    ("text", "line"), [("name: [", 1), ("- 1", 0), ("", 0), ("name: a\nname: b\nmodel: {path: x}", 2), ("a：b", 0)]
)
def test_a_text_that_is_no_recipe_is_told_too(text: str, line: int) -> None:
    recipe, findings = check_recipe(text, Path("one.yaml"))
    assert recipe is None and findings[0].line in (line, 1)
    assert "one.yaml" not in findings[0].text


def test_a_long_text_becomes_lines_of_yaml() -> None:
    text = with_value(BASE, ["data", "system"], "第一行\n第二行: x")
    assert compose(text)[1]["data"]["system"] == "第一行\n第二行: x"
    assert inline("a") == "a"
