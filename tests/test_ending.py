"""What a finished run says at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from project import Project
from wcwidth import wcswidth

from mlx_zh.language.catalogue import Language
from mlx_zh.recipe import load_recipe
from mlx_zh.reporting.ending import Ending, chinese_share
from mlx_zh.reporting.exam_results import Cell, Change, ExamResult, ExamRow
from mlx_zh.reporting.findings import Findings, TrainingResult
from mlx_zh.reporting.words import tiles
from mlx_zh.stages.last_screen import last_screen

CHANCE = (0.1, 0.4)


def exam(before: float, after: float, p: float) -> ExamResult:
    difference = after - before
    change = Change(difference, difference - 0.1, difference + 0.1, noise=p >= 0.05, paired=True, p=p)
    cells = {"base": Cell(before, 0, 1), "dpo": Cell(after, 0, 1)}
    row = ExamRow("Average", 48, ("town",), cells, change)
    return ExamResult("town", "town", "test", "chat v1", 48, ["base", "dpo"], [row], ("base", "dpo"), CHANCE, {})


def findings() -> Findings:
    return Findings(
        "run",
        prompts=["你是谁？", "河叫什么？", "你好"],
        expected=["小明", "月河", None],
        answers={
            "base": ["who are you", "河叫什么？", "hi"],
            "sft": ["我叫小明。 Hi!", "叫月河。 Hi!", "hi"],
            "dpo": ["我叫小明。", "叫山。", "你好"],
        },
        exams=[exam(0.25, 0.9, 0.0001)],
    )


def test_the_verdict_counts_right_answers_and_judges_the_exam():
    assert Ending(findings(), "en").verdict() == [
        "Answers: 1 of 2 are right after training, 0 before.",
        "town: 25 % → 90 % right of 48 questions, more than luck (p < 0.001).",
    ]
    assert Ending(findings(), "zh").verdict() == [
        "回答：训练后 2 个问题答对 1 个，训练前答对 0 个。",
        "town：48 道题的正确率 25% → 90%，不是碰运气（p < 0.001）。",
    ]


@pytest.mark.parametrize(
    ("before", "after", "p", "words"),
    [(0.25, 0.3, 0.4, "no more than chance (p = 0.400)."), (0.9, 0.25, 0.01, "worse (p = 0.010).")],
)
def test_no_gain_is_called_so(before: float, after: float, p: float, words: str):
    (line,) = Ending(Findings("run", exams=[exam(before, after, p)]), "en").verdict()
    assert line.endswith(words)


def test_a_run_with_neither_exam_nor_answers_is_judged_by_its_validation_loss():
    losses = {"eval_loss_before": 2.0, "eval_loss_after": 0.5}
    run = Findings("run", training={"sft": TrainingResult("sft", [], [], losses)})
    assert Ending(run, "en").verdict() == ["Validation loss 2.000 → 0.500: lower is better."]
    assert Ending(Findings("run"), "en").verdict() == []


def test_answers_before_and_after_are_marked_where_the_right_one_is_known():
    shown = [(prompt, [line.cells for line in lines]) for prompt, lines in Ending(findings(), "zh").answers()]
    assert shown[0][1][1] == ("训练后", "✓", "我叫小明。")
    assert shown[1] == ("河叫什么？", [("训练前", "✗", "河叫什么？"), ("训练后", "✗", "叫山。")])
    assert shown[2][1] == [("训练前", "", "hi"), ("训练后", "", "你好")]


def test_the_report_counts_right_answers_at_its_top():
    first = tiles(findings())[0]
    assert (first.name.en, first.value) == ("Right answers", "0/2 → 1/2")
    assert tiles(Findings("run", prompts=["你好"], answers={"base": ["hi"]})) == []


def test_length_and_language_of_the_answers_are_shown_for_each_model():
    # base: 11, 5 and 2 characters, 4 of 15 letters are Chinese; SFT: 9, 8 and 2 characters, 7 of 13 letters.
    assert Ending(findings(), "en").style() == [
        ("", "characters per answer", "in Chinese"),
        ("base", "6", "27%"),
        ("SFT", "6", "54%"),
        ("DPO", "3", "100%"),
    ]


def test_the_share_of_chinese_counts_letters_only():
    assert chinese_share(["我叫 Bob。", "12!"]) == pytest.approx(2 / 5)
    assert chinese_share([]) == 0.0


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_last_screen_is_80_columns_wide_and_names_the_commands(
    project: Project, language: Language, monkeypatch: pytest.MonkeyPatch
):
    program = Path("bin/mlx-zh")
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent.absolute()))
    recipe = load_recipe("recipe.yaml")
    run = recipe.run_folder()
    run.mkdir(parents=True)
    answers = {"base": ["长" * 100], "sft": ["好 " * 100]}
    (run / "samples.json").write_text(json.dumps({"prompts": ["问" * 90], "expected": ["好"], "answers": answers}))
    screen = last_screen(recipe, "recipe.yaml", ["runs=runs", "seed=3"], language)
    assert max(map(wcswidth, screen.splitlines())) <= 80
    assert "mlx-zh chat recipe.yaml runs=runs\n" in screen and "seed" not in screen
    assert "mlx-zh init FILE" in screen and str(run / "report.html") in screen
