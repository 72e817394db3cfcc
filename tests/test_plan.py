"""The planner: its memory against MLX's own figure, its search, its stage, and the refusal of what cannot fit."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentences
from project import Project

from mlx_zh import plan
from mlx_zh.core import blocks
from mlx_zh.core.logprobs import hidden_states
from mlx_zh.core.packing import pack_pairs
from mlx_zh.core.recompute import ALL, Levels
from mlx_zh.errors import PlanError
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.largest_row import Examples, uniform_examples
from mlx_zh.planning.memory import (
    attention_workspace,
    head_bytes,
    kept_bytes,
    step_memory,
    trained_values,
    weight_bytes,
)
from mlx_zh.planning.pieces import in_block
from mlx_zh.planning.search import Step, cheapest, smallest_peak
from mlx_zh.planning.shapes import (
    LINEAR,
    Packing,
    Target,
    conversations,
    model_shape,
    pairs,
    row_of,
)
from mlx_zh.planning.windows import windows_of
from mlx_zh.recipe import Memory, load_recipe
from mlx_zh.stages import memory_check
from mlx_zh.system import console

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30

# Meta-Llama-3.1-8B-Instruct-4bit, as its config.json has it.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization": {"group_size": 64, "bits": 4},
}
METAL = Target(2, Packing(4, 64), fused_attention=True)


@pytest.fixture(scope="module")
def accuracy() -> Any:
    """The benchmark, which knows how to measure."""
    spec = importlib.util.spec_from_file_location("plan_accuracy", ROOT / "benchmarks" / "plan_accuracy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_accuracy"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Against what MLX reports


SMALL = {
    "sft": {"layers": 3},
    "checkpointed": {"layers": 3, "checkpoint": True},
    "micro-batches": {"layers": 2, "micro_tokens": 256},
    "vocabulary of 32k": {"layers": 2, "vocabulary": 32_000, "length": 32},
    "tied vocabulary of 32k": {"layers": 2, "vocabulary": 32_000, "length": 32, "tied": True},
    "dora": {"layers": 2, "kind": "dora", "length": 64},
    "full": {"layers": 3, "kind": "full", "length": 64},
    "dpo": {"layers": 3, "stage": "dpo", "length": 32},
    "dpo, checkpointed": {"layers": 3, "stage": "dpo", "length": 32, "checkpoint": True},
    "a long row": {"layers": 1, "length": 1500, "examples": 1},
    "windows": {"layers": 3, "length": 1200, "examples": 1, "window": 64, "heads": 2},
    "windows, checkpointed": {"layers": 3, "length": 1200, "examples": 1, "window": 64, "checkpoint": True},
}


@pytest.mark.parametrize("changes", SMALL.values(), ids=SMALL)
def test_the_peak_is_near_the_measured_one(accuracy: Any, changes: dict[str, Any]) -> None:
    """Within 15 %, the median of three: MLX allocates ahead of the CPU, and how far depends on the machine's load."""
    case = accuracy.Case(
        "small", **{"hidden": 128, "intermediate": 384, "micro_tokens": 512, "examples": 4} | changes
    )
    measured = sorted(accuracy.measure(case) for _ in range(3))[1]
    assert accuracy.predict(case).peak == pytest.approx(measured, rel=accuracy.BAR)


