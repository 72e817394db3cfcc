"""A project whose run has an adapter, prepared data of both stages with rows that were left out, and exam results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from mlx_zh import prepare, sft
from mlx_zh.exams import figures
from mlx_zh.exams.answers import Answer
from mlx_zh.exams.exam import load_exam
from mlx_zh.exams.records import Records

SCRIPT = "<script>document.title='bad'</script>"
TOWN = Path(__file__).resolve().parents[2] / "data" / "town" / "town-exam"
STORY = "从前有一座山，山上有一座庙，庙里有一个老和尚在给小和尚讲故事，故事讲了很久很久，一直讲到天亮。"


def rows() -> list[dict[str, Any]]:
    """Eight rows: two are duplicates or nearly so, one is a script, one has reasoning."""
    pairs = [("你好", "你好！很高兴见到你。"), ("讲个故事", STORY), ("讲个故事", STORY.replace("天亮", "天明"))]
    pairs += [("你好", "你好！很高兴见到你。"), (SCRIPT, "<img src=x onerror=alert(1)>")]
    pairs += [
        ("求 17×3", "<think>\n17×3=51\n</think>\n\n答案是 51。"),
        ("茶怎么泡？", "先温壶，再放茶叶。"),
        ("Bye", "See You"),
    ]
    return [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def prepared_project(folder: Path, model: Path) -> Path:
    """Make the project in `folder`, which must be the current one; returns its run folder."""
    write_lines(folder / "rows.jsonl", rows())
    pairs = [{"prompt": f"第{n}个？", "chosen": "好的", "rejected": "不好"} for n in range(3)]
    write_lines(folder / "pairs.jsonl", pairs)
    recipe = {
        "name": "tea",
        "model": {"path": str(model)},
        "data": {"sft": {"train": ["rows.jsonl"]}, "dpo": {"train": ["pairs.jsonl"]}, "max_length": 400},
        "lora": {"rank": 2},
        "sft": {"max_steps": 1},
        "evaluate": {"benchmarks": ["exams/town"], "bootstrap": 100},
    }
    (folder / "tea.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    assert prepare.main(["tea.yaml"]) == sft.main(["tea.yaml"]) == 0
    run = folder / "runs" / "tea"
    _write_exam(folder / "exams" / "town", run / "eval")
    return run


def _write_exam(exam: Path, results: Path) -> None:
    """A copy of the town's exam with a script in its first question; base answers always A, SFT always right."""
    shutil.copytree(TOWN, exam)
    table = exam / "test" / "qingshi_town_test.csv"
    first = table.read_text(encoding="utf-8").splitlines()[1].split(",")[1]
    table.write_text(table.read_text(encoding="utf-8").replace(first, f"{SCRIPT}{first}", 1), encoding="utf-8")
    opened = load_exam(exam, split=None, shots=0)
    asked = [(subject.key, question) for subject in opened.subjects for question in subject.questions]
    for stage in ("base", "sft"):
        answers = []
        for subject, question in asked:
            choice = "A" if stage == "base" else question.answer
            logprobs = tuple(-0.5 if letter == choice else -2.5 for letter in "ABCD")
            answers.append(Answer(subject, question.id, question.answer, choice, logprobs, 0.85, 9, False))
        measured = figures.exam_figures(opened, answers, samples=100, seed=1)
        about = {"asked": "ab" * 8, "protocol": {"name": "official", "version": 1}}
        report = {"benchmark": "town", "split": "test", "stage": stage, "about": about, **measured}
        Records(results, stage, "town").save_exam(answers, report, labelled=True)  # type: ignore[arg-type]
