"""Any text as a recipe, any value for any key: a recipe, or an error that says where and what."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import strategies
import yaml
from hypothesis import strategies as st

from mlx_zh.recipe import Recipe, load_recipe
from mlx_zh.recipe_text.problems import keys_of  # every key there is, also of sections in lists

KEYS = [name for name, _ in keys_of(Recipe)]
VALID = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
plain = st.recursive(
    strategies.scalars.filter(lambda value: not isinstance(value, str) or value.isprintable()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
)
pieces = st.sampled_from(
    [
        *"{}[]:,-&*!|>%@`'\"#?\n\t ",
        "<<",
        "*a",
        "&a ",
        "!!python/object/apply:os.system ",
        "name: x\n",
        "~",
        "1e999",
        "2024-01-01",
    ]
)


@hypothesis.given(st.lists(pieces | st.text(max_size=4), max_size=20).map("".join))
def test_any_text(told, tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    error = told(lambda: load_recipe(path))
    assert error is None or str(path) in error


@hypothesis.given(strategies.damaged(VALID.read_bytes()))
def test_damaged_files(told, tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(content)
    told(lambda: load_recipe(path))


@hypothesis.given(st.sampled_from(KEYS), plain)
def test_any_value_of_any_key(told, tmp_path_factory, key, value):
    whole = yaml.safe_load(VALID.read_text(encoding="utf-8"))
    section = whole
    *sections, last = key.split(".")
    for name in sections:
        below = section.get(name)
        section[name] = section = dict(below) if isinstance(below, dict) else {}
    section[last] = value
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole, allow_unicode=True), encoding="utf-8")

    def load() -> None:
        text = load_recipe(path).to_yaml()
        path.write_text(text, encoding="utf-8")
        assert load_recipe(path).to_yaml() == text

    told(load)


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(KEYS) | strategies.texts, strategies.texts | pieces), max_size=3)
)
def test_any_override(told, pairs):
    told(lambda: load_recipe(VALID, [f"{key}={value}" for key, value in pairs]))
