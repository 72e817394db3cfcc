"""`memory.checkpoint_layers: auto`: each row computes again what it must to stay within its memory, and no more."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from project import Project

from mlx_zh.core.recompute import ALL, Levels
from mlx_zh.errors import RecipeError
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.ladder import levels_of, rungs
from mlx_zh.planning.memory import step_memory
from mlx_zh.planning.shapes import Packing, Target, conversations, model_shape
from mlx_zh.recipe import Memory, load_recipe
from mlx_zh.stages import memory_check, tuning

LLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SHAPE, TRAINED = model_shape(LLAMA), AdapterSpec("lora", 32, 16)
TARGETS = [
    Target(2, Packing(4, 64), fused_attention=True, attention_tile=1024),
    Target(4, None, fused_attention=False),
]


# The ladder


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(TARGETS), st.lists(st.integers(1, 900), min_size=1, max_size=6), st.floats(4e9, 60e9))
def test_a_row_climbs_as_far_as_it_must_and_no_further(target: Target, lengths: list[int], limit: float) -> None:
    row = conversations(lengths)
    ladder = rungs(32, target)
    chosen = levels_of(SHAPE, TRAINED, target, row, Memory(), limit)
    peaks = [step_memory(SHAPE, TRAINED, target, row, levels).peak for levels in ladder]
    place = ladder.index(chosen)
    assert peaks[place] <= limit or place == len(ladder) - 1
    assert all(peak > limit for peak in peaks[:place])
    assert chosen == levels_of(SHAPE, TRAINED, target, row, Memory(), limit)


def test_the_ladder_on_a_gpu_and_on_a_cpu() -> None:
    gpu, cpu = (rungs(3, target) for target in TARGETS)
    assert gpu == [Levels(ALL, 0), Levels(ALL, 1), Levels(ALL, 2), Levels(ALL, 3)]
    assert cpu == [Levels(0), Levels(1), Levels(2), Levels(3), Levels(3, 1), Levels(3, 2), Levels(3, 3)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(True, Levels(ALL, 32)), (False, Levels(ALL, 0)), (5, Levels(ALL, 5)), (99, Levels(ALL, 32))],
)
def test_what_the_recipe_names_does_not_depend_on_the_memory(asked: Any, expected: Levels) -> None:
    memory = Memory(checkpoint_layers=asked)
    for limit in (None, 1.0, 1e12):
        assert levels_of(SHAPE, TRAINED, TARGETS[0], conversations([1024]), memory, limit) == expected


# The recipe


@pytest.mark.parametrize(
    ("text", "size"), [("10GB", 10e9), ("9.5 gib", 9.5 * 2**30), ("800MB", 8e8), ("１０ＧＢ", 10e9), ("4g", 4e9)]
)
def test_a_limit_is_a_size(project: Project, text: str, size: float) -> None:
    assert load_recipe("recipe.yaml", [f"memory.limit={text}"]).memory.limit_bytes == size


@pytest.mark.parametrize("text", ["much", "0GB", "-1GB", "10", "10TBx"])
def test_what_is_no_limit(project: Project, text: str) -> None:
    with pytest.raises(RecipeError, match="a size of memory, such as 10GB"):
        load_recipe("recipe.yaml", [f"memory.limit='{text}'"])


@pytest.mark.parametrize("text", ["sometimes", "-1", "1.5"])
def test_what_is_no_number_of_layers(project: Project, text: str) -> None:
    with pytest.raises(RecipeError, match="checkpoint_layers"):
        load_recipe("recipe.yaml", [f"memory.checkpoint_layers={text}"])


# The run


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def forced(project: Project, name: str, *arguments: str) -> list[dict[str, Any]]:
    """The steps of a run that may go on though its memory is short by the plan."""
    assert project.sft(f"name={name}", "--force", *arguments).status == 0
    return lines(Path(f"runs/{name}/sft"))


def between(project: Project) -> str:
    """A limit in which the longest row of the project fits only if some of its layers are computed again."""
    recipe = load_recipe("recipe.yaml")
    config = json.loads((project.model / "config.json").read_text())
    step = memory_check.training_step(recipe, "sft", config, memory_check.this_machine())
    row = conversations([45, 45])
    most, least = (
        step_memory(step.model, step.trained, step.target, row, levels).peak
        for levels in (Levels(), Levels(ALL, ALL))
    )
    return f"{(0.3 * most + 0.7 * least) / 1e6:.4f}MB"


@pytest.mark.parametrize("more", [[], ["lora.type=dora"], ["lora.dropout=0.2", "sft.neftune_alpha=5"]], ids=str)
def test_no_limit_changes_the_result(project: Project, more: list[str]) -> None:
    free = project.train("memory.checkpoint_layers=false", *more, name="free")
    expected = lines(free)
    assert not any("recomputed_layers" in line for line in expected)
    for number, limit in enumerate((between(project), "1MB")):
        found = forced(project, f"l{number}", "memory.micro_tokens=100", f"memory.limit={limit}", *more)
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
        assert any(line.get("recomputed_layers", 0) > 0 for line in found)


def test_a_limit_that_cannot_be_kept_is_refused(project: Project) -> None:
    refused = project.sft("memory.limit=1MB")
    assert refused.status == 2 and "memory.limit" in refused.err


def test_a_run_that_goes_on_keeps_the_limit_that_was_decided(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with other memory, to the same bits. A limit that the recipe names anew is another decision."""
    from mlx_zh.training import checkpoints

    def machine(budget: float) -> None:
        place = memory_check.Machine("free memory", budget, cpu=True)
        monkeypatch.setattr(memory_check, "this_machine", lambda: place)

    def limits(name: str) -> dict[str, int]:
        checkpoint, _ = checkpoints.load_newest(Path(f"runs/{name}/sft/checkpoints"))
        assert checkpoint is not None
        return checkpoint.state["progress"]["row_limits"]

    small = float(between(project).removesuffix("MB")) * 1e6 / (1 - memory_check.RESERVE)
    every = ["checkpoint.every_steps=1", "memory.micro_tokens=100"]
    machine(small)
    straight = forced(project, "straight", *every)
    decided = limits("straight")
    assert decided == {"memory": int((1 - memory_check.RESERVE) * small), "memory_asked": 0}
    stopped = iter([False] * 2 + [True] * 9)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "stop_on_interrupt", lambda *_: nullcontext(lambda: next(stopped)))
        assert project.sft(*every, "--force", "name=cut").status == 130
    machine(1e12)
    went_on = lines(project.train(*every, name="cut"))
    assert limits("cut") == decided
    times = {"tokens_per_second", "elapsed_seconds", "peak_memory_gb"}
    assert [{k: v for k, v in line.items() if k not in times} for line in went_on] == [
        {k: v for k, v in line.items() if k not in times} for line in straight
    ]


def test_the_smallest_machine_decides_for_all_ranks(project: Project) -> None:
    """Two processes with one limit take the steps of one process without any."""
    import ranks

    alone = lines(project.train("memory.checkpoint_layers=false", name="alone"))
    ranks.run(2, ["sft", "recipe.yaml", "name=two", f"memory.limit={between(project)}", "--force"], folder=Path.cwd())
    together = lines(Path("runs/two/sft"))
    assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    assert np.isfinite([line["grad_norm"] for line in together]).all()
