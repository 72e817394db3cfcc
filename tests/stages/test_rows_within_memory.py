"""`memory.checkpoint_layers: auto`: each row computes again what it must to stay within its memory, and no more."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from project import Project, interrupt_after

from mlx_zh.core.packing import pack_conversations
from mlx_zh.core.recompute import ALL, Levels
from mlx_zh.corpus.rendered import Rendered
from mlx_zh.distributed.world import World
from mlx_zh.errors import RecipeError
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.ladder import levels_of, rungs
from mlx_zh.planning.largest_row import uniform_examples
from mlx_zh.planning.memory import step_memory
from mlx_zh.planning.search import Step
from mlx_zh.planning.shapes import Packing, Target, conversations, model_shape
from mlx_zh.recipe import Memory, load_recipe
from mlx_zh.stages import memory_check, tuning
from mlx_zh.training import memory_limit
from mlx_zh.training.objective import Row, Settings
from mlx_zh.training.sft_objective import SftObjective

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


@pytest.mark.parametrize(
    "text", ["much", "''", "0GB", "-1GB", "'10'", "10TBx", "10,5GB", "10", "0", "-1", "10e9", "1.5", "1e-5GB"]
)
def test_what_is_no_limit(project: Project, text: str) -> None:
    """A number could be bytes or gigabytes, so it is told to have a unit, also where YAML takes it for a number."""
    with pytest.raises(RecipeError, match=r"memory\.limit must be a size of memory with its unit, such as 10GB"):
        load_recipe("recipe.yaml", [f"memory.limit={text}"])
    project.recipe["memory"] = {"limit": yaml.safe_load(text)}
    project.write_recipe()
    with pytest.raises(RecipeError, match=r"memory\.limit must be a size of memory with its unit, such as 10GB"):
        load_recipe("recipe.yaml")


@pytest.mark.parametrize("text", ["null", "~"])
def test_no_limit_is_none(project: Project, text: str) -> None:
    assert load_recipe("recipe.yaml", [f"memory.limit={text}"]).memory.limit_bytes is None


def test_a_limit_of_more_than_the_machine_has_is_none() -> None:
    """One equal to the working set is kept, to the byte; more than there is would let rows grow until they fail."""
    machine = memory_check.Machine("working set", 10e9, cpu=False)
    budgets = {None: 8.5e9, "9GB": 9e9, "10GB": 10e9, "10001MB": 8.5e9, "64GB": 8.5e9}
    for limit, expected in budgets.items():
        settings = Memory(limit=limit)
        assert memory_check.memory_limit(settings, machine) == pytest.approx(expected)
        assert memory_check.within_limit(machine, settings).budget <= machine.budget


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
    return f"{(0.1 * most + 0.9 * least) / 1e6:.4f}MB"


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
    assert decided == {"memory": int((1 - memory_check.RESERVE) * small), "memory_asked": 0, "memory_sharing": 1}
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
    """Two processes with one limit take the steps of one process without any. They share this machine's memory."""
    import ranks

    from mlx_zh.training import checkpoints

    more = ["lora.type=dora", "lora.dropout=0.2", "sft.neftune_alpha=5"]
    alone = lines(project.train("memory.checkpoint_layers=false", *more, name="alone"))
    limit = f"memory.limit={between(project)}"
    ranks.run(2, ["sft", "recipe.yaml", "name=two", limit, *more, "--force"], folder=Path.cwd())
    together = lines(Path("runs/two/sft"))
    checkpoint, _ = checkpoints.load_newest(Path("runs/two/sft/checkpoints"))
    assert checkpoint is not None
    half = load_recipe("recipe.yaml", [f"memory.limit={between(project)}"]).memory.limit_bytes // 2
    assert checkpoint.state["progress"]["row_limits"]["memory"] == half  # both are on this machine
    assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    assert np.isfinite([line["grad_norm"] for line in together]).all()


# Memory runs out all the same


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(TARGETS), st.lists(st.integers(1, 900), min_size=1, max_size=4), st.integers(4, 60))
def test_a_limit_is_lowered_until_all_is_computed_again(target: Target, lengths: list[int], gigabytes: int) -> None:
    """Each time the row climbs; the result depends on sizes alone."""
    step = Step(SHAPE, TRAINED, target, uniform_examples("sft", 64, 1))
    within, limit = memory_check.RowsWithin(step, Memory()), gigabytes * 10**9
    batch = pack_conversations([([1] * length, [True] * length) for length in lengths])
    row, ladder = Row(batch, (0,), None, 1, True), rungs(32, target)
    places = [ladder.index(within.levels(limit)(batch))]
    while (lower := within.below(limit, [row])) is not None:
        assert lower < limit and lower == within.below(limit, [row])
        limit = lower
        places.append(ladder.index(within.levels(limit)(batch)))
    assert places == sorted(set(places)) and places[-1] == len(ladder) - 1
    assert len(places) < 20


def without_room(monkeypatch: pytest.MonkeyPatch, blocks: int, tokens: int = 1000) -> None:
    """A machine that has no memory for rows that compute fewer blocks again, or that are longer than `tokens`."""
    share = SftObjective.share

    def tight(self: SftObjective, model: Any, row: Row) -> Any:
        if row.training and (self.settings.levels(row.batch).blocks < blocks or row.batch.tokens.size > tokens):
            raise RuntimeError("[metal::malloc] Attempting to allocate 1 bytes which is greater than the maximum.")
        return share(self, model, row)

    monkeypatch.setattr(SftObjective, "share", tight)


