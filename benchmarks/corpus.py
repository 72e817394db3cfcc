"""Preparing 300,000 rows here against mlx-lm's ChatDataset + CacheDataset; what deduplication finds, and what not.

    python benchmarks/corpus.py speed [--rows 300000] [--small 100000] [--peer-rows 300000] [--json FILE]
    python benchmarks/corpus.py planted

The rows are mixed like a real run's (`SHARES`). They are made from real samples beside the checkout (../shared/data)
by recombining their sentences, so they are as many, as long and as Chinese as the real ones, and hardly two are
alike. Both programs tokenize with Llama 3.1's real tokenizer, each in a process of its own. Memory is that of a
process and all its children together, read every 50 ms. mlx-lm gets the rows in its own form: converted, clean, one
file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import measuring
import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT.parent / "shared" / "data"
sys.path[:0] = [str(ROOT / "tests" / "corpus")]

# name -> its share of the rows; arithmetic-synthetic makes the rest
SHARES = {"belle-1m": 0.66, "llama3-chinese": 0.16, "chinese-modern-poetry": 0.06, "python-code-18k": 0.06}
PEER = """
import json, os, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
folder, tokenizer, mask, count = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
begun, used = time.perf_counter(), time.process_time()
rows = []
with open(Path(folder, "messages.jsonl"), encoding="utf-8") as file:
    for line in file:
        rows.append(json.loads(line))
        if len(rows) == int(count):
            break
