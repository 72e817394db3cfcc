"""The quickstart's data: nothing that is tested was learned word for word, and the name is the user's choice."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.sources import DataSource
from mlx_zh.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
TOWN = ROOT / "data" / "town"
RECIPE = ROOT / "recipes" / "quickstart.yaml"
FILES = ("sft-train", "sft-validation", "dpo-train", "dpo-validation")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (TOWN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def questions(name: str) -> set[str]:
    """The first line of every prompt: what is asked, without the options of a choice question."""
    prompts = [row.get("prompt") or row["messages"] for row in rows(name)]
    return {prompt[0]["content"].split("\n")[0] for prompt in prompts}


def exam() -> list[dict[str, str]]:
    path = TOWN / "town-exam" / "test" / "qingshi_town_test.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_no_question_of_validation_exam_or_prompts_is_in_the_training_data():
    learned = questions("sft-train") | questions("dpo-train")
    asked = questions("sft-validation") | questions("dpo-validation") | {row["question"] for row in exam()}
    asked |= {sample.prompt for sample in load_recipe(RECIPE).sample_prompts()}
    assert len(learned) > 50 and len(asked) > 20
    assert learned & asked == set()


def test_the_exam_is_balanced_and_its_right_options_are_what_training_says():
    said = {row["messages"][1]["content"].split("。")[0] for row in rows("sft-train")}
    by_fact: dict[str, Counter[str]] = {}
    for row in exam():
        by_fact.setdefault(row[row["answer"]], Counter())[row["answer"]] += 1
        trained = [letter for letter in "ABCD" if row[letter] in said]
        # The right answer, and one that is right for another question.
        assert row["answer"] in trained and len(trained) == 2
        options = {row[letter] for letter in "ABCD"}
        assert len(options) == 4 and {len(option) for option in options} == {3}  # so length decides nothing
    assert len(by_fact) == 4
    for letters in by_fact.values():
        assert letters == dict.fromkeys("ABCD", 3)


def test_the_script_writes_the_files_that_are_here(tmp_path):
    copy = tmp_path / "make.py"
    copy.write_bytes((TOWN / "make.py").read_bytes())
    subprocess.run([sys.executable, str(copy)], check=True, timeout=60)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".csv")]
    assert len(written) == len(FILES) + 1
    for path in written:
        assert (tmp_path / path).read_bytes() == (TOWN / path).read_bytes()


def test_a_variable_changes_the_rows_that_name_it_and_no_others():
    def read(variables: dict[str, str]) -> list[str]:
        source = DataSource("town", (str(TOWN / "dpo-train.jsonl"),), variables=variables)
        return [repr(item) for item in source.items("dpo", "error", LoadReport())]

    before, after = read({}), read({"name": "小明"})
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert new == old.replace("{{name}}", "小明")
    assert 0 < sum(old != new for old, new in zip(before, after, strict=True)) < len(before)