MACHINES_OWN = {"tokens_per_second", "elapsed_seconds", "peak_memory_gb"}


def test_a_step_that_ran_out_of_memory_computes_more_layers_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows as long as before, told once, and kept by a run that goes on. The result is that of enough memory."""
    every = ["checkpoint.every_steps=1", "memory.micro_tokens=100"]
    expected = lines(project.train(*every, name="free"))
    without_room(monkeypatch, blocks=2)
    straight = project.sft(*every, "name=straight")
    assert straight.status == 0 and straight.out.count("is done again within") >= 1
    assert "is done again in rows of" not in straight.out
    found = lines(Path("runs/straight/sft"))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert all(line["recomputed_layers"] >= 2 and line["memory_limit_gb"] < 1 for line in found)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert project.sft(*every, "name=cut").status == 130
    went_on = project.sft(*every, "name=cut")
    assert went_on.status == 0 and "is done again" not in went_on.out
    assert [{k: v for k, v in line.items() if k not in MACHINES_OWN} for line in lines(Path("runs/cut/sft"))] == [
        {k: v for k, v in line.items() if k not in MACHINES_OWN} for line in found
    ]


def test_rows_are_shortened_where_all_layers_are_computed_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_room(monkeypatch, blocks=3, tokens=60)
    result = project.sft("memory.micro_tokens=100")
    assert result.status == 0
    assert result.out.index("is done again within") < result.out.index("is done again in rows of")
    assert {line["recomputed_layers"] for line in lines(Path("runs/tiny/sft"))} == {3.0}


@pytest.mark.parametrize("asked", ["true", "false", "2"])
def test_what_the_recipe_names_is_not_changed_by_a_lack_of_memory(
    project: Project, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    without_room(monkeypatch, blocks=0, tokens=60)
    result = project.sft("memory.micro_tokens=100", f"memory.checkpoint_layers={asked}")
    assert result.status == 0 and "is done again within" not in result.out
    assert "is done again in rows of" in result.out


def test_ranks_agree_on_the_lowest_limit() -> None:
    """Each has its own number of faults; the rank without one takes the limit of the others."""

    class Two:
        size = 2

        def any(self, value: bool) -> bool:
            return True

        def min(self, value: int) -> int:
            return min(value, 7 * 10**9 if value > 0 else -1)

    within = memory_check.RowsWithin(Step(SHAPE, TRAINED, TARGETS[0], uniform_examples("sft", 64, 1)), Memory())
    example = Rendered(np.ones(900, np.int32), np.arange(900) > 4, truncated=False)
    objective = SftObjective([example], Settings(seed=0, micro_tokens=1000))
    limits = {"memory": 10**10}
    memory_limit.agree(objective, within, limits, cast(World, Two()), changed=False)
    assert limits == {"memory": 7 * 10**9, "memory_lowered": 1}
    [row] = objective.rows(np.arange(1), 0)
    assert objective.settings.levels(row.batch) == within.levels(7 * 10**9)(row.batch)


# The speed that a time budget is planned with


@pytest.mark.parametrize("asked", ["auto", "true", "false", "2"])
def test_rows_are_timed_as_training_computes_them(
    project: Project, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Within a limit that makes the longest row compute layers again, or with the layers that the recipe names."""
    from mlx_zh.stages import measuring
    from mlx_zh.stages.run_models import open_model

    recipe = load_recipe(
        "recipe.yaml",
        ["memory.micro_tokens=100", f"memory.limit={between(project)}", f"memory.checkpoint_layers={asked}"],
    )
    timed: list[Levels] = []
    gradients = measuring.loss_and_gradients

    def record(model: Any, objective: Any, rows: Any, weights: Any) -> Any:
        timed.extend(objective.settings.levels(row.batch) for row in rows)
        return gradients(model, objective, rows, weights)

    monkeypatch.setattr(measuring, "loss_and_gradients", record)
    monkeypatch.setattr(measuring, "timed", lambda run, seconds: run() or 1e-9)
    measuring.measure_pace(recipe, open_model(recipe), 60.0, seconds=0.1)
    blocks = {"true": 3, "false": 0, "2": 2}
    assert timed[-1].blocks == blocks[asked] if asked in blocks else timed[-1].blocks > 0


def test_a_head_is_timed_as_training_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that are noted and computed in turn, without the chain of kernels that a lazy one waits for."""
    from mlx_zh.core import pacing
    from mlx_zh.planning import speed

    computed: list[int] = []
    in_turn = speed.compute_in_turn

    def record(noted: list[Any]) -> None:
        computed.append(len(noted))
        in_turn(noted)

    monkeypatch.setattr(speed, "compute_in_turn", record)
    monkeypatch.setattr(pacing, "pause", lambda after: pytest.fail("a pause is timed"))
    small = LLAMA | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    speed.measure(model_shape(small), AdapterSpec("lora", 2, 4), TARGETS[1], length=16, seconds=0.01)
    assert computed and set(computed) == {2}
