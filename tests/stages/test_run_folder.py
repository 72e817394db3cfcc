"""Where the files of a run lie: what an older version left is found, and no other file spells it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mlx_zh
from mlx_zh.pipeline.steps import steps
from mlx_zh.recipe import load_recipe
from mlx_zh.stages.run_folder import RunFolder

PACKAGE = Path(mlx_zh.__file__).parent

RECIPE = """
name: mine
model: {path: base}
data: {sft: {train: [a.jsonl]}, dpo: {train: [b.jsonl]}}
evaluate: {benchmarks: [ceval]}
export: {formats: [mlx]}
"""


def adapter(run: RunFolder, stage: str, file: str = "adapters.safetensors") -> Path:
    folder = run.stage(stage).adapter
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).touch()
    return folder


def test_the_files_of_a_run_are_those_of_version_0_1(tmp_path: Path) -> None:
    """Run folders of that version are gone on with, so none of these may change."""
    run = RunFolder(tmp_path)
    sft = run.stage("sft")
    files = [run.recipe, run.manifest, run.samples, run.pipeline, run.prepared, run.histogram("dpo"), run.exams]
    files += [run.fused_summary, run.page, run.text, run.plots]
    files += [
        sft.metrics,
        sft.skipped,
        sft.warnings,
        sft.settings,
        sft.summary,
        sft.adapter,
        sft.checkpoints,
        sft.best,
    ]
    assert [run.pattern(path) for path in files] == [
        "recipe.yaml", "manifest.json", "samples.json", "pipeline.json", "data/report.json", "data/dpo-lengths.png",
        "eval", "fused/summary.json", "report.html", "report.md", "plots", "sft/metrics.jsonl", "sft/skipped.jsonl",
        "sft/warnings.jsonl", "sft/settings.json", "sft/summary.json", "sft/adapters", "sft/checkpoints",
        "sft/checkpoints/best",
    ]  # fmt: skip


def test_the_pipeline_looks_for_the_same_outputs_as_version_0_1(tmp_path: Path, monkeypatch) -> None:
    """They stand in pipeline.json; under other names every step of an older run would be out of date."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe("recipe.yaml")
    assert {step.name: step.outputs for step in steps(recipe, RunFolder.of(recipe))} == {
        "prepare": ("data/report.json",),
        "eval-base": ("eval/base-*.jsonl",),
        "sft": ("sft/adapters/*",),
        "eval-sft": ("eval/sft-*.jsonl",),
        "dpo": ("dpo/adapters/*",),
        "eval-dpo": ("eval/dpo-*.jsonl",),
        "fuse": ("fused/**/*",),
        "report": ("report.md", "report.html", "plots/*.png"),
    }


def test_the_newest_adapter_is_that_of_dpo(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.newest_adapter() is None
    adapter(run, "dpo")  # killed before the config was there, which is written last
    assert run.newest_adapter() is None
    sft = adapter(run, "sft", "adapter_config.json")
    assert run.newest_adapter() == sft and not run.stage("dpo").has_adapter
    dpo = adapter(run, "dpo", "adapter_config.json")
    assert run.newest_adapter() == dpo


def test_a_stage_is_finished_when_the_adapters_settings_are_there(tmp_path: Path) -> None:
    """They are written after the weights."""
    run = RunFolder(tmp_path)
    adapter(run, "sft")
    assert not run.stage("sft").is_finished
    adapter(run, "sft", "adapter_config.json")
    assert run.stage("sft").is_finished


@pytest.mark.parametrize(
    ("written", "chosen"), [((), "mlx"), (("gguf",), "gguf"), (("hf", "gguf"), "hf"), (("mlx", "hf"), "mlx")]
)
def test_the_fused_model_is_mlxs_where_there_is_one(tmp_path: Path, written: tuple[str, ...], chosen: str) -> None:
    for kind in (*written, "peft"):
        (tmp_path / "fused" / kind).mkdir(parents=True)
    assert RunFolder(tmp_path).fused_model() == tmp_path / "fused" / chosen


def test_the_fused_model_is_what_the_last_command_wrote(tmp_path: Path) -> None:
    for kind in ("mlx", "gguf"):
        (tmp_path / "fused" / kind).mkdir(parents=True)
    (tmp_path / "fused" / "summary.json").write_text('{"gguf": {}}', encoding="utf-8")
    assert RunFolder(tmp_path).fused_model() == tmp_path / "fused" / "gguf"


def test_no_other_file_spells_the_paths_of_a_run() -> None:
    spelled = re.compile(
        r"[\"'](?:adapters|checkpoints|metrics\.jsonl|skipped\.jsonl|manifest\.json|samples\.json)[\"']"
    )
    owner = Path("stages/run_folder.py")
    # the manifest of a prepared corpus, in the cache folder
    corpus = {Path("corpus/prepared.py"), Path("stages/prepared_rows.py")}
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if spelled.search(path.read_text("utf-8"))}
    assert owner in files
    assert files - corpus == {owner}
