"""A run folder as the stages leave it, with invented figures, so that reports can be tested without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlx_zh.exams import catalog, figures, statistics
from mlx_zh.exams.answers import Answer
from mlx_zh.exams.csvfile import Question
from mlx_zh.exams.exam import Exam, Subject
from mlx_zh.exams.records import Records
from mlx_zh.system.storage import write_json, write_text

RECIPE: dict[str, Any] = {
    "name": "invented",
    "model": {"path": "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit"},
    "data": {"sft": {"train": ["data/my-sft.jsonl"]}, "dpo": {"train": ["data/my-dpo.jsonl"]}},
    "evaluate": {"bootstrap": 200},
}
PROMPTS = ["用三句话介绍一下端午节。", "请用一句话解释“画蛇添足”。", "小明有 12 个苹果，给了小红 5 个，还剩几个？"]
ANSWERS = {
    "base": [
        "The Dragon Boat Festival (端午节) is a traditional Chinese holiday…",
        "画蛇添足 means to draw a snake and add feet to it.",
        "7 个苹果",
    ],
    "sft": [
        "端午节是农历五月初五。人们吃粽子、赛龙舟。它纪念诗人屈原。",
        "比喻做了多余的事，反而不恰当。",
        "小明还剩 12 - 5 = 7 个苹果。",
    ],
    "dpo": [
        "端午节在每年农历五月初五，是中国的传统节日。这一天，人们包粽子、赛龙舟、挂艾草，祈求平安健康。"
        "节日也寄托着人们对爱国诗人屈原的怀念。",
        "画蛇时给蛇添上脚，比喻做多余的事，不但无益，反而坏事。",
        "12 − 5 = 7，小明还剩 7 个苹果。",
    ],
}


def write_run(folder: Path, *, steps: int = 300, questions: Mapping[str, int] | None = None, seed: int = 0) -> Path:
    """Everything that a whole run leaves; `questions` a subject by benchmark."""
    rng = np.random.default_rng(seed)
    write_manifest(folder)
    write_metrics(folder, "sft", sft_lines(rng, steps))
    write_metrics(folder, "dpo", dpo_lines(rng, steps * 2 // 3))
    write_json(folder / "data" / "report.json", {"sft": data_report(rng, 3200), "dpo": data_report(rng, 900)})
    fidelity = {"kl": 0.0021, "top1": 0.991, "perplexity": 5.31, "fused_perplexity": 5.32}
    written = {"detail": "4 bits, groups of 64", "size": 4_517_000_000, "fidelity": fidelity, "warnings": []}
    write_json(folder / "fused" / "summary.json", {"mlx": written})
    write_json(folder / "samples.json", {"prompts": PROMPTS, "answers": ANSWERS})
    rates = {"base": 0.50, "sft": 0.53, "dpo": 0.545}
    for key, count in (questions or {"ceval": 26, "cmmlu": 30}).items():
        write_exam(folder / "eval", key, count, rates, rng)
    stages = {"eval-base": 1260.4, "sft": 9804.0, "eval-sft": 1255.0, "dpo": 6120.7, "eval-dpo": 1249.9, "fuse": 62.0}
    records = {name: {"seconds": seconds, "joules": seconds * 38.0} for name, seconds in stages.items()}
    write_json(folder / "pipeline.json", {"stages": records})
    return folder


def write_manifest(folder: Path, **changes: Any) -> None:
    manifest = {
        "versions": {"python": "3.12.4", "mlx-zh": "0.1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2"},
        "machine": {"system": "macOS-15.5-arm64", "processor": "arm64", "device": "Device(gpu, 0)"},
        "git_commit": "5f2c6a1d0c3b4e5f60718293a4b5c6d7e8f90123",
        "command": ["mlx-zh", "sft", "recipe.yaml"],
        "model": {"source": "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", "fingerprint": "0123456789abcdef"},
        "data": {"data/my-sft.jsonl": "ab" * 32, "data/my-sft-validation.jsonl": "cd" * 32},
    }
    write_json(folder / "manifest.json", manifest | changes)


def write_metrics(folder: Path, stage: str, lines: list[dict[str, Any]], **summary: Any) -> None:
    write_text(folder / stage / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    steps = [line for line in lines if "loss" in line]
    known = {
        "finished": "done",
        "steps": len(steps),
        "seconds": steps[-1]["elapsed_seconds"],
        "skipped_steps": 0,
        "eval_loss_before": losses[0],
        "eval_loss_after": losses[-1],
        "best": {"step": len(steps), "eval_loss": min(losses)},
    }
    write_json(folder / stage / "summary.json", known | summary)


def data_report(rng: np.random.Generator, rows: int) -> dict[str, Any]:
    """As `prepare` writes it for a stage."""
    counts, edges = np.histogram(rng.lognormal(5.2, 0.6, rows).clip(20, 1024), bins=24)
    lengths = {"examples": rows, "tokens": rows * 212, "scored_tokens": rows * 131, "median": 186, "p95": 502}
    histogram = {"edges": [round(float(edge), 1) for edge in edges], "counts": [int(count) for count in counts]}
    dropped = {"exact duplicates": 41, "near duplicates": 118, "exam questions": 7}
    source = {"name": "data/my.jsonl", "rows": rows + 166, "train": rows, "validation": 0, "dropped": dropped}
    return {
        "key": "ab" * 16,
        "sources": [source],
        "train": lengths | {"longest": 1024, "histogram": histogram},
        "over_long": 12,
        "over_long_share": 12 / rows,
        "exam_questions": {"exams": ["ceval", "cmmlu"], "missing": {}, "checked": 13263},
        "exam_rows": [1] * 7,
        "tokens_per_chinese_character": 0.93,
    }


def step_line(step: int, loss: float, total: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 2 * step / total,
        "loss": loss,
        "learning_rate": 1e-4 * (1 - step / total),
        "grad_norm": 0.8 + 0.2 * float(np.cos(step)),
        "scored_tokens": 2100,
        "tokens": 5400,
        "tokens_per_second": 165.0 + step % 7,
        "peak_memory_gb": 11.25,
        "elapsed_seconds": 32.5 * step,
    }


def sft_lines(rng: np.random.Generator, steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        level = 1.35 + 0.75 * np.exp(-step / (steps / 6))
        if step:
            lines.append(step_line(step, float(level + rng.normal(0, 0.09)), steps))
        if step % max(1, steps // 10) == 0:
            lines.append({"step": step, "epoch": 2 * step / steps, "eval_loss": float(level + 0.06)})
    return lines


def dpo_lines(rng: np.random.Generator, steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "eval_loss": float(np.log(2))}]
    for step in range(1, steps + 1):
        grown = 1 - np.exp(-step / (steps / 3))
        chosen = float(0.35 * grown + rng.normal(0, 0.06))
        rejected = float(-0.75 * grown + rng.normal(0, 0.09))
        accuracy = float(np.clip(round(16 * (0.5 + 0.28 * grown + rng.normal(0, 0.08))) / 16, 0, 1))
        line = step_line(step, float(np.log1p(np.exp(rejected - chosen))), steps)
        line |= {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        line |= {"rewards/accuracies": accuracy, "logps/chosen": -210.0, "logps/rejected": -230.0}
        lines.append(line)
        if step % max(1, steps // 5) == 0:
            figures = {"eval_loss": 0.69 - 0.2 * grown, "eval_rewards/accuracies": 0.5 + 0.25 * grown}
            lines.append({"step": step, "epoch": step / steps, **{k: float(v) for k, v in figures.items()}})
    return lines


def write_exam(folder: Path, key: str, count: int, rates: Mapping[str, float], rng: np.random.Generator) -> None:
    """Results of several models on one benchmark, written by the code that writes real ones."""
    exam = invented_exam(key, count)
    known = [(subject.key, question) for subject in exam.subjects for question in subject.questions]
    skill = {subject.key: rng.normal(0, 0.1) for subject in exam.subjects}
    drawn = rng.random(len(known))
    answers, found = {}, {}
    for stage, rate in rates.items():
        again = rng.random(len(known))
        mixed = np.where(rng.random(len(known)) < 0.85, drawn, again)  # models agree on most questions
        answers[stage] = [_answer(s, q, bool(m < rate + skill[s])) for (s, q), m in zip(known, mixed, strict=True)]
        measured = figures.exam_figures(exam, answers[stage], samples=200, seed=0)
        about = {"asked": "ab" * 8, "protocol": {"name": "official", "version": 1}}
        found[stage] = {"benchmark": exam.title, "split": exam.split, "stage": stage, "about": about, **measured}
    for stage, result in found.items():
        sides = {name: figures.by_subject(given) for name, given in answers.items() if name != stage}
        own = figures.by_subject(answers[stage])
        result["against"] = {n: asdict(statistics.compare(side, own, 200, 0)) for n, side in sides.items()}
        Records(folder, stage, key).save_exam(answers[stage], result, labelled=True)


def invented_exam(key: str, count: int) -> Exam:
    benchmark = catalog.benchmark(key)
    subjects = []
    for name, entry in benchmark.subjects.items():
        questions = tuple(_question(number) for number in range(count))
        subjects.append(Subject(name, entry, (), questions))
    total = count * len(subjects)
    return Exam(key, benchmark.title, benchmark.form, benchmark.default_split, benchmark.rows, tuple(subjects), total)


def _question(number: int) -> Question:
    return Question(str(number), f"第 {number} 题", ("甲", "乙", "丙", "丁"), "ABCD"[number % 4])


def _answer(subject: str, question: Question, right: bool) -> Answer:
    truth = question.answer
    assert truth is not None
    choice = truth if right else "ABCD"[("ABCD".index(truth) + 1) % 4]
    logprobs = tuple(-0.4 if letter == choice else -2.2 for letter in "ABCD")
    return Answer(subject, question.id, truth, choice, logprobs, 0.9, 400, False)
