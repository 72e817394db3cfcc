"""Any settings of any program give a recipe that loads, or an error with the reason, and never a traceback."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_zh.bridges.draft import TITLES, Program
from mlx_zh.bridges.project import Wishes, converted, import_project
from mlx_zh.bridges.reading import read_project
from mlx_zh.errors import RecipeError
from mlx_zh.language.other_names import other_names
from mlx_zh.recipe import load_recipe

imports = importlib.import_module("mlx_zh.import").main  # the name is a word of the language

TABLE = {
    "a": {"file_name": "a.json"},
    "pairs": {"hf_hub_url": "x/y", "ms_hub_url": "z/y", "ranking": True, "subset": "s", "folder": "f"},
    "tagged": {"file_name": "k.json", "columns": {"kto_tag": "label"}, "num_samples": 5},
    "odd": {"file_name": 3, "columns": 4, "formatting": []},
}
MORE = (
    *(
        "model",
        "max_length",
        "learning_rate",
        "batch_size",
        "num_layers",
        "seed",
        "beta",
        "label_smoothing",
        "trainer",
    ),
    *(
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "max_grad_norm",
        "warmup_steps",
        "warmup_ratio",
        "eval_steps",
        "data",
    ),
    *("max_steps", "simpo_gamma", "ld_alpha", "epochs", "max_samples", "desirable_weight", "undesirable_weight"),
    *(
        "dataset_config",
        "dataset_train_split",
        "discopop_tau",
        "modules_to_save",
        "sft_loss_type",
        "freeze_extra_modules",
    ),
)
USUAL: dict[str, list[Any]] = {
    "stage": ["sft", "pt", "dpo", "kto", "rm", "ppo"],
    "finetuning_type": ["lora", "full", "freeze", "oft"],
    "model_name_or_path": ["Qwen/Qwen3-8B", "x/y-7b-GPTQ", "Qwen/Qwen2-VL-2B", "meta-llama/Llama-3.1-8B-Instruct"],
    "dataset": ["a", "a,pairs", "pairs", "tagged", "odd", "none-such", ["a"]],
    "dataset_name": ["x/y", "a.json", "../..", "a b"],
    "lr_scheduler_type": ["cosine", "linear", "constant", "cosine_with_min_lr", "polynomial", "odd"],
    "pref_loss": ["sigmoid", "ipo", "orpo", "simpo", "kto_pair"],
    "loss_type": ["sigmoid", ["sigmoid", "sft"], "kto", "nll", "aot_pair", "dft"],
    "lora_target": ["all", "q_proj,v_proj", "W_pack", []],
    "lora_parameters": [{"rank": 4, "scale": 2}, {"rank": 0}, {"keys": ["q_proj"]}, {"keys": 3, "scale": "x"}],
    "lr_schedule": [{"name": "cosine_decay", "arguments": [1e-4, 100]}, {"arguments": []}, {"name": "step_decay"}],
    "quantization_bit": [4, 8, 7],
    "trainer": ["sft", "dpo", "kto", "orpo", "grpo"],
    "train_mode": ["sft", "dpo", "orpo", "grpo"],
    "hf_dataset": [{"path": "x/y", "train_split": "train[:100]"}, [{"name": "x/y"}], [3]],
    "datasets": [[{"path": "x/y", "fraction": 0.5}], [3], {}],
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 5000),
    st.floats(),
    st.sampled_from(
        ["", "all", "true", "steps", "1e-4", "文件", "\u2028", "a: b", "x" * 300, "{", "#", "1e999", "\ud800"]
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["name", "rank", "a"]), st.integers(0, 9), max_size=2),
)
NAMES = sorted({*other_names(), *MORE, *USUAL})


@st.composite
def projects(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(NAMES), max_size=12, unique=True))
    usual = draw(st.lists(st.sampled_from(sorted(USUAL)), max_size=9, unique=True))
    values = {name: draw(VALUES) for name in names}
    values |= {name: draw(st.sampled_from(USUAL[name])) for name in usual}
    if draw(st.booleans()):
        values |= {"model": "Qwen/Qwen3-0.6B", "model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_dir": "."}
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    (folder / "dataset_info.json").write_text(json.dumps(TABLE))
    return folder


@settings(max_examples=150)
@given(values=projects(), program=st.sampled_from(list(TITLES)), language=st.sampled_from(["en", "zh"]))
def test_any_settings_give_a_recipe_or_reasons(
    folder: Path, values: dict[str, Any], program: Program, language: str
) -> None:
    before = os.environ.get("MLX_ZH_LANG")
    os.environ["MLX_ZH_LANG"] = language
    file = folder / "settings.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    try:
        imported = import_project([file], Wishes(program=program, out=folder / "out.yaml"))
    except RecipeError as error:
        assert len(str(error)) > 20 and "Traceback" not in str(error)
    else:
        (folder / "checked.yaml").write_text(imported.text, encoding="utf-8")
        assert load_recipe(folder / "checked.yaml") == imported.recipe
        given_names = {name for name, value in values.items() if value is not None}
        assert all(row.theirs or row.ours or row.note for row in imported.rows)
        told = " ".join(row.theirs for row in imported.rows)
        for name in given_names & {"deepspeed", "use_galore", "plot_loss", "optim"}:
            assert name in told
    finally:
        os.environ.pop("MLX_ZH_LANG") if before is None else os.environ.__setitem__("MLX_ZH_LANG", before)


# Every setting alone ------------------------------------------------------------------------------------------

LEAST: dict[str, dict[str, Any]] = {
    "llama-factory": {"model_name_or_path": "Qwen/Qwen3-0.6B", "dataset": "a", "stage": "sft", "dataset_dir": "."},
    "trl": {"model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_name": "x/y", "use_peft": True},
    "mlx-lm": {"model": "Qwen/Qwen3-0.6B", "data": "x/y", "iters": 9},
    "mlx-lm-lora": {"model": "Qwen/Qwen3-0.6B", "data": "x/y", "iters": 9, "train_mode": "sft"},
}


@pytest.mark.parametrize("program", LEAST)
def test_every_known_setting_is_told(folder: Path, program: Program) -> None:
    """Each name of the table, turned on alone, is in the table of the import, or is refused by its name."""
    file = folder / f"{program}.json"
    for name, entry in other_names().items():
        if entry.key or name in LEAST[program]:
            continue
        file.write_text(json.dumps({**LEAST[program], name: True}))
        try:
            draft = converted(read_project(file, program), folder)
        except RecipeError as error:
            assert name in str(error) or name in ("stage", "sft_loss_type"), name
            continue
        rows = [row for row in draft.rows if row.theirs.startswith(name)]
        assert rows and all(row.note for row in rows), name
        if entry.effect == "differs" and True not in entry.fine:
            assert any(row.level == "differs" for row in rows), name


# Hostile files ------------------------------------------------------------------------------------------------

GOOD = "model_name_or_path: Qwen/Qwen3-0.6B\nstage: sft\nfinetuning_type: lora\ndataset: a\n"
GOOD += "dataset_dir: .\ndefault_system: 你好\n"
DEEP = "a: " + "[" * 5000 + "]" * 5000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_encodings_of_windows(folder: Path, tmp_path: Path, encoding: str, ends: str) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps(TABLE))
    file = tmp_path / "train.yaml"
    file.write_bytes(GOOD.replace("\n", ends).encode(encoding))
    assert import_project([file], Wishes()).recipe.data.system == "你好"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.yaml", b"\xff\xfe\x00"),
        ("a.yaml", bytes(range(256))),
        ("a.yaml", b"x" * 1_000_001),
        ("a.yaml", DEEP.encode()),
        ("a.yaml", LAUGHS.encode()),
        ("a.yaml", b"&a [*a]"),
        ("a.yaml", b"stage: &s sft\nfinetuning_type: {a: *s}\n<<: 3\n"),
        ("a.yaml", b"? [a]\n: b\nstage: !!python/object:os.system x\n"),
        ("a.yaml", b"stage: 2026-02-31\n"),
        ("a.yaml", b"- stage: sft\n"),
        ("a.yaml", b""),
        ("a.json", b"[" * 9000),
        ("a.json", b'{"stage": "sft", "stage": {}}'),
        ("a.json", b'{"stage": NaN, "lora_rank": 1e999}'),
        ("a.py", b"def f(:\n"),
        ("a.py", b"\0"),
        ("a.py", ("x = " + "(" * 3000 + ")" * 3000).encode()),
        ("a.py", ("x = " + "-" * 20000 + "1").encode()),
        ("a.py", b"import os\nos.system('touch pwned')\nSFTConfig(learning_rate=__import__('os').getpid())\n"),
        ("a.py", b"SFTConfig(**SFTConfig(**{1: 2}), *a, max_steps=10**10**10)\nload_dataset(1, 2, 3)\n"),
        ("a.ipynb", b'{"cells": [{"cell_type": "code"}]}'),
        ("a.ipynb", b'{"cells": 3}'),
        ("a.sh", b"llamafactory-cli train 'a\n"),
        ("a.sh", b"A=$B\nB=$A\nllamafactory-cli train --stage $A --model_name_or_path ${A}${B}\n"),
        ("a.sh", b"llamafactory-cli train\nllamafactory-cli train --\nllamafactory-cli train none.yaml\n"),
        ("a.sh", b"llamafactory-cli train a.sh\n"),
        ("a.sh", b"CUDA_VISIBLE_DEVICES=" + b"0," * 99999 + b" llamafactory-cli train --stage sft\n"),
        ("a.sh", b"rm -rf /\n"),
    ],
)
@pytest.mark.parametrize("program", [None, "llama-factory", "mlx-lm"])
def test_hostile_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, program: Program | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(RecipeError) as refusal:
        import_project([Path(name)], Wishes(program=program))
    assert name in str(refusal.value) and len(str(refusal.value)) < 5000
    assert sorted(os.listdir()) == [name]  # nothing was run or written


def test_a_table_of_data_sets_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(GOOD)
    pictures = '{"a": {"columns": {"images": "i"}}}'
    for table in ("[]", "{", "3", '{"a": {"script_url": "x.py"}}', pictures, '{"a": []}'):
        Path("dataset_info.json").write_text(table)
        with pytest.raises(RecipeError, match=r"train\.yaml"):
            import_project([Path("train.yaml")], Wishes())


def test_yaml_of_numbers_as_people_write_them(tmp_path: Path) -> None:
    """PyYAML reads 1e-4 as text, and OmegaConf as a number."""
    (tmp_path / "dataset_info.json").write_text(json.dumps(TABLE))
    (tmp_path / "t.yaml").write_text(GOOD + "learning_rate: 1e-4\nnum_train_epochs: 3.0\nlora_rank: '16'\n")
    recipe = import_project([tmp_path / "t.yaml"], Wishes()).recipe
    assert (recipe.sft.learning_rate, recipe.lora.rank) == (1e-4, 16)
    assert yaml.safe_load("a: 1e-4")["a"] == "1e-4"


def test_the_command_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dataset_info.json").write_text(json.dumps(TABLE))
    Path("train.yaml").write_text(GOOD)
    assert imports(["train.yaml"]) == 0
    written = Path("train-mlx.yaml").read_text(encoding="utf-8")
    with pytest.raises(RecipeError, match="never overwritten"):
        imports(["train.yaml", "--model", "qwen3-8b"])
    with pytest.raises(RecipeError, match="never overwritten"):
        imports(["train.yaml", "--out", "train.yaml"])
    assert Path("train-mlx.yaml").read_text(encoding="utf-8") == written
