"""Exams of a fused model, MLX's or a GGUF file, against base + adapter: shown, and kept with the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_fuse import with_merges

from mlx_zh import eval as eval_stage
from mlx_zh import fuse
from mlx_zh.models.export import in_llama_cpp
from mlx_zh.models.export.card import with_exams
from mlx_zh.stages.run_folder import RunFolder

KINDS = ["mlx", "q8_0"] + (["q6_k"] if in_llama_cpp.is_installed() else [])


@pytest.fixture
def exam(tmp_path):
    """Twelve questions in the format of C-Eval."""
    folder = tmp_path / "exam" / "val"
    folder.mkdir(parents=True)
    rows = [f"{n},question {n},a{n},b{n},c{n},d{n},{'ABCD'[n % 4]}" for n in range(12)]
    (folder / "law_val.csv").write_text("id,question,A,B,C,D,answer\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return f"evaluate.benchmarks=[{tmp_path / 'exam'}]"


@pytest.mark.parametrize("kind", KINDS)
def test_what_fusing_cost_is_kept_with_the_model(project, exam, kind):
    with_merges(project.model, "merging")
    common = ("model.path=merging", exam, "evaluate.protocol=cloze")
    project.train("model.path=merging")
    formats = ("export.formats=[mlx]",) if kind == "mlx" else ("export.formats=[gguf]", f"export.gguf_type={kind}")
    assert project.run(fuse.main, "--no-measure", *common, *formats).status == 0
    first = project.run(eval_stage.main, "--stage", "fused", *common)
    assert first.status == 0 and "To see what fusing cost, run `mlx-zh eval recipe.yaml" in first.out, first
    assert "--stage sft` too" in first.out
    second = project.run(eval_stage.main, "--stage", "sft", *common)
    assert second.status == 0 and "fused against sft: " in second.out, second
    folder = RunFolder(Path("runs/tiny")).fused_model()
    assert folder.name == ("mlx" if kind == "mlx" else "gguf")
    (kept,) = json.loads(Path("runs/tiny/fused/summary.json").read_text("utf-8"))[folder.name]["exams"].values()
    assert kept["against"] == "sft" and -1 <= kept["difference"] <= 1
    card = (folder / "README.md").read_text("utf-8")
    assert f"| sft | {100 * kept['difference']:+.2f} points" in card
    assert f"{kept['won']} questions won, {kept['lost']} lost |" in card
    assert project.run(eval_stage.main, *common).status == 0
    assert (folder / "README.md").read_text("utf-8") == card  # the table is replaced, not added again


def test_a_card_of_another_form_is_left_alone():
    assert with_exams("# Mine\n", [("exam", "sft", "+0.00 points")]) == "# Mine\n"
    table = with_exams("# Mine\n\n## Licence\n\nMIT\n", [("exam", "sft", "0")])
    assert table.count("## Exams after fusing") == 1 and table.endswith("| 0 |\n\n## Licence\n\nMIT\n")
    assert with_exams(table, [("exam", "sft", "1")]) == table.replace("| 0 |", "| 1 |")
