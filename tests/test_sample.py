"""`mlx-zh sample` from the command line to the run folder, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import ranks
from project import Project, Result

from mlx_zh import sample
from mlx_zh.models.adapters.files import save_adapter
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.load import load_model

ROWS = [{"prompt": f"第{n}题" + "？" * (n % 5), "answer": str(n)} for n in range(9)]
OPTIONS = ("--prompts", "prompts.jsonl", "--n", "3", "--max-tokens", "8", "--temperature", "1")
Sample = Callable[..., Result]


@pytest.fixture
def drawn(project: Project) -> Sample:
    """`mlx-zh sample recipe.yaml OPTIONS ARGUMENTS` in a folder with a file of prompts."""
    write_prompts(ROWS)

    def run(*arguments: str) -> Result:
        return project.run(sample.main, *OPTIONS, *arguments)

    return run


def write_prompts(rows: list[dict[str, Any]], name: str = "prompts.jsonl") -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(name).write_text(text, encoding="utf-8")


def folder(label: str = "base-prompts", name: str = "tiny") -> Path:
    return Path("runs", name, "samples", label)


def lines(label: str = "base-prompts", name: str = "tiny") -> dict[str, Any]:
    """The lines by id; each id stands there once."""
    text = (folder(label, name) / "answers.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def write_adapter(project: Project, stage: str) -> None:
    model = load_model(str(project.model)).model
    spec = AdapterSpec("lora", num_layers=3, rank=4)
    add_adapter(model, spec, seed=1)
    rng = np.random.default_rng(1)
    weights = {
        name: array + mx.array(rng.normal(size=array.shape, scale=0.5).astype(np.float32))
        for name, array in trainable(model).items()
    }
    save_adapter(Path("runs/tiny") / stage / "adapters", weights, spec, {})


def test_every_prompt_gets_its_answers(drawn: Sample) -> None:
    result = drawn()
    assert (result.status, result.err) == (0, ""), result
    rows = lines()
    assert sorted((row["prompt"][0]["content"], row["reference"]) for row in rows.values()) == sorted(
        (row["prompt"], row["answer"]) for row in ROWS
    )
    for row in rows.values():
        assert (row["kind"], row["version"], len(row["answers"])) == ("samples", 1, 3)
        for answer in row["answers"]:
            assert 1 <= answer["tokens"] <= 8
            assert answer["finish"] in ("stop", "length")
    about = json.loads((folder() / "about.json").read_text(encoding="utf-8"))
    assert (about["n"], about["count"], about["stage"], about["adapter"]) == (3, 9, "base", None)
    assert about["sampling"] == {"temperature": 1.0, "top_p": 0.95, "max_tokens": 8, "seed": 42}
    tokens = sum(answer["tokens"] for row in rows.values() for answer in row["answers"])
    assert f"27 answers of {tokens} tokens" in result.out
    assert Path("runs/tiny/recipe.yaml").exists()  # so that `mlx-zh sample tiny` finds the run


def test_greedy_answers_are_those_of_the_chat(drawn: Sample, project: Project) -> None:
    from mlx_zh.corpus.conversation import Message
    from mlx_zh.models.generate import GenerationSession, Sampling
    from mlx_zh.recipe import load_recipe
    from mlx_zh.stages.rendering import renderer_of

    assert drawn("--temperature", "0", "--n", "1", "data.system=用中文回答").status == 0
    loaded = load_model(str(project.model))
    renderer = renderer_of(load_recipe("recipe.yaml"), loaded.tokenizer)
    for row in lines().values():
        session = GenerationSession(loaded.model, loaded.tokenizer, loaded.eos_token_ids)
        prompt = [Message("system", "用中文回答"), Message("user", row["prompt"][0]["content"])]
        text = "".join(session.stream(renderer.prompt(prompt), Sampling(0.0, max_tokens=8)))
        assert row["answers"][0]["text"] == text
        assert row["answers"][0]["finish"] == {"end": "stop"}.get(session.statistics.reason, "length")


def test_batch_size_order_and_resume_change_nothing(drawn: Sample) -> None:
    assert drawn("name=one", "--batch-size", "1").status == 0
    write_prompts(ROWS[::-1])
    assert drawn("name=eight", "--batch-size", "8").status == 0
    assert lines(name="eight") == lines(name="one")
    # as after a kill: some lines are there, one of them torn
    file = folder(name="eight") / "answers.jsonl"
    whole = file.read_bytes()
    cut = whole.index(b"\n", len(whole) // 2) + 40
    file.write_bytes(whole[:cut])
    before = whole[: whole.rindex(b"\n", 0, cut) + 1]
    result = drawn("name=eight", "--batch-size", "5")
    assert result.status == 0
    assert file.read_bytes().startswith(before)
    assert lines(name="eight") == lines(name="one")
    again = drawn("name=eight")
    assert again.status == 0 and "tokens/s" not in again.out
    assert lines(name="eight") == lines(name="one")


@pytest.mark.thorough
def test_a_killed_command_goes_on(drawn: Sample, project: Project) -> None:
    write_prompts([{"prompt": f"第{n}题"} for n in range(40)])
    options = [*OPTIONS, "--max-tokens", "60", "--batch-size", "3"]
    command = [sys.executable, "-m", "mlx_zh.sample", "recipe.yaml", *options, "name=killed"]
    file = folder(name="killed") / "answers.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ) as process:
        while not file.exists() or file.stat().st_size < 2000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    assert 0 < len(kept) < 40
    assert drawn(*options[len(OPTIONS) :], "name=killed").status == 0
    assert file.read_text(encoding="utf-8").startswith("".join(kept))
    assert drawn(*options[len(OPTIONS) :], "name=whole").status == 0
    assert lines(name="killed") == lines(name="whole")
    assert len(lines(name="killed")) == 40


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (("--n", "2"), "n 3 -> 2"),
        (("--temperature", "0.5"), "'temperature': 1.0"),
        (("--seed", "7"), "'seed': 42"),
        (("data.system=你好",), "system None -> '你好'"),
        (("--limit", "4"), "count 9 -> 4"),
    ],
)
def test_other_settings_are_refused(drawn: Sample, arguments: tuple[str, ...], difference: str) -> None:
    assert drawn().status == 0
    before = (folder() / "answers.jsonl").read_bytes()
    result = drawn(*arguments)
    assert result.status == 2
    assert difference in result.err and "--label" in result.err
    assert (folder() / "answers.jsonl").read_bytes() == before
    assert drawn(*arguments, "--label", "other").status == 0
    assert lines("other").keys() <= lines().keys()


def test_answers_of_another_adapter_are_refused(drawn: Sample, project: Project) -> None:
    write_adapter(project, "sft")
    assert drawn().status == 0  # the newest stage answers
    assert drawn("--stage", "base").status == 0
    tuned, base = lines("sft-prompts"), lines("base-prompts")
    assert all(tuned[key]["answers"] != base[key]["answers"] for key in base)
    project.recipe["lora"] = {"rank": 8}
    weights = Path("runs/tiny/sft/adapters/adapters.safetensors")
    arrays = {name: array * 2 for name, array in mx.load(str(weights)).items()}
    mx.save_safetensors(str(weights), arrays)
    result = drawn("--label", "sft-prompts")
    assert result.status == 2 and "adapter" in result.err


def test_ranks_draw_what_one_draws(drawn: Sample, tmp_path: Path) -> None:
    assert drawn("name=one").status == 0
    ends = ranks.run(2, ["sample", "recipe.yaml", *OPTIONS, "--batch-size", "2", "name=two"], folder=tmp_path)
    assert lines(name="two") == lines(name="one")
    assert "27 answers" in ends[0][1] and ends[1][1] == ""


def test_sets_of_the_recipe(drawn: Sample, project: Project) -> None:
    project.recipe["evaluate"] = {"prompts": [{"prompt": "你叫什么？", "expect": "小智"}]}
    project.write_recipe()
    for name, count, reference in (("train", 12, "好的"), ("sft.validation", 2, "好"), ("evaluate", 1, "小智")):
        assert drawn("--prompts", name, "--label", name).status == 0
        assert len(lines(name)) == count
        assert any(row["reference"] == reference for row in lines(name).values())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--prompts", "nowhere.jsonl"), "there is no such file of prompts, and the sets of a recipe are train"),
        (("--prompts", "dpo.train"), "data.dpo.train of the recipe names no data"),
        (("--prompts", "empty.jsonl"), "holds no rows"),
        (("--stage", "dpo"), "holds no adapter"),
        (("--n", "0"), "whole number of at least 1"),
        (("--temperature", "nan"), "a number from 0 to 10"),
        (("--label", "../up"), "beginning with a letter or digit"),
        (("--prompts", "."), "there is no such file"),
    ],
)
def test_mistakes_are_told(drawn: Sample, arguments: tuple[str, ...], problem: str) -> None:
    Path("empty.jsonl").write_text("")
    result = drawn(*arguments)
    assert result.status == 2
    assert problem in result.err and "Traceback" not in result.err


def test_what_cannot_be_asked_is_counted(drawn: Sample) -> None:
    tools = {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f", "parameters": {}}]}
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("一", "一", "长" * 200)]
    write_prompts([*rows, tools])
    result = drawn()
    assert result.status == 0, result.err
    assert [row["prompt"][0]["content"] for row in lines().values()] == ["一"]
    assert "1 asked before" in result.out and "1 too long" in result.out and "1 with tools" in result.out


def test_given_up_work_is_done_again_in_fewer_rows(drawn: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_zh.models.batched import BatchedGeneration

    assert drawn("name=whole").status == 0
    tried: list[int] = []
    make = BatchedGeneration.__init__

    def failing(self: Any, *arguments: Any, rows: int, **options: Any) -> None:
        tried.append(rows)
        make(self, *arguments, rows=rows, **options)
        if len(tried) < 3:
            step, left = self._step, [4]

            def once() -> None:
                left[0] -= 1
                if not left[0]:
                    raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
                step()

            self._step = once

    monkeypatch.setattr(BatchedGeneration, "__init__", failing)
    assert drawn("name=given-up", "--batch-size", "8").status == 0
    assert tried == [8, 4, 2]
    assert lines(name="given-up") == lines(name="whole")