data = CacheDataset(ChatDataset(rows, tokenizer, mask_prompt=mask == "mask"))
tokens = sum(len(data[i][0]) for i in range(len(data)))
seconds, used = time.perf_counter() - begun, time.process_time() - used
print(json.dumps({"rows": len(rows), "seconds": seconds, "cpu_seconds": used, "tokens": tokens}))
"""


# ---- rows


class Perturbed:
    """Conversations of one kind, made of the sentences of real ones."""

    def __init__(self, conversations: list[list[tuple[str, str]]], rng: random.Random) -> None:
        self._conversations, self._rng = conversations, rng
        self._sentences = [s for turns in conversations for _, text in turns for s in sentences(text)]

    def __next__(self) -> list[tuple[str, str]]:
        return [(role, self._changed(text)) for role, text in self._rng.choice(self._conversations)]

    def _changed(self, text: str) -> str:
        parts = sentences(text)
        changed = "".join(self._rng.choice(self._sentences) if self._rng.random() < 0.6 else part for part in parts)
        return changed if changed.strip() else text


def sentences(text: str) -> list[str]:
    return [part for part in re.findall(r"[^。！？；，\n.!?,]*[。！？；，\n.!?,]?", text) if part]


def sources(rng: random.Random) -> dict[str, Iterator[list[tuple[str, str]]]]:
    from mlx_zh.corpus.formats import load_conversations
    from mlx_zh.corpus.preferences import load_preferences

    def talk(*names: str) -> Perturbed:
        found = [c for name in names for c in load_conversations(SAMPLES / "sft" / name, on_invalid="skip")[0]]
        return Perturbed([[(m.role, m.content) for m in c.messages if m.role != "system"] for c in found], rng)

    poems = [json.loads(line) for line in (SAMPLES / "sft" / "modern_poetry_pd_sample.jsonl").open(encoding="utf-8")]
    english = load_preferences(SAMPLES / "dpo" / "dpo_en_demo.json", on_invalid="skip")[0]
    return {
        "belle-1m": talk("alpaca_zh_demo.json", "ruozhiba_qa2449_gpt4o.json", "belle_zh_seed_tasks.json"),
        "llama3-chinese": talk("oaast_sft_zh.json"),
        "chinese-modern-poetry": Perturbed(
            [[("user", f"以《{p['title']}》为题写一首现代诗。"), ("assistant", p["text"])] for p in poems], rng
        ),
        "python-code-18k": Perturbed(
            [[("user", p.prompt[-1].content), ("assistant", p.chosen)] for p in english], rng
        ),
    }


def shape(name: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """A row in the published form of a data set."""
    first, last = turns[0][1], turns[-1][1]
    if name == "llama3-chinese":
        return {"conversations": [{"from": "human" if r == "user" else "gpt", "value": t} for r, t in turns]}
    if name == "chinese-modern-poetry":
        return {"prompt": first, "response": last}
    return {"instruction": first, "input": "", "output": last}


def write_mix(folder: Path, rows: int, tokenizer: Path) -> Path:
    """Data files, the same rows for mlx-lm, and a recipe."""
    import pyarrow as pa
    from pyarrow import parquet

    from mlx_zh.corpus.arithmetic import problems
    from mlx_zh.corpus.formats import arithmetic

    rng = random.Random(0)
    counts = {name: int(rows * share) for name, share in SHARES.items()}
    train: list[dict[str, Any]] = []
    with (folder / "messages.jsonl").open("w", encoding="utf-8") as peer:

        def tell(turns: list[tuple[str, str]]) -> None:
            messages = [{"role": role, "content": text} for role, text in turns]
            peer.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")

        for name, made in sources(rng).items():
            found = []
            for _ in range(counts[name]):
                turns = next(made)
                tell(turns)
                found.append(shape(name, turns))
            path = folder / f"{name}.{'parquet' if name == 'python-code-18k' else 'json'}"
            if path.suffix == ".parquet":
                parquet.write_table(pa.Table.from_pylist(found), path, row_group_size=5000)
            elif name == "llama3-chinese":
                path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
            else:
                path.write_text(
                    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8"
                )
            train.append({"name": name, "path": str(path)})
        generated = rows - sum(counts.values())
        for line in problems(42, generated):
            tell([(m.role, m.content) for m in arithmetic(line)])
        train.append({"name": "arithmetic-synthetic", "max_samples": generated})
    recipe = {
        "name": "corpus",
        "runs": str(folder / "runs"),
        "model": {"path": str(tokenizer)},
        "data": {
            "sft": {"train": train},
            "on_invalid": "skip",
            "decontaminate": {"benchmarks": ["ceval", "cmmlu"]},
            "validation_fraction": 0.01,
        },
        "evaluate": {"folder": {"ceval": str(SAMPLES / "ceval"), "cmmlu": str(SAMPLES / "cmmlu")}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return folder / "recipe.yaml"


# ---- time and memory


def watched(command: list[str], environment: dict[str, str]) -> tuple[float, float, float, str]:
    """Run a command: seconds, processor seconds, peak memory of it and all its children in MB, and its output."""
    before = os.times()
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, env=environment)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - begun
        after = os.times()
        out.seek(0)
        text = out.read()
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}:\n{text}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, used, peak, text


def tree_memory(root: int) -> float:
    """Resident memory of a process and its children, in MB."""
    resident = 0
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(root)
        for process in (first, *first.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                resident += process.memory_info().rss
    return resident / 2**20


def ours(folder: Path, recipe: Path) -> dict[str, float]:
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    environment["MLX_ZH_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-m", "mlx_zh.prepare", str(recipe), "--show", "0"]
    seconds, used, peak, text = watched(command, environment)
    print(text)
    again, *_ = watched(command, environment)
    report = json.loads((folder / "runs" / "corpus" / "data" / "report.json").read_text(encoding="utf-8"))["sft"]
    size = sum(path.stat().st_size for path in Path(report["folder"]).iterdir())
    rows = sum(source["rows"] for source in report["sources"])
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "cpu_us_per_row": round(used / rows * 1e6),
        "peak_rss_mb": round(peak),
        "cache_mb": round(size / 2**20, 1),
        "second_run_seconds": round(again, 2),
    }


def peer(folder: Path, tokenizer: Path, mask: str, rows: int) -> dict[str, float]:
    _, _, peak, text = watched(
        [sys.executable, "-c", PEER, str(folder), str(tokenizer), mask, str(rows)], {**os.environ}
    )
    found = json.loads(text.splitlines()[-1])
    return {
        "rows": found["rows"],
        "seconds": round(found["seconds"], 1),
        "rows_per_second": round(found["rows"] / found["seconds"]),
        "cpu_us_per_row": round(found["cpu_seconds"] / found["rows"] * 1e6),
        "peak_rss_mb": round(peak),
    }


def speed(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import llama31_tokenizer
    import measuring

    from mlx_zh.system import storage

    tokenizer = folder / "llama31"
    llama31_tokenizer.tokenizer(llama31_tokenizer.ranks(storage.cache_folder() / "tests")).save_pretrained(tokenizer)
    (tokenizer / "config.json").write_text(json.dumps(measuring.LLAMA31_8B))  # a folder without it is no model
    found: dict[str, Any] = {}
    for label, rows in (("small", arguments.small), ("large", arguments.rows)):
        place = folder / label
        place.mkdir()
        recipe = write_mix(place, rows, tokenizer)
        found[label] = ours(place, recipe)
        print(f"mlx-zh, {rows} rows:", found[label], flush=True)
    grown = found["large"]["peak_rss_mb"] - found["small"]["peak_rss_mb"]
    print(f"peak memory grew by {grown} MB from {arguments.small} to {arguments.rows} rows")
    for mask, rows in (("plain", arguments.peer_rows), ("mask", min(arguments.peer_rows, 30_000))):
        theirs = peer(folder / "large", tokenizer, mask, rows)
        ratio = found["large"]["rows_per_second"] / theirs["rows_per_second"]
        share = found["large"]["peak_rss_mb"] / theirs["peak_rss_mb"]
        name = "mask_prompt" if mask == "mask" else "default"
        found[f"mlx-lm, {name}"] = theirs
        print(f"mlx-lm, {name}, {rows} rows:", theirs)
        print(f"  mlx-zh makes x {ratio:.1f} its rows a second, in x {share:.2f} of its peak memory", flush=True)
    return found


# ---- planted cases

Change = Callable[[str, random.Random], str]


def edited(rate: float) -> Change:
    """So many of a text's characters replaced, removed or followed by another."""

    def change(text: str, rng: random.Random) -> str:
        characters = list(text)
        for _ in range(max(1, round(len(text) * rate))):
            at, kind = rng.randrange(len(characters)), rng.random()
            other = rng.choice("的一是不了在人有我他这中大来上个国和也子时道说")
            characters[at] = other if kind < 0.5 else "" if kind < 0.75 else characters[at] + other
        return "".join(characters)

    return change


