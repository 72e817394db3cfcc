"""Everything that can be known before the first download is told in one list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_zh.recipe import load_recipe
from mlx_zh.stages import preflight
from mlx_zh.system import hub_choice

RECIPE = """
name: t
model: {path: qwen3_8b}
track: [swanlab]
data:
  sft: {train: [none.jsonl, bel-1m, bad.jsonl, good.jsonl]}
  dpo: {train: [belle-1m]}
evaluate: {benchmarks: [no-exam], folder: {ceval: nowhere}}
dpo: {start: no-adapter}
"""
ROW = '{"instruction": "a", "output": "b"}\n'


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    (tmp_path / "bad.jsonl").write_text('{"colour": "red"}\n')
    (tmp_path / "good.jsonl").write_text(ROW)

    def load(*overrides: str) -> Any:
        (tmp_path / "r.yaml").write_text(RECIPE)
        return load_recipe(tmp_path / "r.yaml", overrides)

    return load


def errors(recipe: Any, *stages: str) -> list[str]:
    return [str(problem.text) for problem in preflight.problems(recipe, stages) if problem.is_error]


def test_all_errors_come_in_one_list(recipe: Any) -> None:
    found = errors(recipe(), "sft", "dpo", "eval")
    expected = [
        "none.jsonl: there is no such file",
        "did you mean belle-1m?",
        "bad.jsonl",
        "belle-1m is a data set for sft",
        "no-exam",
        "dpo.start is no-adapter, but there is no adapter in no-adapter",
        "Did you mean qwen3-8b?",
    ]
    for words in expected:
        assert sum(words in text for text in found) == 1, (words, found)
    assert len(found) == len(expected) and not any("good.jsonl" in text for text in found)


def test_a_tracker_that_is_not_installed_is_advice(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_TRACKERS", {"swanlab": "no_such_package"})
    advice = [str(p.text) for p in preflight.problems(recipe(), ["sft"]) if not p.is_error]
    assert (
        len(advice) == 1 and "swanlab is not installed" in advice[0] and "-m pip install no_such_package" in advice[0]
    )


@pytest.fixture
def clean(recipe: Any) -> Any:
    """A recipe whose only need is a model on a hub."""
    return recipe("model.path=qwen3-8b", "data.sft.train=[good.jsonl]", "data.dpo.train=[]", "track=[]")


def test_offline_without_the_model(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert errors(clean, "sft") == [
        "qwen3-8b must be downloaded, and HF_HUB_OFFLINE is set. Unset it, or give the path of a local copy."
    ]


def test_no_hub_answers_or_only_one(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    silent = {"huggingface": "TimeoutError", "modelscope": "TimeoutError"}
    monkeypatch.setattr(hub_choice, "answers", lambda: hub_choice.Answers(None, silent))
    (error,) = errors(clean, "sft")
    assert "no hub answers (Hugging Face: TimeoutError, ModelScope: TimeoutError)" in error
    only = hub_choice.Answers("modelscope", {"huggingface": "TimeoutError"})
    monkeypatch.setattr(hub_choice, "answers", lambda: only)
    assert errors(clean, "sft") == []
    poems = clean.model_copy(
        update={"data": load_recipe("r.yaml", ["data.sft.train=[chinese-modern-poetry]", "data.dpo.train=[]"]).data}
    )
    (error,) = errors(poems, "sft")
    assert error.startswith("chinese-modern-poetry must be downloaded from Hugging Face, which does not answer")


def test_a_disk_without_room(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub_choice, "answers", lambda: hub_choice.Answers("huggingface", {}))
    monkeypatch.setattr(preflight, "_free", lambda folder: 4_000_000_000)
    (error,) = errors(clean, "sft")
    assert "4.6 GB will be downloaded, and 4.0 GB are free in" in error and "HF_HOME" in error


def test_what_is_here_asks_no_network(recipe: Any, model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def asked() -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(hub_choice, "answers", asked)
    here = recipe(f"model.path={model_folder()}", "data.sft.train=[good.jsonl]", "track=[]")
    assert preflight.problems(here, ["sft"]) == []


def test_settings_of_memory_that_change_nothing_here_are_told(recipe: Any, model_folder: Any) -> None:
    def told(*overrides: str) -> list[str]:
        given = recipe(f"model.path={model_folder()}", "data.sft.train=[good.jsonl]", "track=[]", *overrides)
        found = preflight.problems(given, ["sft"])
        assert not any(problem.is_error for problem in found)
        return [str(problem.text) for problem in found]

    (limit,) = told("memory.limit=900000GB")
    assert limit.startswith("memory.limit is 900000GB, more than the ") and limit.endswith("so it limits nothing.")
    (dense,) = told("memory.dense_products=true")
    assert dense.startswith("memory.dense_products has no effect here")
    assert told("memory.limit=1GB", "memory.dense_products=false") == []


def test_a_licence_with_conditions_is_named_before_the_download(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_choice, "answers", lambda: hub_choice.Answers("modelscope", {}))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    llama = clean.model_copy(update={"model": clean.model.model_copy(update={"path": "llama3.1-8b"})})
    texts = [str(problem.text) for problem in preflight.problems(llama, ["sft"])]
    assert any("comes under the Llama 3.1 Community License" in text for text in texts)


def test_training_goes_on_without_an_exam_that_is_only_kept_out_of_the_data(
    clean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = clean.model_copy(update={"evaluate": load_recipe("r.yaml", ["evaluate.benchmarks=[cmmlu]"]).evaluate})
    assert len(errors(asked, "sft")) == 1 and "CMMLU" not in errors(asked, "sft")[0]
    assert errors(asked, "sft", "eval")[0].startswith("qwen3-8b, CMMLU must be downloaded")


def test_the_model_that_scores_rows_is_checked_before_they_are_read(
    clean: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that there is not, a folder without a model, and a download that no hub can give."""
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages import needs

    def scored_by(model: str) -> Recipe:
        values = clean.model_dump(exclude_unset=True)
        values["data"]["sft"]["select"] = {"method": ["ifd"], "model": model}
        return Recipe.model_validate(values)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = errors(scored_by("qwen3-0.6"), "sft")
    assert any("data.sft.select.model" in text and "Did you mean qwen3-0.6b?" in text for text in found), found
    (tmp_path / "empty").mkdir()
    found = errors(scored_by("empty"), "sft")
    assert any("data.sft.select.model" in text and "config.json" in text for text in found), found
    assert errors(scored_by("qwen3-0.6b"), "sft") == [
        "qwen3-8b, qwen3-0.6b must be downloaded, and HF_HUB_OFFLINE is set. Unset it, or give the path of a local "
        "copy."
    ]
    names = [item.name for item in needs.downloads_of(scored_by("qwen3-0.6b"), {}, ("sft",))]
    assert names.count("qwen3-0.6b") == 1
    assert "qwen3-0.6b" not in [item.name for item in needs.downloads_of(scored_by("qwen3-0.6b"), {}, ("eval",))]
    assert [item.name for item in needs.downloads_of(scored_by("qwen3-8b"), {}, ("sft",))].count("qwen3-8b") == 1


def test_the_prompts_of_rounds_are_read_before_the_run(recipe: Any, tmp_path: Path) -> None:
    def wrong(name: str) -> list[str]:
        settings = ("data.sft.train=[good.jsonl]", "rounds.count=2", f"rounds.prompts={name}")
        return [text for text in errors(recipe(*settings), "sft") if name in text]

    assert len(wrong("no-file.jsonl")) == 1 and "no such file of prompts" in wrong("no-file.jsonl")[0]
    (tmp_path / "empty.txt").write_text("\n")
    assert len(wrong("empty.txt")) == 1
    (tmp_path / "asked.txt").write_text("1 + 1 = ?\n")
    assert wrong("asked.txt") == [] and wrong("train") == []
