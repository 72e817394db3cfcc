"""Small run folders for comparisons, whose figures can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fabricated
import yaml

from mlx_zh.recipe import load_recipe
from mlx_zh.system.storage import write_json, write_text

SFT = [
    {"step": 0, "eval_loss": 2.0},
    {"step": 1, "loss": 2.0, "scored_tokens": 100, "elapsed_seconds": 60.0},
    {"step": 2, "loss": 1.0, "scored_tokens": 100, "elapsed_seconds": 120.0},
    {"step": 2, "eval_loss": 1.5},
]


def write_run(folder: Path, lines: list[dict[str, Any]] = SFT, **recipe: Any) -> Path:
    """A finished run of SFT with these metrics; `recipe` are keys of its recipe, such as sft={"batch_size": 2}."""
    values = {
        "name": folder.name,
        "runs": str(folder.parent),
        "model": {"path": "owner/model"},
        "data": {"sft": {"train": ["my.jsonl"], "validation": ["my-validation.jsonl"]}},
        "evaluate": {"bootstrap": 20_000},
    }
    write_text(folder / "recipe.yaml", yaml.safe_dump(values | recipe, allow_unicode=True))
    write_text(folder / "recipe.yaml", load_recipe(folder / "recipe.yaml", beside=None).to_yaml())
    model = {"source": "owner/model", "fingerprint": "0123456789abcdef"}
    fabricated.write_manifest(folder, model=model, data={"my.jsonl": "ab" * 32, "my-validation.jsonl": "cd" * 32})
    fabricated.write_metrics(folder, "sft", lines)
    sources = [
        {"name": "my.jsonl", "files": ["my.jsonl"], "train": 8, "validation": 0},
        {"name": "my-validation.jsonl", "files": ["my-validation.jsonl"], "train": 0, "validation": 2},
    ]
    write_json(folder / "data" / "report.json", {"sft": {"key": "ab" * 16, "sources": sources}})
    write_json(
        folder / "pipeline.json", {"stages": {name: {"inputs": {}, "outputs": {}} for name in ("sft", "report")}}
    )
    return folder


def write_exam(
    folder: Path, right: dict[str, str], *, asked: str = "same", version: int = 1, title: str = "My exam"
) -> None:
    """An exam of one subject: for each stage a text such as "1101", whether each answer is right."""
    for stage, answers in right.items():
        rate = answers.count("1") / len(answers)
        row = {"macro": rate, "interval": [rate, rate], "questions": len(answers), "members": ["town"]}
        report = {
            "benchmark": title,
            "split": "test",
            "about": {"asked": asked, "protocol": {"name": "cloze", "version": version}},
            "questions": len(answers),
            "letters": {"predicted": {"A": len(answers)}},
            "rows": [{"name": "Average", **row}],
            "chance": [0.1, 0.4],
        }
        write_json(folder / "eval" / f"{stage}-my.json", report)
        lines = [
            {"subject": "town", "id": str(number), "choice": "A", "truth": "A" if digit == "1" else "B"}
            for number, digit in enumerate(answers)
        ]
        write_text(folder / "eval" / f"{stage}-my.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def paired(won: int, lost: int, count: int = 200) -> tuple[str, str]:
    """The answers of two models, of which the second wins `won` questions and loses `lost`."""
    rest = count - won - lost
    return "0" * won + "1" * lost + "1" * rest, "1" * won + "0" * lost + "1" * rest
