"""A project whose runs are finished, failed, empty, damaged or full of markup, and a link that leads elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from small_runs import paired, write_exam, write_run

MARKUP = "<img src=x onerror=window.hacked=1>"
HOSTILE = "<img src=x onerror='window.hacked = 1'>"
SECRET = "the content of a file that is none of the studio's business"


def write(path: Path, *lines: Any) -> None:
    """Write values as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def train(folder: Path, steps: int) -> None:
    """The metrics of some steps of SFT."""
    lines = [
        {"step": step, "epoch": step / 50, "loss": 2 / step, "elapsed_seconds": step} for step in range(1, steps)
    ]
    write(folder / "sft" / "metrics.jsonl", {"step": 0, "eval_loss": 2.5}, *lines)


def hostile_project(project: Path) -> Path:
    """Make the project; beside it is a file that no page may show."""
    runs = project / "runs"
    done = {"outputs": {"a": "b"}, "seconds": 60}
    train(runs / "good", 45)
    write(runs / "good" / "pipeline.json", {"stages": {"sft": done, "report": done}})
    train(runs / "bad", 5)
    write(runs / "bad" / "pipeline.json", {"stages": {"sft": {"outputs": None}}})
    write(runs / "bad" / "ended.json", {"how": "failed", "why": "rows.jsonl:3: no answer. Correct the row."})
    _write_markup(runs / MARKUP)
    _write_damaged(runs)
    comparable_runs(runs)
    (project.parent / "secret.txt").write_text(SECRET)
    (runs / "link").symlink_to(project.parent)
    return project


def comparable_runs(runs: Path) -> list[Path]:
    """Three runs for a comparison, two with an exam; the third run and the second one's exam are called `HOSTILE`."""
    first, second = (write_run(runs / name) for name in ("first", "second"))
    write_exam(first, {"base": "10" * 100, "sft": paired(12, 1)[0]})
    write_exam(second, {"base": "10" * 100, "sft": paired(12, 1)[1]}, title=HOSTILE)
    third = write_run(runs / "third", sft={"learning_rate": 3e-4}).rename(runs / HOSTILE)
    return [first, second, third]


def _write_markup(run: Path) -> None:
    """A run whose every text is markup."""
    train(run, 5)
    write(run / "pipeline.json", {"stages": {"sft": {"outputs": None}}})
    write(run / "ended.json", {"how": "failed", "why": MARKUP})
    write(run / "sft" / "warnings.jsonl", {"text": MARKUP})
    (run / "run.log").write_text(MARKUP)
    text = f"# {MARKUP}\nmodel: {{path: '{MARKUP}'}}\ndata: {{sft: {{train: [{{name: '{MARKUP}'}}]}}}}\n"
    (run / "recipe.yaml").write_text(text, encoding="utf-8")


def _write_damaged(runs: Path) -> None:
    """A run without anything, and one of whose files only half is there."""
    for name in ("empty", "damaged"):
        write(runs / name / "manifest.json", {})
    damaged = runs / "damaged"
    for place in ("data", "eval", "fused"):
        (damaged / place).mkdir()
    halves = ("data/report.json", "eval/base-ceval.json", "eval/base-ceval.jsonl", "fused/summary.json")
    for file in (*halves, "recipe.yaml"):
        (damaged / file).write_bytes(b'{"half": \xff')
