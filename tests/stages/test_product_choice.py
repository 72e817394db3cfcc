"""A run computes products with quantized weights one way from its first step to its last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from project import Project, contents, interrupt_after, losses, metrics

from mlx_zh.core import frozen_products, product_speed
from mlx_zh.distributed.world import ALONE
from mlx_zh.models.load import load_model
from mlx_zh.planning.shapes import Packing, Target, model_shape
from mlx_zh.planning.unpacked import of_blocks, of_head, room, unpacked_bytes
from mlx_zh.recipe import Memory, Recipe, load_recipe
from mlx_zh.stages import memory_check, product_choice
from mlx_zh.system import device

GB = 1e9


@pytest.fixture(autouse=True)
def quantized_again() -> Iterator[None]:
    yield
    frozen_products.use({})


@pytest.fixture
def packed(project: Project, model_folder: Callable[..., Path]) -> Project:
    """A 4-bit model that stays 4-bit on the CPU."""
    project.recipe["model"] = {"path": str(model_folder(quantized=4)), "dtype": "float32"}
    project.write_recipe()
    return project


def progress(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    products: dict[str, Any] = json.loads((newest / "state.json").read_text())["progress"]["products"]
    return products


UNPACKED = "memory.dense_products=true"
FORMS = {"64x64", "32x64", "96x64", "64x96", "300x64"}  # queries and output, keys and values, MLP, head


@pytest.mark.numeric
def test_training_with_unpacked_weights_gives_the_same(packed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 sums in another order; invariant 2 allows a relative 1e-5. The scores of 4 x 3 steps differ by less."""
    monkeypatch.setattr(product_speed, "ROWS", (1024, 8))
    quantized = packed.train(name="quantized")
    assert progress(quantized) == {"asked": "auto", "rules": {}}
    calls, dequantize = [], mx.dequantize
    monkeypatch.setattr(mx, "dequantize", lambda *args, **more: calls.append(args) or dequantize(*args, **more))
    result = packed.sft("name=unpacked", UNPACKED)
    assert (result.status, result.err) == (0, "")
    assert "Quantized weights are unpacked for rows of 8 tokens and more." in result.out
    unpacked = Path("runs/unpacked/sft")
    assert {form.split()[-1] for form in progress(unpacked)["rules"]} == FORMS
    # 21 layers forward, and backward but for the first block's products with its input, and the head, in six steps.
    assert len(calls) > 6 * (21 + 18 + 1)
    assert losses(unpacked) == pytest.approx(losses(quantized), rel=1e-5)
    assert losses(unpacked, "eval_loss") == pytest.approx(losses(quantized, "eval_loss"), rel=1e-5)


