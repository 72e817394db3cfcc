"""In how many processes a stage computes: as asked, as its run began, or as is fastest and pays."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_zh.distributed import local
from mlx_zh.errors import DistributedError
from mlx_zh.recipe import Recipe, load_recipe
from mlx_zh.stages import memory_check, processes
from mlx_zh.stages.operations import operations, shared_out
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import cpu_processes, cpu_threads, device
from mlx_zh.system.cpu_processes import Fastest


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of a model with 4 layers of width 8; no file of the model is there but its config."""
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 4, "intermediate_size": 16}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10, "head_dim": 4}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 6)
    (tmp_path / "exam" / "test").mkdir(parents=True)
    (tmp_path / "exam" / "test" / "law_test.csv").write_text("id,question,A,B,C,D,answer\n0,q,a,b,c,d,A\n")
    text = {"name": "r", "model": {"path": "model"}, "data": {"sft": {"train": ["train.jsonl"]}}}
    text |= {"sft": {"max_steps": 10, "batch_size": 4}, "evaluate": {"benchmarks": ["exam"]}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(text))
    return load_recipe(tmp_path / "r.yaml")


def arguments(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"processes": None, "fresh": False, "renew": False, "stage": None} | changes)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Linux where nobody said anything: two processes are 1.5 times as fast as one, and any work is enough."""
    monkeypatch.setattr(cpu_threads, "is_free", lambda: True)
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(device, "is_cpu", lambda: True)
    monkeypatch.setattr(cpu_processes, "fastest", lambda: Fastest(2, 1.5))
    monkeypatch.setattr(processes, "WORTH", 0.0)


def number(recipe: Recipe, stage: str = "sft", **changes: Any) -> int:
    """The number of processes without `--processes`."""
    return processes._fastest(recipe, stage, arguments(**changes))


def test_several_are_taken_where_nothing_forbids_it(recipe: Recipe, free: None, capsys) -> None:
    assert number(recipe) == 2
    assert "1.5 times the work of one process" in capsys.readouterr().out


def test_they_never_are_on_a_gpu_in_a_rank_or_with_threads_said(
    recipe: Recipe, free: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name, value in (
        (device, "is_cpu", lambda: False),
        (cpu_threads, "is_free", lambda: False),
        (cpu_threads, "usable_cores", lambda: 1),
        (local, "is_rank", lambda: True),
        (processes, "WORTH", 1e30),
        (cpu_processes, "fastest", lambda: Fastest()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert number(recipe) == 1, name
    assert number(recipe) == 2


def test_memory_decides_too(recipe: Recipe, free: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two need room for two; where half the memory makes rows compute again, the gain is smaller."""
    machine = memory_check.this_machine()
    whole = memory_check.training_step(recipe, "sft", json.loads(Path("model/config.json").read_text()), machine)
    peak = whole.memory(recipe.memory).peak
    asked = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"checkpoint_layers": False})})
    for budget, expected in ((2.6 * peak, 2), (2.0 * peak, 1)):
        monkeypatch.setattr(device, "free_bytes", lambda budget=budget: int(budget))
        assert number(asked) == expected


def test_a_run_goes_on_in_as_many_as_it_began_with(recipe: Recipe, free: None, monkeypatch) -> None:
    folder = RunFolder.of(recipe).stage("sft")
    for ranks, expected in ((3, 3), (1, 1), (0, 1), (None, 1)):  # runs of earlier versions recorded none
        state = folder.checkpoints / "step-000002" / "state.json"
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps({"progress": {} if ranks is None else {"ranks": ranks}}))
        assert number(recipe) == expected
    assert number(recipe, fresh=True) == 2
    assert number(recipe.model_copy(update={"resume": "never"})) == 2
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text("{}")
    assert number(recipe) == 1  # nothing is left to train
    assert number(recipe, renew=True) == 2


def test_what_cannot_be_shared_out_is_not(recipe: Recipe, free: None) -> None:
    assert shared_out(recipe, "sft") == 4 and shared_out(recipe, "eval") == 1
    assert number(recipe, "eval") == 1
    (Path("exam") / "test" / "art_test.csv").write_text("id,question,A,B,C,D,answer\n0,q,a,b,c,d,A\n")
    assert number(recipe, "eval") == 2


def test_the_work_is_counted(recipe: Recipe) -> None:
    config = json.loads(Path("model/config.json").read_text())
    step = memory_check.training_step(recipe, "sft", config, memory_check.this_machine())
    values = 4 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8)  # attention, MLP and norms of 4 blocks
    reading = 2 * (values + 8 * 10)
    # Five worked examples and one question, of 80 tokens each.
    assert operations(recipe, "eval", arguments(stage="base"), step) == 6 * 80 * reading
    answers = arguments(prompts="train.jsonl", limit=5, n=2, max_tokens=30)
    assert operations(recipe, "sample", answers, step) == 5 * 2 * 15 * reading
    training = operations(recipe, "sft", arguments(), step)
    longer = recipe.model_copy(update={"sft": recipe.sft.model_copy(update={"max_steps": 20})})
    assert operations(longer, "sft", arguments(), step) == 2 * training > 0


def test_what_the_user_asks_for_wins(recipe: Recipe, free: None, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Of the option and of `mlx-zh run --processes`; and what asked-for processes cannot do is an error."""

    def alone(recipe: Recipe, world: Any) -> int:
        return 40 + world.size

    assert processes.compute("sft", recipe, arguments(processes=1), [], alone) == 41
    monkeypatch.setenv("MLX_ZH_PROCESSES", "1")
    assert processes.compute("sft", recipe, arguments(), [], alone) == 41
    with pytest.raises(DistributedError, match="give a number of 1 or more"):
        processes.compute("sft", recipe, arguments(processes=0), [], alone)
    monkeypatch.setattr(processes.launching, "command_of", lambda stage, argv: ["false"])
    monkeypatch.setattr(cpu_threads, "use", lambda number: None)
    with pytest.raises(DistributedError, match="process 2 did not start"):
        processes.compute("sft", recipe, arguments(processes=2), [], alone)
    monkeypatch.delenv("MLX_ZH_PROCESSES")
    assert processes.compute("sft", recipe, arguments(), [], alone) == 41  # by itself, it computes alone


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda: 8_000_000_000)
    limited = recipe.memory.model_copy(update={"limit": "6GB"})
    alone = memory_check.this_machine()
    monkeypatch.setenv("MLX_ZH_RANKS_HERE", "2")
    half = memory_check.this_machine()
    assert alone.budget - half.budget == 4e9
    assert memory_check.memory_limit(limited, half) == memory_check.within_limit(half, limited).budget == 3e9
