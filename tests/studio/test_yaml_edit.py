"""One value is changed in a recipe's text: the value is right, and the other lines stay as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.recipe_text.values import compose, dump
from mlx_zh.studio.yaml_edit import value_at, with_value, without_key

ROOT = Path(__file__).resolve().parents[2]
TEXT = """\
# Mine.
name: one                       # of the run

model:
  path: qwen3-4b                # the base
data:
  sft:
    train:                      # 12 rows
      - path: qa.xlsx
        columns: {prompt: 问题, response: 答案}  # yours: ours
  validation_fraction: 0.05     # not learned
  deduplicate: {near: null}
sft:
  learning_rate: 2e-4  # high

evaluate:
  prompts:                      # asked before and after
    - 你好？
    - "a: b"
  # the end of evaluate

# export is last
export:
  formats: [mlx]
"""


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("name", "another", "name: another                   # of the run"),
        ("model.path", "a much longer name than there was before",
         "  path: a much longer name than there was before  # the base"),
        ("sft.learning_rate", 1e-5, "  learning_rate: 1e-5  # high"),
        ("sft.epochs", 3, "  epochs: 3"),
        ("data.deduplicate.near", 0.9, "  deduplicate: {near: 0.9}"),
        ("data.deduplicate.exact", False, "  deduplicate: {near: null, exact: false}"),
        ("evaluate.prompts", ["好"], "  prompts: [好]                  # asked before and after"),
        ("evaluate.prompts", ["你好？", "a: b", "c"], "    - c"),
        ("model.quantize.bits", 4, "    bits: 4"),
        ("budget", "1h", "budget: 1h"),
    ],
)  # fmt: skip
def test_a_line_is_changed_or_added(key: str, value: Any, line: str) -> None:
    text = with_value(TEXT, key.split("."), value)
    assert value_at(text, key.split(".")) == value
    assert line in text.split("\n")
    comments = [part for part in TEXT.split("\n") if "#" in part]
    kept = {comment.partition("#")[2] for comment in comments}
    assert {part.partition("#")[2] for part in text.split("\n") if "#" in part} == kept


def test_a_key_is_removed_with_its_section() -> None:
    text = without_key(TEXT, ["sft", "learning_rate"])
    assert "sft" not in compose(text)[1] and "# asked before and after" in text
    assert without_key(TEXT, ["dpo", "beta"]) == TEXT


def test_a_new_section_and_an_empty_text() -> None:
    assert with_value("", ["sft", "epochs"], 2) == "sft:\n  epochs: 2\n"
    assert with_value("name: a", ["sft", "epochs"], 2) == "name: a\n\nsft:\n  epochs: 2\n"
    assert with_value("sft:\nname: a\n", ["sft", "epochs"], 2) == "sft: {epochs: 2}\nname: a\n"


def test_an_alias_is_not_changed_elsewhere() -> None:
    text = with_value("sft: &same {epochs: 1}\ndpo: *same\n", ["dpo", "epochs"], 2)
    assert compose(text)[1] == {"sft": {"epochs": 1}, "dpo": {"epochs": 2}}


def test_what_is_no_mapping_is_refused() -> None:
    for text in ("- 1", "a: [", "text"):
        with pytest.raises(ValueError, match="not"):
            with_value(text, ["a"], 1)


_names = st.sampled_from(["a", "b", "c", "name", "问题"])
_texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
_plain = (
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats(allow_nan=False, allow_infinity=False) | _texts
)
_values = st.recursive(
    _plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(_names, _values, max_size=4), st.lists(_names, min_size=1, max_size=3), _values)
def test_any_value_anywhere(document: dict[str, Any], key: list[str], value: Any) -> None:
    text = dump(document) if document else "# nothing yet\n"
    changed = with_value(text, key, value)
    assert value_at(changed, key) == value
    removed = compose(without_key(changed, key))[1] or {}
    untouched = {name: below for name, below in document.items() if name != key[0]}
    assert {name: below for name, below in removed.items() if name != key[0]} == untouched


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.name)
def test_the_recipes_that_come_with_the_program_keep_their_comments(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    changed = with_value(with_value(text, ["sft", "epochs"], 7), ["name"], "mine")
    wanted = compose(text)[1]
    wanted["name"], wanted["sft"] = "mine", {**wanted.get("sft", {}), "epochs": 7}
    assert compose(changed)[1] == wanted
    assert changed.count("#") == text.count("#")