def chosen(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """As if this device had measured that the dense way is faster from `rows` rows on; 0: never."""

    def rules(recipe: Recipe, loaded: Any) -> frozen_products.Rules:
        kinds = frozen_products.QUANTIZED
        layers = [module for module in loaded.model.modules() if isinstance(module, kinds)]
        return {frozen_products.form_of(layer, mx.float32): rows for layer in layers} if rows else {}

    monkeypatch.setattr(product_choice, "_rules", rules)


@pytest.mark.parametrize(("before", "after"), [(8, 0), (0, 8), (8, 1000)])
def test_a_run_that_goes_on_keeps_its_way(
    packed: Project, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """Also where the device would now choose another, as after an update."""
    chosen(monkeypatch, before)
    straight = packed.train(name="straight")
    with monkeypatch.context() as patch:
        interrupt_after(patch, step=3)
        assert packed.sft().status == 130
    chosen(monkeypatch, after)
    folder = packed.train()
    assert progress(folder) == progress(straight)
    assert metrics(folder) == metrics(straight)
    adapter = "adapters/adapters.safetensors"
    assert contents(folder)[f"{folder}/{adapter}"][1] == contents(straight)[f"{straight}/{adapter}"][1]


def test_a_run_of_an_earlier_version_goes_on_quantized(packed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, step=3)
        assert packed.sft().status == 130
    (step,) = Path("runs/tiny/sft/checkpoints").glob("step-*")
    state = json.loads((step / "state.json").read_text())
    del state["progress"]["products"]
    (step / "state.json").write_text(json.dumps(state))
    assert product_choice._of_run(step.parent, Memory()) == {}
    frozen_products.use({"a": 128})
    product_choice.keep(step.parent, Memory(), ALONE)
    assert frozen_products.current() == {}


def test_another_way_that_the_recipe_asks_for_is_taken(packed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen(monkeypatch, 8)
    with monkeypatch.context() as patch:
        interrupt_after(patch, step=3)
        assert packed.sft().status == 130
    chosen(monkeypatch, 0)
    folder = packed.train("memory.dense_products=false")
    assert progress(folder) == {"asked": False, "rules": {}}


# What is chosen


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A GPU with 100 GB, on which the dense way is faster; the row counts that were measured."""
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path))
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    monkeypatch.setattr(device, "free_bytes", lambda: int(100 * GB))
    measured: list[int] = []

    def seconds(layer: Any, rows: int, dtype: mx.Dtype) -> tuple[float, float]:
        measured.append(rows)
        return (2.0, 1.0) if layer.weight.shape[0] != 96 else (1.0, 1.0)

    monkeypatch.setattr(product_speed, "seconds_of", seconds)
    return measured


def settled(*overrides: str) -> dict[str, int]:
    """The rules that are chosen, by the size of the weights."""
    recipe = load_recipe("recipe.yaml", list(overrides))
    product_choice.settle(recipe, load_model(recipe.model.path, dtype="float32"), tell=False)
    return {form.split()[-1]: rows for form, rows in frozen_products.current().items()}


def test_what_is_faster_is_measured_once(packed: Project, gpu: list[int]) -> None:
    """The MLP's gate and up are not faster. The head has chunks of more rows than any that is tried."""
    expected = {"64x64": 128, "32x64": 128, "64x96": 128, "300x64": 128}
    assert settled() == expected
    assert sorted(gpu) == [128] * 4 + [256] * 4 + [512] * 4 + [1024] * 5
    assert settled() == expected and len(gpu) == 17
    assert settled("memory.logit_rows=64") == {size: 128 for size in expected if size != "300x64"}


def test_nothing_is_measured_that_cannot_be_used(packed: Project, gpu: list[int], monkeypatch: Any) -> None:
    assert settled("memory.dense_products=false") == {}
    assert settled("memory.limit=1MB") == {}  # an eighth of it is less than 0.25 MB
    assert settled("memory.dense_products=true") == dict.fromkeys(FORMS, 128)
    assert gpu == []
    monkeypatch.setattr(device, "is_cpu", lambda: True)
    assert settled() == {} and gpu == []


# The memory that it takes

LLAMA = model_shape(
    {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
)
BFLOAT16 = Target(2, Packing(4, 64), fused_attention=True)


def test_the_unpacked_weights_of_an_8b_model() -> None:
    """A block has 2 x 4096 x (4096 + 1024) + 3 x 4096 x 14336 weights; two of them are counted, in two bytes each."""
    block = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336
    assert of_blocks(LLAMA, BFLOAT16) == 2 * block * 2 == 872_415_232
    assert of_head(LLAMA, BFLOAT16) == 2 * 4096 * 128256 * 2 == 2_101_346_304


@pytest.mark.parametrize(
    ("limit", "blocks", "head"),
    [
        (9.1, False, False),  # a Mac with 16 GB: 4.5 GB of weights leave 4.6, and an eighth of that is 0.6
        (18.2, True, False),  # with 32 GB
        (40.8, True, True),  # with 64 GB
    ],
)
def test_room_is_an_eighth_of_what_the_weights_leave(limit: float, blocks: bool, head: bool) -> None:
    settings = Memory()
    assert room(settings, LLAMA, BFLOAT16, limit * GB) == (blocks, head)
    expected = blocks * 872_415_232 + head * 2_101_346_304
    assert unpacked_bytes(settings, LLAMA, BFLOAT16, limit * GB, faster=True) == expected
    assert unpacked_bytes(settings, LLAMA, BFLOAT16, limit * GB, faster=False) == 0
    off, on = Memory(dense_products=False), Memory(dense_products=True)
    assert unpacked_bytes(off, LLAMA, BFLOAT16, limit * GB, faster=True) == 0
    assert unpacked_bytes(on, LLAMA, BFLOAT16, limit * GB, faster=False) >= 872_415_232
    assert room(on, LLAMA, Target(2, None, fused_attention=True), 1e12) == (False, False)


def test_plan_counts_it(packed: Project, gpu: list[int]) -> None:
    """First nothing is known of this machine; when it was measured to be faster, the weights of two blocks and the
    head are counted: 2 x 12 x 1024 + 6 x 64 x 96 and 300 x 64 values, twice."""
    recipe, config = load_recipe("recipe.yaml"), load_model(packed.recipe["model"]["path"]).config
    before = memory_check.training_step(recipe, "sft", config, memory_check.this_machine())
    settled()
    after = memory_check.training_step(recipe, "sft", config, memory_check.this_machine())
    values = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 300 * 64
    assert before.memory(recipe.memory).parts["unpacked"] == 0
    assert after.memory(recipe.memory).parts["unpacked"] == 2 * values * 4
    assert after.memory(recipe.memory).peak - before.memory(recipe.memory).peak == 2 * values * 4
