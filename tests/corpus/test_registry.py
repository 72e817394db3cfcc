"""Data sets by name: the mission's, the user's own, and what is said of a name that there is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_zh.corpus import formats, preferences
from mlx_zh.corpus.registry import find_data_set, load_registry
from mlx_zh.errors import DataError
from mlx_zh.language.translation import in_readers_language
from mlx_zh.recipe import DataSet

MISSION = {
    "belle-1m": ("huggingface", "BelleGroup/train_1M_CN", "sft"),
    "llama3-chinese": ("modelscope", "zhuangxialie/Llama3-Chinese-Dataset", "sft"),
    "chinese-modern-poetry": ("huggingface", "Iess/chinese_modern_poetry", "sft"),
    "python-code-18k": ("huggingface", "iamtarun/python_code_instructions_18k_alpaca", "sft"),
    "dpo-en-zh-20k": ("huggingface", "hiyouga/DPO-En-Zh-20k", "dpo"),
    "orca-dpo-pairs": ("huggingface", "Intel/orca_dpo_pairs", "dpo"),
    "chinese-dpo-pairs": ("huggingface", "wenbopan/Chinese-dpo-pairs", "dpo"),
    "dpo-zh-en-emoji": ("huggingface", "shareAI/DPO-zh-en-emoji", "dpo"),
}


def test_the_missions_data_sets():
    registry = load_registry()
    assert {name: (e.hub, e.id, e.kind) for name, e in registry.items() if name in MISSION} == MISSION
    assert registry["mathglm-arithmetic"].hub == "file" and registry["arithmetic-synthetic"].hub == "generated"
    assert len(registry) == 10
    for name, entry in registry.items():
        known = formats.FORMATS if entry.kind == "sft" else preferences.FORMATS
        assert entry.format in known, name
        assert entry.licence and entry.note, name


def test_ones_own_come_first(tmp_path: Path):
    file = tmp_path / "registry.yaml"
    file.write_text("mine: {hub: file, kind: sft, id: a}\nbelle-1m: {hub: url, kind: sft, id: 'http://b'}\n")
    own = {"mine": DataSet(hub="url", kind="dpo", id="http://c")}
    registry = load_registry(own, file)
    assert (registry["mine"].id, registry["belle-1m"].id) == ("http://c", "http://b")
    assert registry["python-code-18k"].hub == "huggingface"


def test_a_name_that_there_is_not():
    with pytest.raises(DataError, match=r"belle-1: there is no such file.*did you mean belle-1m\?.*orca-dpo-pairs"):
        find_data_set("belle-1", load_registry())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {hub: huggingface, kind: sft, colums: {}}", ["a.colums", "did you mean columns?"]),
        ("a: {hub: github, kind: sft}\nb: {hub: url}", ["a.hub", "b.kind"]),
        ("- a", ["a mapping from names"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_a_registry_file_with_mistakes_names_them_all(tmp_path: Path, text: str, words: list[str]):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        load_registry(None, file)
    for word in (str(file), *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: {hub: url, kind: sft, rows: -2}", "own.yaml:1: a.rows 应为：大于 0 的数；得到的是 -2。"),
        ("a: {hub: url, kind: sft}\na: {hub: url, kind: sft}", "own.yaml:2：a 写了两次（第一次在第 1 行）。"),
        ("- a", "own.yaml：登记表应是从名称到数据集的映射，而这个文件的内容是列表。"),
    ],
)
def test_a_chinese_reader_is_told_in_chinese_what_is_wrong_in_a_registry_file(tmp_path: Path, text: str, told: str):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        load_registry(None, file)
    assert in_readers_language(str(error.value), "zh") == f"{tmp_path}/{told}"


def test_a_registry_file_of_comments_alone_is_empty(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text("# mine: {hub: url, kind: sft}\n\n")
    assert load_registry(None, file) == load_registry()


def test_a_registry_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.registry_file: .* cannot be read"):
        load_registry(None, tmp_path / "none.yaml")
