"""Models by short names: the table's sizes against published numbers, and the user's own table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_zh.errors import ModelError, RecipeError
from mlx_zh.models import catalog
from mlx_zh.models.load import find_config, hub_ids, resolve_model
from mlx_zh.planning.memory import weight_bytes
from mlx_zh.planning.shapes import Packing, Target, model_shape

ENTRIES = catalog.catalog()


@pytest.mark.parametrize("name", ENTRIES)
def test_the_sizes_give_the_published_number_of_parameters(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.config is not None and entry.source and entry.suits.en and entry.suits.zh
    shape = model_shape(entry.config)
    assert shape.layers * shape.block_values + shape.outer_values == entry.params
    packing = Packing(entry.config["quantization"]["bits"], entry.config["quantization"]["group_size"])
    if not entry.built_in:  # a .gguf file, whose embedding has 8 bits
        size = weight_bytes(shape, Target(2, packing, True)) / 1e9
        assert entry.size_gb == pytest.approx(size, rel=0.05)
    for copy in entry.copies.values():  # a copy with 16 bits has two bytes a parameter
        if copy.quantize:
            assert copy.size_gb == pytest.approx(
                2 * shape.layers * shape.block_values / 1e9, abs=1.1 * copy.size_gb / 2
            )


def test_the_names_that_the_documents_use_are_there() -> None:
    wanted = {
        "llama3.1-8b",
        "qwen3-0.6b",
        "qwen3-1.7b",
        "qwen3-4b",
        "qwen3-8b",
        "qwen3-14b",
        "qwen2.5-7b",
        "mistral-7b",
    }
    assert wanted <= set(ENTRIES)
    assert hub_ids("qwen3-8b") == dict.fromkeys(("huggingface", "modelscope"), "mlx-community/Qwen3-8B-4bit")
    assert catalog.known_model("okwinds/Qwen2.5-7B-Instruct-MLX-4bit") is ENTRIES["qwen2.5-7b"]


def test_the_config_of_a_short_name_needs_no_download() -> None:
    assert find_config("qwen3-8b")["num_hidden_layers"] == 36
    assert find_config("mlx-community/Qwen3-8B-4bit")["num_hidden_layers"] == 36


def test_an_unknown_name_names_the_nearest_and_the_list() -> None:
    with pytest.raises(ModelError, match=r"'qwen3-8'.*Did you mean qwen3-8b\? .*llama3\.1-8b, qwen3-0\.6b"):
        resolve_model("qwen3-8")


def test_a_folder_of_that_name_goes_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-8b").mkdir()
    (tmp_path / "qwen3-8b" / "config.json").write_text("{}")
    assert resolve_model("qwen3-8b") == Path("qwen3-8b")


def test_a_16_bit_copy_is_quantized_and_a_4_bit_one_is_not() -> None:
    assert catalog.packing_on_loading("llama3.1-8b", {}) == (4, 64)
    assert catalog.packing_on_loading("LLM-Research/Meta-Llama-3.1-8B-Instruct", {}) == (4, 64)
    assert catalog.packing_on_loading("llama3.1-8b", {"quantization": {"bits": 4, "group_size": 64}}) is None
    assert catalog.packing_on_loading("qwen3-8b", {}) is None
    assert catalog.packing_on_loading("some/other", {}) is None


# The user's own table


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def write(text: str) -> Path:
        file = tmp_path / "models.yaml"
        file.write_text(text, encoding="utf-8")
        monkeypatch.setenv("MLX_ZH_MODELS", str(file))
        return file

    return write


def test_ones_own_models_are_added_and_go_first(own: Any) -> None:
    own("mine: {modelscope: {id: me/mine}}\nqwen3-8b: {huggingface: {id: me/other}}\n")
    assert hub_ids("mine") == {"modelscope": "me/mine"} and hub_ids("qwen3-8b") == {"huggingface": "me/other"}
    assert hub_ids("qwen3-4b") is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:\n  huggingface: {id: x/y}\n  size: 3\n", [":3: a.size is not a key; did you mean size_gb?"]),
        (
            "a: {licence: x}\nb: {modelscope: {id: x}}\n",
            [":1: a must be a section with huggingface", ":2: b.modelscope.id"],
        ),
        ("a: {modelscope: {id: x/y}, config: {model_type: llama}}\n", [":1: a must be", "hidden_size"]),
        ("- a\n", ["a table of models is a mapping"]),
        ("a: [\n", ["not valid YAML"]),
    ],
)
def test_mistakes_are_named_with_their_line(own: Any, text: str, words: list[str]) -> None:
    file = own(text)
    with pytest.raises(RecipeError) as error:
        catalog.catalog()
    for word in (str(file), *words):
        assert word in str(error.value)


def test_a_table_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_ZH_MODELS", str(tmp_path / "none.yaml"))
    with pytest.raises(RecipeError, match=r"MLX_ZH_MODELS names .*none\.yaml, which is not a file"):
        catalog.catalog()


@pytest.mark.parametrize("page", ["models.md", "models.zh-CN.md"])
def test_the_pages_list_every_model_with_its_ids(page: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text(encoding="utf-8")
    for name, entry in ENTRIES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` | {entry.size_gb:g} |"))
        assert all(f"`{id}`" in row for id in entry.ids.values()), name
