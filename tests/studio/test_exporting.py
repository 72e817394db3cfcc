"""What a run exported, and the command for more; whatever the summary holds, nothing is raised."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.recipe import Recipe
from mlx_zh.stages import exporting
from mlx_zh.stages.exporting import Room, Wish, exported, is_damaged, title_of
from mlx_zh.stages.placing import Place
from mlx_zh.stages.run_folder import RunFolder

GGUF: dict[str, Any] = {
    "detail": "Q8_0",
    "size": 145_000_000,
    "fidelity": {"kl": 0.0003, "top1": 0.997, "fused_perplexity": 2.33},
    "left": {"kept_mean": 0.99},
    "llama_cpp": {"kl": 0.005, "top1": 0.98},
    "exams": {
        "ceval": {"difference": 0.01, "interval": [-0.02, 0.04], "won": 5, "lost": 3, "p": 0.5, "against": "dpo"}
    },
    "warnings": ["something"],
    "warning_codes": [],
    "unmeasured": None,
    "unmeasured_code": None,
}


def summary(run: RunFolder, content: Any) -> None:
    run.fused.mkdir(parents=True, exist_ok=True)
    run.fused_summary.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_the_figures_are_those_that_fuse_kept(tmp_path: Path):
    run = RunFolder(tmp_path)
    summary(run, {"gguf": GGUF, "peft": {"detail": "adapter", "size": 9}, "mlx": {"unmeasured": "too large"}})
    (run.fused / "gguf").mkdir()
    mlx, gguf, peft = exported(run)
    assert (gguf.kind, gguf.detail, gguf.size, gguf.kl, gguf.top1, gguf.perplexity, gguf.kept) == (
        *("gguf", "Q8_0", 145_000_000, 0.0003, 0.997, 2.33, 0.99),
    )
    assert gguf.in_llama_cpp == (0.005, 0.98) and gguf.warnings == ("something",) and gguf.unmeasured is None
    delta = gguf.exams[0]
    assert (delta.exam, delta.against, delta.difference, delta.low, delta.high, delta.won, delta.lost) == (
        *("ceval", "dpo", 0.01, -0.02, 0.04, 5, 3),
    )
    assert (gguf.is_here, peft.is_here, mlx.unmeasured) == (True, False, "too large")
    assert (peft.kl, peft.size) == (None, 9)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GGUF, "kl", "ceval"]), inner, max_size=4)
    ),
)


@given(facts=st.dictionaries(st.sampled_from([*GGUF, "stage", "adapter"]), ANYTHING, max_size=6))
def test_no_summary_raises(tmp_path_factory: pytest.TempPathFactory, facts: dict[str, Any]):
    run = RunFolder(tmp_path_factory.mktemp("run"))
    summary(run, {"gguf": facts, "strange": 3})
    assert [one.kind for one in exported(run)] == ["gguf"]


def test_a_damaged_summary_is_told_from_a_missing_one(tmp_path: Path):
    run = RunFolder(tmp_path)
    assert exported(run) == [] and not is_damaged(run)
    summary(run, '{"gguf": ')
    assert exported(run) == [] and is_damaged(run)


def test_the_command_says_what_is_wanted_and_nothing_else():
    wish = Wish(("gguf", "mlx"), "q4_1", recover=True, name="我的 模型", to="ollama", replace=True)
    assert wish.words() == [
        *("export.formats=[gguf,mlx]", "export.gguf_type=q4_1", "export.recover=true", "export.name=我的 模型"),
        *("--to", "ollama", "--replace"),
    ]
    assert Wish(("mlx",), "q8_0", replace=True).words() == ["export.formats=[mlx]"]
    assert shlex.split(shlex.join(wish.words())) == wish.words()


def test_the_name_is_that_of_the_card_where_a_licence_asked_for_another(tmp_path: Path):
    run = RunFolder(tmp_path)
    recipe = Recipe.model_validate({"name": "mine", "model": {"path": "m"}})
    assert title_of(run, recipe) == "mine"
    (run.fused / "mlx").mkdir(parents=True)
    card = run.fused / "mlx" / "README.md"
    card.write_text("---\nlicense: llama3.1\n---\n\n# Llama-mine\n\n# mine\n", encoding="utf-8")
    assert title_of(run, recipe) == "Llama-mine"
    card.write_text("# something else\n", encoding="utf-8")
    assert title_of(run, recipe) == "mine"


def test_the_steps_can_be_pasted_into_a_shell():
    create, start = Place("ollama", "My Model", False).steps(Path("runs/a b/fused/gguf"))
    assert shlex.split(create)[:2] == ["cd", "runs/a b/fused/gguf"] and start.split()[:2] == ["ollama", "run"]
    _, copy = Place("lmstudio", "My Model", False).steps(Path("runs/a b/fused/mlx"))
    assert shlex.split(copy) == ["cp", "-R", "runs/a b/fused/mlx/.", "~/.lmstudio/models/mlx-zh/My Model/"]


def test_space_is_enough_or_unknown():
    assert Room(1e9, 10**9).is_enough and not Room(1e9 + 1, 10**9).is_enough and Room(None, 0).is_enough


def test_the_needed_space_is_that_of_the_plan(
    tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from mlx_zh.models.load import find_config
    from mlx_zh.planning.exports import export_bytes
    from mlx_zh.stages import memory_check

    def ask(words: list[str], project: Path) -> dict[str, Any]:  # in this process, which is faster
        monkeypatch.chdir(project)
        assert exporting.main(words) == 0
        return dict(json.loads(capsys.readouterr().out))

    monkeypatch.setattr(exporting, "_asked", ask)
    run = RunFolder(tmp_path / "runs" / "tiny")
    run.path.mkdir(parents=True)
    recipe = Recipe.model_validate({"name": "tiny", "model": {"path": str(model_folder())}})
    run.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    wanted = recipe.export.model_copy(update={"formats": ("hf",)})
    step = memory_check.training_step(recipe, "sft", find_config(recipe.model.path), memory_check.mac(16 * 2**30))
    found = exporting.room(run, "runs/tiny", Wish(("hf", "peft")), tmp_path)
    assert found.needed == export_bytes(wanted, step.model, step.target) + 40_000_000  # and the adapter's small files
    assert exporting.room(run, "runs/none", Wish(("hf",)), tmp_path).reason.startswith("there is no recipe")
