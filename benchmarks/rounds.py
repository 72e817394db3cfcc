"""Does a small model learn from its own answers? Rounds of sample, rule and DPO on sums, counted on unseen ones.

    python benchmarks/rounds.py FOLDER [--model smollm2-135m-instruct] [--rounds 2] [--prompts 400] [--unseen 300]

Writes exercises and a recipe into FOLDER and runs it: SFT on a few solved exercises, which teaches the form of an
answer, then the rounds on other exercises. Each model then answers exercises that none has seen, greedily; the table
has right answers with Wilson's 95 % intervals, and each model against the one before on the same exercises (McNemar's
exact test). A second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from pathlib import Path

from mlx_zh.corpus.samples import Sampled, read_samples
from mlx_zh.exams.statistics import wilson
from mlx_zh.judging.rules import right

RECIPE = """name: sums
model: {{path: {model}}}
lora: {{rank: 16, alpha: 32}}
data:
  sft: {{train: [solved.jsonl]}}
  deduplicate: {{exact: false, near: null}}
  max_length: 128
sft: {{epochs: {epochs}, batch_size: 8, learning_rate: 5.0e-4, lr_scheduler: cosine, warmup_ratio: 0.1}}
dpo: {{epochs: 1, batch_size: 8, learning_rate: {learning_rate}, lr_scheduler: cosine, warmup_ratio: 0.1, beta: 0.1}}
evaluate: {{max_new_tokens: 8}}
rounds: {{count: {rounds}, prompts: exercises.jsonl, samples: {samples}, max_new_tokens: 8, check: 0.25}}
seed: {seed}
"""


def exercises(count: int, seed: int) -> list[tuple[str, str]]:
    """Different sums and differences of numbers up to 40, and their results."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        one, other = sorted((rng.randint(1, 40), rng.randint(1, 40)), reverse=True)
        sign = rng.choice("+-")
        found[f"{one}{sign}{other}="] = str(one + other if sign == "+" else one - other)
    return list(found.items())


def write(folder: Path, arguments: argparse.Namespace) -> None:
    """Write exercises, each in one file only, and the recipe."""
    every = exercises(arguments.solved + arguments.prompts + arguments.unseen, arguments.seed)
    parts = {"solved": arguments.solved, "exercises": arguments.prompts, "unseen": arguments.unseen}
    for name, count in parts.items():
        part, every = every[:count], every[count:]
        rows = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in part
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    values = {
        "model": arguments.model,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
        "epochs": arguments.epochs,
    }
    values["samples"] = arguments.samples
    recipe = RECIPE.format(**values, learning_rate=arguments.learning_rate)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")


def command(folder: Path, *words: str) -> None:
    """Run a command of this program in the folder."""
    subprocess.run([sys.executable, "-m", f"mlx_zh.{words[0]}", *words[1:]], cwd=folder, check=True)


def answered(folder: Path, run: str, stage: str) -> dict[str, bool]:
    """Whether a model's greedy answer to each unseen exercise is right, by the exercise's id."""
    words = ["sample", run, "--stage", stage, "--prompts", "unseen.jsonl", "--n", "1", "--temperature", "0"]
    command(folder, *words, "--max-tokens", "8", "--label", f"unseen-{stage}")
    samples: list[Sampled] = read_samples(folder / run / "samples" / f"unseen-{stage}" / "answers.jsonl")
    return {one.id: right(one, one.answers[0].text) is True for one in samples}


def next_round(folder: Path, run: str, arguments: argparse.Namespace) -> str:
    """The run of the round after `run`; where the rounds ended before it, it is made from that run's own recipe."""
    path = Path(run)
    after = path.with_name(str(int(path.name) + 1)) if path.name.isdecimal() else path / "rounds" / "1"
    if (folder / after / "dpo" / "adapters").is_dir():
        return str(after)
    settings = f"prompts: exercises.jsonl, samples: {arguments.samples}, max_new_tokens: 8, check: 0.25"
    command(folder, "stages.rounds", run, f"rounds={{count: 1, {settings}}}")
    return f"{run}/rounds/1"


def mcnemar(won: int, lost: int) -> float:
    """The two-sided p of McNemar's exact test."""
    count = won + lost
    tail = sum(math.comb(count, k) for k in range(min(won, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)


def main() -> None:
    """Write, run, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--solved", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--unseen", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", default="1.0e-4")
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt of a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, arguments)
    command(folder, "run", "recipe.yaml")
    models = [("runs/sums", "base"), ("runs/sums", "sft")]
    for _ in range(arguments.rounds):
        models.append((next_round(folder, models[-1][0], arguments), "dpo"))
    before: dict[str, bool] = {}
    results = []
    for run, stage in models:
        now = answered(folder, run, stage)
        low, high = wilson(sum(now.values()), len(now))
        won = sum(now[id] and not before[id] for id in before)
        lost = sum(before[id] and not now[id] for id in before)
        name = f"{run.removeprefix('runs/sums').strip('/')} {stage}".strip()
        line = {"model": name, "right": sum(now.values()), "unseen": len(now), "interval": [low, high]}
        line |= {"won": won, "lost": lost, "p": mcnemar(won, lost)}
        results.append(line)
        print(
            f"{name:<24} {sum(now.values()):>4} / {len(now)}  {sum(now.values()) / len(now):6.1%} "
            f"({low:.1%} to {high:.1%})  won {won}, lost {lost}, p {mcnemar(won, lost):.2g}"
        )
        before = now
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