NEAR: dict[str, Change] = {
    "other punctuation and spaces": lambda text, rng: text.replace("，", ", ").replace("。", ".  ") + "\n",
    "a polite frame": lambda text, rng: f"请问一下，{text}谢谢！",
    "1 % of characters edited": edited(0.01),
    "2 % edited": edited(0.02),
    "3 % edited": edited(0.03),
    "5 % edited": edited(0.05),
    "last tenth missing": lambda text, rng: text[: int(len(text) * 0.9)],
    "half of it other text (not a duplicate)": lambda text, rng: (
        text[: len(text) // 2] + text[::-1][: len(text) // 2]
    ),
}


def questions(row: dict[str, str], kind: str, rng: random.Random) -> str:
    """An exam question as it may stand in training data."""
    options = [f"{letter}. {row[letter]}" for letter in "ABCD"]
    if kind == "stem and answer":
        return f"{row['question']}答案是{row[row['answer']]}"
    if kind == "inside a longer text":
        return (
            "小王在复习时遇到这样一道题，想请你讲一讲。" * 3
            + "\n".join([row["question"], *options])
            + "\n请详细说明理由。"
        )
    if kind == "options in another order":
        rng.shuffle(options)
    text = "\n".join([row["question"], *options])
    rate = {"3 % edited": 0.03, "5 % edited": 0.05}.get(kind)
    return text if rate is None else edited(rate)(text, rng)


EXAM_KINDS = (
    "as in the exam",
    "stem and answer",
    "inside a longer text",
    "options in another order",
    "3 % edited",
    "5 % edited",
)


def planted(folder: Path) -> None:
    import csv

    import llama31_tokenizer

    from mlx_zh.corpus.build import prepare
    from mlx_zh.corpus.choosing import ChoiceSettings
    from mlx_zh.corpus.formats import load_conversations
    from mlx_zh.corpus.prepared import CorpusSettings, Exams
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.corpus.shards import RenderSettings
    from mlx_zh.corpus.sources import DataSource
    from mlx_zh.system import storage

    renderer = Renderer(llama31_tokenizer.tokenizer(llama31_tokenizer.ranks(storage.cache_folder() / "tests")))
    rng = random.Random(1)
    names = ("alpaca_zh_demo.json", "ruozhiba_qa2449_gpt4o.json", "oaast_sft_zh.json")
    real = [c for name in names for c in load_conversations(SAMPLES / "sft" / name, on_invalid="skip")[0]]
    plain = [[(m.role, m.content) for m in c.messages if m.role != "system"] for c in real]
    long = [turns for turns in plain if sum(len(text) for _, text in turns) >= 60]
    chosen = rng.sample(long, 1000)

    def source(name: str, rows: list[list[tuple[str, str]]]) -> DataSource:
        path = folder / f"{len(list(folder.iterdir()))}.jsonl"
        lines = ({"messages": [{"role": role, "content": text} for role, text in turns]} for turns in rows)
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        return DataSource(name, (str(path),))

    def report(listed: list[DataSource], exams: dict[str, str]) -> dict[str, dict[str, int]]:
        settings = CorpusSettings(
            RenderSettings("sft", "assistant", None, "truncate", None),
            ChoiceSettings(),
            Exams(exams, {}),
            on_invalid="skip",
        )
        corpus = prepare(listed, settings, renderer, folder / "cache", lambda *_: None)
        return {found["name"]: found["dropped"] for found in corpus.manifest["report"]["sources"]}

    print("Near duplicates: 1,000 planted rows of each kind behind the", len(plain), "real ones")
    for name, change in NEAR.items():
        rows = [[(role, change(text, rng)) for role, text in turns] for turns in chosen]
        found = report([source("real", plain), source(name, rows)], {})
        dropped = sum(found[name].values())
        print(f"  {name:<42} {dropped / 10:5.1f} % dropped")
    print("  in the real rows themselves:", found["real"])

    exams = {name: str(SAMPLES / name) for name in ("ceval", "cmmlu")}
    every = []
    for path in [*SAMPLES.glob("ceval/val/*.csv"), *SAMPLES.glob("cmmlu/test/*.csv")]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                every.append(
                    {name.replace("Q", "q").replace("An", "an"): value for name, value in row.items() if name}
                )
    chosen_questions = rng.sample(every, 1000)
    print("Exam questions: 1,000 planted rows of each kind, of", len(every))
    for kind in EXAM_KINDS:
        rows = [
            [("user", questions(row, kind, rng)), ("assistant", row["answer"] + "。")] for row in chosen_questions
        ]
        found = report([source("real", plain), source(kind, rows)], exams)
        print(f"  {kind:<42} {found[kind].get('exam question', 0) / 10:5.1f} % found")
    print(f"  false drops in {len(plain)} real rows: {found['real'].get('exam question', 0)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "planted"])
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--small", type=int, default=100_000)
    parser.add_argument("--peer-rows", type=int, default=300_000)
    parser.add_argument("--json", type=Path, help="write the figures of `speed` here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "speed":
            found = speed(arguments, Path(folder))
            measuring.write(arguments.json, measuring.about(arguments), found)
        else:
            planted(Path(folder))


if __name__ == "__main__":
    main()