@pytest.mark.parametrize("length", [5, 700, 1100])
@pytest.mark.parametrize("window", [6, 300, 2000])
def test_a_window_is_planned_in_the_pieces_that_attention_is_computed_in(
    length: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys of every call on the way to MLX. The branches of a pair continue its prompt."""
    import mlx.core as mx
    from families import WINDOWED, family_config, family_model

    changes = WINDOWED | {"sliding_window": window, "hidden_size": 16, "num_attention_heads": 2}
    model, batch = family_model("llama", **changes), pack_pairs([([1] * length, [2] * 300, [3] * 5)])
    calls: list[tuple[int, int]] = []

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
        calls.append((queries.shape[2], keys.shape[2]))
        return queries

    monkeypatch.setattr(blocks, "causal_attention", attention)
    hidden_states(model, batch)
    row, shape = row_of(batch), model_shape(family_config("llama", **changes))
    assert shape.windows == (0, window, window)
    planned = [in_block(row, Target(4, None, fused_attention=False), each)[0].segments for each in shape.windows]
    assert calls == [call for segments in planned for call in segments]


def test_only_a_cpu_cuts_what_has_no_window() -> None:
    """Metal takes MLX's own attention for a window, in float32 too: whole pieces with their scores and masks."""
    row = conversations([1000])
    cpu, metal = Target(4, None, fused_attention=False), Target(4, None, fused_attention=True, attention_tile=1024)
    assert in_block(row, cpu, 0)[0].scores == 256 * (256 + 512 + 768) + 232 * 1000
    assert in_block(row, metal, 0) == (row, metal)
    windowed, target = in_block(row, metal, 600)
    assert windowed.scores == 600 * 600 + 400 * 1000 and not target.attention_of_products
    assert in_block(row, cpu, 600)[1].attention_of_products


def test_windows_by_the_keys_of_each_family() -> None:
    pattern = {"sliding_window": 512, "sliding_window_pattern": 3, "num_hidden_layers": 4}
    assert windows_of({"model_type": "gemma3_text", **pattern}) == (512, 512, 0, 512)
    assert windows_of({"model_type": "gemma3_text", "num_hidden_layers": 7}) == (512,) * 5 + (0, 512)
    assert windows_of({"model_type": "mistral", **pattern}) == ()  # mlx-lm lets its layers see the whole text
    assert windows_of({"model_type": "qwen3", **pattern, "layer_types": ["full_attention"] * 4}) == ()


def test_a_window_costs_less_the_longer_the_row() -> None:
    """Of 4,096 tokens, 512 see as many keys and seven times 512 see 1,024 (511 of them joined to their own).

    Without a window, the pieces of 256 queries see 256, 512, … 4,096 keys. Queries, keys, values and output come on
    top, and a sum for each of 32 heads.
    """
    trained, target = AdapterSpec("lora", 32, 16), Target(4, None, fused_attention=False)
    shape = model_shape(LLAMA | {"layer_types": ["sliding_attention"] * 32, "sliding_window": 512})
    whole, windowed = (
        step_memory(one, trained, target, conversations([4096]), Levels()).parts["attention"]
        for one in (replace(shape, windows=()), shape)
    )
    on_top, joined = 4096 * (2 * 4096 + 2 * 1024 + 32), 2 * 1024 * 7 * (511 + 512)
    scores = 32 * 4096 * (256 + 4096) // 2, 32 * (512**2 + 7 * 512 * (511 + 512))
    assert windowed / whole == pytest.approx((scores[1] + on_top + joined) / (scores[0] + on_top), rel=0.02)
    metal = Target(2, None, fused_attention=True, attention_tile=1024)  # a mask goes the unfused way
    assert step_memory(shape, trained, metal, conversations([4096]), Levels(ALL)).parts["attention"] > windowed / 3


# The terms, by hand


def test_the_weights_of_llama_8b() -> None:
    # 8,030,261,248 parameters as published; a matrix takes 4 bits and 2 x 16 bits in 64: 4.5 bits a number.
    shape = model_shape(LLAMA)
    assert shape.layers * shape.block_values + shape.outer_values == 8_030_261_248
    norms = 65 * 4096
    assert weight_bytes(shape, METAL) == (8_030_261_248 - norms) * 4.5 / 8 + norms * 2


def test_the_adapter_of_llama_8b() -> None:
    # q and o: 16 (4096 + 4096); k and v: 16 (4096 + 1024); gate, up and down: 16 (4096 + 14336); 32 layers.
    expected = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert trained_values(model_shape(LLAMA), AdapterSpec("lora", 32, 16)) == expected == 41_943_040


def test_the_workspace_of_attentions_backward_pass_on_metal() -> None:
    """Llama-3.1-8B with 1,024 tokens. A tile has 1,024 queries and keys.

    It takes 3 x 32 heads x 1024^2 and 3 x 1024 x 4096 values of 2 bytes. In float32 are 1024 x (4096 + 32) values for
    queries and 2 x 1024 x 1024 for keys and values. The published figures come out if they include the gradients and
    copies of the inputs, which the planner counts as activations: 0.27 GiB, and 0.33 GiB for 2,048 tokens.
    """
    shape, target = model_shape(LLAMA), replace(METAL, attention_tile=1024)
    tile = 3 * 32 * 1024**2 * 2 + 3 * 1024 * 4096 * 2
    short = attention_workspace(shape, target, conversations([1024, 500]))
    assert short == tile + 4 * (1024 * (4096 + 32) + 2 * 1024 * 1024) == 251_789_312
    assert attention_workspace(shape, target, conversations([2048])) == tile + 2 * (short - tile)
    for tokens, published in ((1024, 0.27), (2048, 0.33)):
        gradients = 2 * tokens * (4096 + 2 * 1024)
        copies = 3 * 2 * tokens * 4096  # queries, output and its gradient, which are not contiguous
        whole = attention_workspace(shape, target, conversations([tokens])) + gradients + copies
        assert whole / 2**30 == pytest.approx(published, abs=0.005)


def test_a_branch_reads_its_ancestors_keys() -> None:
    """The largest segment is not the longest: 200 queries with 1,200 keys, against 1,000 with 1,000 of a prompt."""
    shape, target = model_shape(LLAMA), replace(METAL, attention_tile=1024)
    row = pairs([(1000, 10, 200)])
    assert row.segments == ((1000, 1000), (10, 1010), (200, 1200))
    assert attention_workspace(shape, target, row) == attention_workspace(shape, target, conversations([1000]))


def test_the_workspace_is_part_of_the_backward_pass_only_where_there_is_one() -> None:
    shape, spec, row = model_shape(LLAMA), AdapterSpec("lora", 32, 16), conversations([1024])
    levels = Levels(ALL, ALL)
    without = step_memory(shape, spec, METAL, row, levels, logit_rows=16)
    with_it = step_memory(shape, spec, replace(METAL, attention_tile=1024), row, levels, logit_rows=16)
    assert "workspace" not in without.parts and without.phase == with_it.phase == "backward pass, at its beginning"
    assert with_it.peak - without.peak == with_it.parts["workspace"] == 251_789_312


@pytest.mark.parametrize(("on_gpu", "each", "most"), [(False, 4, 4), (True, 3, 12)])
def test_the_head_holds_some_arrays_of_a_chunk_and_a_trained_one_those_that_are_scheduled_ahead(
    on_gpu: bool, each: int, most: float
) -> None:
    shape, trained = model_shape(LLAMA | {"hidden_size": 64, "head_dim": 16}), AdapterSpec("lora", 1)
    target = Target(4, None, on_gpu)
    chunk, states = 32 * 128256 * 4, 4 * 64 * 4
    assert head_bytes(shape, trained, target, 32, 32) == each * chunk + 32 * states
    assert head_bytes(shape, trained, target, 3200, 32) == each * chunk + 3200 * states
    assert head_bytes(shape, trained, target, 0, 32) == 0
    full = AdapterSpec("full", shape.layers)
    gradient = 128256 * 64 * 4
    assert head_bytes(shape, full, target, 64, 32) == min(6, most) * chunk + 2 * gradient + 64 * states
    assert head_bytes(shape, full, target, 3200, 32) == most * chunk + 9 * gradient + 3200 * states


def test_what_is_kept_grows_by_layer_and_token_and_what_is_not_trained_keeps_nothing() -> None:
    shape = model_shape(LLAMA)

    def kept(layers: int, tokens: int, levels: Levels) -> float:
        row = conversations([tokens])
        return step_memory(shape, AdapterSpec("lora", layers), METAL, row, levels).parts["activations"]

    # 4 D, what o_proj takes (as wide as D here), 5 F, and two low-rank products of 7 layers; two bytes a number
    each = 2048 * 2 * (4 * 4096 + 4096 + 5 * 14336 + 2 * 7 * 16)
    assert kept(32, 2048, Levels()) - kept(31, 2048, Levels()) == each
    # where the cheap parts are made again, the inputs of both norms, gate and up
    pieces = Levels(ALL)
    assert kept(32, 2048, pieces) - kept(31, 2048, pieces) == 2048 * 2 * (2 * 4096 + 2 * 14336)
    steps = [kept(32, tokens, pieces) - kept(31, tokens, pieces) for tokens in (8192, 4096)]
    assert steps[0] == 2 * steps[1]


def test_the_last_block_keeps_what_follows_attention_for_scored_tokens_alone() -> None:
    shape, trained = model_shape(LLAMA), AdapterSpec("lora", 32)
    row = replace(conversations([1000]), scored=250)
    for level, width in ((0, 4096 + 4096 + 5 * 14336 + 4096 + 2 * 4 * 16), (1, 4096 + 2 * 14336)):
        parts = [kept_bytes(shape, trained, METAL, row, level, last=last) for last in (False, True)]
        assert parts[0]["activations"] - parts[1]["activations"] == 750 * 2 * width
        assert parts[0]["attention"] == parts[1]["attention"]


def test_with_fused_attention_half_of_what_a_block_kept_is_made_again() -> None:
    shape, row, trained = model_shape(LLAMA), conversations([300, 700]), AdapterSpec("lora", 32)
    before, after = (sum(kept_bytes(shape, trained, METAL, row, level).values()) for level in (0, 1))
    assert after < 0.55 * before


def test_checkpointing_keeps_one_hidden_state_a_layer() -> None:
    shape = model_shape(LLAMA)

    def kept(layers: int, again: int) -> float:
        row = conversations([1024])
        return step_memory(shape, AdapterSpec("lora", layers), METAL, row, Levels(ALL, again)).parts["activations"]

    assert kept(32, ALL) - kept(31, ALL) == 1024 * 4096 * 2
    # each block more that is computed again leaves one hidden state of what it kept, while the peak is in the highest
    steps = [kept(32, again) - kept(32, again + 1) for again in range(28)]
    assert steps == [1024 * 2 * (4096 + 2 * 14336)] * 28


def test_a_branch_sees_its_parent_too() -> None:
    row = pairs([(10, 4, 6)])
    assert (row.tokens, row.scored, row.scores, row.joined) == (20, 10, 100 + 4 * 14 + 6 * 16, 14 + 16)


def test_the_largest_row_takes_the_longest_that_fit() -> None:
    import numpy as np

    lengths = np.array([100, 700, 30, 400, 300])
    row, rows = Examples("sft", lengths, lengths - 1, batch_size=4).largest_row(1000)
    assert sorted(n for n, _ in row.segments) == [300, 700]
    assert rows == 2  # 700 + 400 + 300 + 100 in rows of 1000
    alone, _ = Examples("sft", lengths, lengths - 1, batch_size=4).largest_row(64)
    assert alone.tokens == 700  # an example longer than micro_tokens has a row of its own


# The recipes for Llama-3.1-8B


@pytest.mark.parametrize("size", ["16gb", "32gb", "64gb", "evening"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_llama_recipes_fit_the_macs_they_are_named_after(size: str, stage: str) -> None:
    recipe = load_recipe(ROOT / f"recipes/llama31-8b-zh-{size}.yaml")
    place = memory_check.mac(int(size.removesuffix("gb").replace("evening", "16")) * GIB)
    peak = memory_check.training_step(recipe, stage, LLAMA, place).memory(recipe.memory).peak
    assert 5e9 < peak < 0.85 * place.budget  # with room for what a Mac does beside


def test_a_mac_recommends_two_thirds_and_a_large_one_three_quarters() -> None:
    # What such machines report: 10,922 MB of 16 GB, 21,845 MB of 32 GB, 49,152 MB of 64 GB.
    assert [round(memory_check.mac(size * GIB).budget / 2**20) for size in (16, 32, 64)] == [10923, 21845, 49152]


# The search


def test_the_cheapest_settings_that_fit() -> None:
    step = Step(model_shape(LLAMA), AdapterSpec("lora", 32), METAL, uniform_examples("sft", 1024, 16))
    asked = Memory(micro_tokens=4096, checkpoint_layers=False)
    assert step.memory(asked).peak > 18e9
    roomy = cheapest(step, asked, 40e9)
    assert roomy is not None and (roomy.settings, roomy.cost) == (asked, 0)
    fewer = cheapest(step, asked, 16e9)  # smaller rows cost less time than computing layers again
    assert fewer is not None and fewer.settings == Memory(micro_tokens=2048, checkpoint_layers=False)
    tight = cheapest(step, asked, 8e9)
    assert tight is not None and tight.settings == Memory(micro_tokens=1024) and 0.03 < tight.cost < 0.3
    assert cheapest(step, asked, 5e9) is None
    assert 5e9 < smallest_peak(step, asked).estimate.peak < 6.1e9  # one example has its row, however long it is
    for limit, found in ((16e9, fewer), (8e9, tight)):
        assert found.estimate.peak == replace(step, limit=limit).memory(found.settings).peak <= limit


def test_a_faster_setting_is_proposed_though_the_one_asked_for_fits() -> None:
    step = Step(model_shape(LLAMA), AdapterSpec("lora", 32), METAL, uniform_examples("sft", 1024, 16))
    every = Memory(micro_tokens=1024, checkpoint_layers=True)
    assert step.memory(every).peak < 16e9
    faster = cheapest(step, every, 16e9)
    assert faster is not None and faster.settings == Memory(micro_tokens=1024) and faster.cost < -0.2


# The stage


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path / "model"


def test_a_config_is_enough(config_only: Path, run_stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes" / "llama31-8b-zh-16gb.yaml"
    model = f"model.path={config_only}"
    assert run_stage(plan.main, recipe, model, "--memory", "16GB") == 0
    shown = capsys.readouterr().out
    assert all(
        part in shown for part in ("weights", "4.52 GB", "adapters", "optimizer", "activations", "peak", "cache")
    )
    assert "fits: 11.5 GB are the recommended working set of a Mac with 16 GB" in shown
    many = ("memory.micro_tokens=4096", "memory.checkpoint_layers=false")
    assert run_stage(plan.main, recipe, model, "--memory=16", *many) == 1
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    assert "memory." in shown and "change no result" in shown


@pytest.mark.parametrize("by", ["rule", "judge"])
def test_the_hours_of_rounds_are_told(project: Project, by: str) -> None:
    """60 prompts, 48 of them learned from: 72 x 4 answers of 10 tokens at 2 s, and DPO of 48 pairs.

    A pair has 20 tokens beside its prompt; 1 s a token in training and 0.1 s for the reference, 3 s a step.
    """
    from mlx_zh.planning.pace import Pace
    from mlx_zh.recipe import Rounds
    from mlx_zh.stages import outlook

    prompts = Path("prompts.jsonl")
    prompts.write_text('{"prompt": "1 + 1 = ?"}\n' * 60)
    judge: dict[str, Any] = {"by": "judge", "judge": "m"} if by == "judge" else {}
    rounds = Rounds(count=3, prompts=str(prompts), samples=4, max_new_tokens=10, check=0.2, **judge)
    recipe = load_recipe("recipe.yaml", ["dpo.epochs=2", "dpo.batch_size=6"])
    config = json.loads((project.model / "config.json").read_text())
    step = memory_check.training_step(recipe, "dpo", config, memory_check.this_machine())
    notice = outlook.rounds_text(recipe, rounds, step, Pace(1.0, 0.1, 3.0, 2.0))
    tokens = 48 * (outlook.amount_of(recipe, "sft").tokens + 20)
    drawing, tuning = 72 * 4 * 10 * 2.0, 2.1 * tokens + 16 * 3
    values = notice.values
    assert notice.code == ("outlook-rounds-judged" if judge else "outlook-rounds")
    assert (values["drawing"], values["tuning"]) == (console.duration(drawing), console.duration(tuning))
    assert values["total"] == console.duration(3 * (drawing + tuning))
    assert ("评判时间另计" in notice.text("zh")) == bool(judge)
    assert outlook.rounds_text(recipe, rounds, step, None).code == "outlook-without-rounds"


@pytest.mark.parametrize("asked", ["auto", "true", "false", "5"])
@pytest.mark.parametrize("limit", ["2GB", "9GB", "100GB"])
def test_a_plan_says_what_a_limit_means(
    config_only: Path, run_stage: Any, capsys: pytest.CaptureFixture[str], asked: str, limit: str
) -> None:
    """Of every way of computing layers again: a limit below the weights, one that holds, one beyond the machine."""
    recipe, model = ROOT / "recipes" / "llama31-8b-zh-16gb.yaml", f"model.path={config_only}"
    words = ["--memory=16GB", "--quick", f"memory.limit={limit}", f"memory.checkpoint_layers={asked}"]
    status = run_stage(plan.main, recipe, model, *words)
    told = capsys.readouterr().out
    assert ("DOES NOT FIT" in told) == (status == 1)
    assert status == 0 if asked in ("auto", "true") and limit != "2GB" else limit != "2GB" or status == 1
    assert told.count("are the limit that the recipe sets") == (0 if limit == "100GB" else 2)
    assert told.count("No memory settings help") == (2 if limit == "2GB" else 0)
    within = {"2GB": "To stay within 2.0 GB", "9GB": "To stay within 9.0 GB", "100GB": "To stay within 9.7 GB"}
    assert told.count(within[limit]) == (2 if asked == "auto" else 0)


def test_the_time_says_that_rounds_are_not_in_it(config_only: Path, run_stage: Any, capsys: Any) -> None:
    recipe, model = ROOT / "recipes" / "llama31-8b-zh-16gb.yaml", f"model.path={config_only}"
    assert run_stage(plan.main, recipe, model, "--memory=16GB", "rounds.count=2") == 0
    assert "The rounds come on top" in capsys.readouterr().out
    assert run_stage(plan.main, recipe, model, "--memory=16GB") == 0
    assert "The rounds come on top" not in capsys.readouterr().out


@pytest.mark.parametrize("size", ["much", "0GB", "-3", "16MB"])
def test_what_is_no_size(size: str, run_stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(plan.main, "recipe.yaml", f"--memory={size}") == 2
    assert "write it as 16GB" in capsys.readouterr().err


def test_a_machine_is_measured(
    project: Project, run_stage: Any, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    from mlx_zh.planning import speed

    measure = speed.measure
    monkeypatch.setattr(speed, "measure", lambda *a, **k: measure(*a, **k | {"seconds": 0.2}))
    assert run_stage(plan.main, "recipe.yaml") == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown and "6 steps" in shown and "12 rows" in shown


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a token of a block takes a microsecond forward, and three in all; the rest is free."""
    from mlx_zh.planning import speed

    monkeypatch.setattr(speed, "measure", lambda *_, **__: speed.Speed(1e-6, 3e-6, 0.0, 0.0))


def test_a_short_name_is_planned_without_a_network(
    pace: None, tmp_path: Path, run_stage: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-8B has 36 layers; 60,000 rows of 165 tokens in batches of 16 take 3,750 steps an epoch."""
    for name in ("MLX_ZH_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: t\nmodel: {path: qwen3-8b}\nsft: {epochs: 2}\nevaluate: {benchmarks: [ceval], shots: 5}\n"
        "data: {sft: {train: [{name: belle-1m, max_samples: 60000}]}}\n"
    )
    never = "memory.checkpoint_layers=false"
    assert run_stage(plan.main, recipe, never) in (0, 1)  # 1 where this machine's memory is short
    shown = capsys.readouterr().out
    a_step = 16 * 165 * 36 * 3e-6
    assert f"time: about {a_step:.3g} s a step of 2640 tokens" in shown and "7500 steps: about 35 min 38 s" in shown
    # 52 subjects with 5 worked examples of 79 tokens, 1,346 questions of 81 tokens, 36 layers, two models
    assert "exam: C-Eval, 1346 questions, base, sft: about 9 s" in shown
    assert pytest.approx(9.3, abs=0.1) == 2 * (52 * 5 * 79 + 1346 * 81) * 36 * 1e-6
    assert "downloads: about 5.1 GB: qwen3-8b (4.6 GB), belle-1m (0.46 GB), C-Eval (0.002 GB)" in shown
    assert "the whole run: about 35 min 48 s" in shown and "budget" not in shown
    assert run_stage(plan.main, recipe, never, "sft.epochs=100") in (0, 1)
    assert (
        "That is 30 hours, more than a day. For a night, add budget=8h, or write `budget: 8h`"
        in capsys.readouterr().out
    )


def test_prepared_lengths_go_first(project: Project) -> None:
    from mlx_zh.stages import outlook

    recipe = load_recipe("recipe.yaml")
    report = {"train": {"examples": 10, "tokens": 300, "scored_tokens": 120}, "validation": {"examples": 2}}
    prepared = recipe.run_folder() / "data" / "report.json"
    prepared.parent.mkdir(parents=True)
    prepared.write_text(json.dumps({"sft": report}))
    amount = outlook.amount_of(recipe, "sft")
    assert (amount.examples, amount.validation, amount.tokens, amount.scored) == (10, 2, 30, 12)
    assert amount.steps(3, 4, None) == 9  # three an epoch, the last of which is smaller
    prepared.write_text("{")
    assert outlook.amount_of(recipe, "sft").examples == 12


# What cannot fit is refused


def test_a_stage_refuses_what_cannot_fit(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory_check.Machine("free memory of this machine", 1e5, cpu=True)
    monkeypatch.setattr(memory_check, "this_machine", lambda: place)
    refused = project.sft()
    assert refused.status == 2
    assert "sft needs about" in refused.err and "--force" in refused.err
    assert not Path("runs").exists()
    forced = project.sft("--force", "sft.max_steps=1")
    assert (forced.status, forced.err) == (0, "")
    assert "warning: sft needs about" in forced.out
    warnings = sentences.kept(Path("runs/tiny/sft/warnings.jsonl"))
    assert warnings and all(warning and "sft 的内存峰值约为 0.0 GB" in warning.text("zh") for warning in warnings)
    assert project.sft("sft.max_steps=1").status == 0  # finished: nothing is started, so nothing is refused


def test_long_examples_are_refused_once_they_are_known(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("recipe.yaml", ["data.max_length=2048"])
    never = load_recipe("recipe.yaml", ["data.max_length=2048", "memory.checkpoint_layers=false"])
    config = json.loads((project.model / "config.json").read_text())
    long = uniform_examples("sft", 2000, 4)
    place = memory_check.this_machine()
    short = uniform_examples("sft", 64, 4)
    needs = [
        memory_check.training_step(recipe, "sft", config, place, examples).memory(recipe.memory).peak
        for examples in (short, long)
    ]
    assert needs[1] > 10 * needs[0]
    between = memory_check.Machine("free memory of this machine", 0.8 * needs[1], cpu=True)
    monkeypatch.setattr(memory_check, "this_machine", lambda: between)
    memory_check.require(recipe, "sft", force=False)
    corpus: Any = type("Corpus", (), {"lengths": long.tokens, "scored": long.scored})
    with pytest.raises(PlanError, match=r"memory\.checkpoint_layers=auto .*change no result"):
        memory_check.require(never, "sft", force=False, config=config, corpus=corpus)
    memory_check.require(recipe, "sft", force=False, config=config, corpus=corpus)  # some layers are computed again


def test_the_parts_of_a_config_that_are_missing(config_only: Path) -> None:
    from mlx_zh.errors import ModelError

    recipe = load_recipe(ROOT / "recipes" / "llama31-8b-zh-16gb.yaml")
    broken = {name: value for name, value in LLAMA.items() if name != "hidden_size"}
    with pytest.raises(ModelError, match="hidden_size"):
        memory_check.training_step(recipe, "sft", broken, memory_check.mac(16 * GIB))


def test_the_matrices_of_a_block_are_what_the_model_has(tiny_model: Any) -> None:
    from mlx.utils import tree_flatten

    for family in ("llama", "qwen2", "qwen3"):
        model = tiny_model(family)
        shape = model_shape(vars(model.args))
        sizes = {name: tuple(a.shape[::-1]) for name, a in tree_flatten(model.layers[0].parameters()) if a.ndim == 2}
        assert {n.split(".")[1]: size for n, size in sizes.items()} == {name: shape.matrix(name) for name in LINEAR}
        assert shape.block_values == sum(array.size for _, array in tree_flatten(model.layers[0].parameters()))


# Predictions


def test_the_shipped_recipes_say_what_the_planner_predicts() -> None:
    """The days and the amounts in their comments, which nobody would otherwise change with the planner."""
    from mlx_zh.models.load import find_config
    from mlx_zh.planning.chips import chip_named
    from mlx_zh.stages.mac_table import predicted

    for size in (16, 32, 64):
        path = ROOT / f"recipes/llama31-8b-zh-{size}gb.yaml"
        recipe, text = load_recipe(path), path.read_text(encoding="utf-8")
        config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
        said = re.findall(r"(\d+) days on an (M\d(?: Pro| Max| Ultra)?)", text)
        assert len(said) == 5
        for days, name in said:
            chip = chip_named(name)
            assert chip is not None and max(chip.memory) >= size
            assert round(predicted(recipe, config, chip).total / 86400) == int(days), name
            assert f"{name} 约 {days} 天" in text or f"{name} 和" in text
    path = ROOT / "recipes/llama31-8b-zh-evening.yaml"
    recipe, text = load_recipe(path), path.read_text(encoding="utf-8")
    for name, learned, compared in (("M1", 2100, 120), ("M2", 4200, 250), ("M4", 4400, 260), ("M5", 9400, 650)):
        chip = chip_named(name)
        assert chip is not None
        decision = predicted(recipe, config, chip)
        assert 5 * 3600 < decision.total < 6 * 3600
        assert decision.steps["sft"] * recipe.sft.batch_size == pytest.approx(learned, rel=0.02)
        assert decision.steps["dpo"] * recipe.dpo.batch_size == pytest.approx(compared, rel=0.02)
        assert f"{learned:,} " in text and f"约 {learned} 条" in text and f"{compared} 对" in text


def test_a_chip_is_predicted_by_hand() -> None:
    """An M4 has 10 cores of 128 multiply-adds at 1.47 GHz: 3.76 TFLOPS, of which training reaches 40 %."""
    from mlx_zh.planning.chips import chip_named, predicted_pace
    from mlx_zh.planning.flops import training_flops

    chip = chip_named("apple m4")
    assert chip is not None and chip.flops == pytest.approx(3.763e12, rel=1e-3)
    shape, spec = model_shape(LLAMA), AdapterSpec("lora", 32, 16)
    blocks = 2 * 32 * shape.block_values
    adapter, head = 6 * trained_values(shape, spec), 0.6 * 4 * 4096 * 128256
    assert training_flops(shape, spec, scored=0.6, again=0.0) == 2 * blocks + adapter + head
    assert training_flops(shape, spec, scored=0.6, again=1.0) == 3 * blocks + adapter + head
    pace = predicted_pace(chip, shape, spec, METAL, again=0.0, scored=0.6)
    assert pace.training == pytest.approx((2 * blocks + adapter + head) / (0.4 * 3.763e12), rel=1e-3)
    assert pace.forward == pytest.approx(blocks / (0.65 * 3.763e12), rel=1e-3)
    m1_max = chip_named("M1Max")
    assert m1_max is not None
    # The published figure that the share of the M1 is taken from.
    assert 1 / predicted_pace(m1_max, shape, spec, METAL, again=0.0, scored=0.6).training == pytest.approx(
        99, rel=0.03
    )


def test_a_plan_with_a_budget_shows_the_decision(
    config_only: Path, run_stage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "recipes" / "llama31-8b-zh-16gb.yaml"
    assert run_stage(plan.main, recipe, f"model.path={config_only}", "--chip", "M2 Pro", "--budget", "8h") == 0
    shown = capsys.readouterr().out
    assert "Predicted for M2 Pro, from its published figures and not measured" in shown
    assert re.search(r"sft .* \d+ of 18,\d+ steps of 16 examples", shown) and "of 8h" in shown
    assert run_stage(plan.main, recipe, f"model.path={config_only}", "--chip", "M2") == 0
    shown = capsys.readouterr().out
    assert "all 18," in shown and "For a night, add budget=8h" in shown
    assert run_stage(plan.main, recipe, "--chip", "M99") == 2
    assert "'M99' is not a known chip; choose from M1, M1 Pro" in capsys.readouterr().err


def test_the_table_of_macs(run_stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = [ROOT / f"recipes/llama31-8b-zh-{name}.yaml" for name in ("evening", "64gb")]
    assert run_stage(plan.main, "--table", *recipes) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    by_name = {row[0].removeprefix("| "): row[1:] for row in rows}
    assert by_name["`llama31-8b-zh-evening`"][:2] == ["7.1 GB", "16 GB"]
    assert by_name["`llama31-8b-zh-64gb`"][:2] == ["19.3 GB", "32 GB"]
    assert by_name["M4"][0].startswith("5.7 h, 4,392 conversations") and by_name["M2"][1] == "— |"  # at most 24 GB
    assert by_name["M4 Max"][1] == "6 days |"
