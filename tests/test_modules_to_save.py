"""`lora.modules_to_save` from the recipe to the exported model, and raw text beside conversations on the way."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from project import Project, interrupt_after, losses, metrics

from mlx_zh import dpo, fuse, plan, prepare
from mlx_zh.recipe import Recipe

BOTH = "lora.modules_to_save=[embed_tokens, lm_head]"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in mx.load(str(path)).items()}


def recipe_of(project: Project, **lora: Any) -> Recipe:
    return Recipe.model_validate(project.recipe | {"lora": lora})


@pytest.mark.parametrize("value", [["embed"], ["model.embed_tokens"], ["q_proj"], "lm_head", [1]])
def test_names_of_other_modules_are_refused(project: Project, value: Any) -> None:
    result = project.sft(f"lora.modules_to_save={json.dumps(value)}")
    assert result.status == 2 and "lora.modules_to_save" in result.err


def test_full_fine_tuning_has_no_modules_beside_it(project: Project) -> None:
    result = project.sft(BOTH, "lora.type=full")
    assert result.status == 2 and "left out where lora.type is full" in result.err


def test_a_recipe_without_them_dumps_as_before(project: Project) -> None:
    assert "modules_to_save" not in recipe_of(project, rank=4).model_dump()["lora"]
    assert recipe_of(project, modules_to_save=["lm_head", "lm_head"]).lora.modules_to_save == ("lm_head",)


def test_training_stops_and_goes_on_and_fuses(project: Project, monkeypatch: Any) -> None:
    """With raw text: stopped and resumed is the run that was not, and every exported form has the tables."""
    Path("book.md").write_text(
        "".join(f"第{n}章：山里有座庙，庙里有个老和尚。\n\n" for n in range(9)), encoding="utf-8"
    )
    project.recipe["data"]["sft"]["train"] = ["train.jsonl", {"path": "book.md", "weight": 2.0}]
    project.write_recipe()
    shown = project.run(prepare.main, BOTH, "--show", "9")
    assert shown.status == 0 and "⟦" in shown.out and "老和尚。" in shown.out
    assert [line for line in shown.out.splitlines() if line.startswith("book.md: ")]
    whole = project.train(BOTH, name="whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        stopped = project.sft(BOTH, "name=parts")
    assert "Stopped after step 3" in stopped.out
    parts = project.train(BOTH, name="parts")
    assert metrics(parts) == metrics(whole)
    one, other = (arrays(folder / "adapters" / "adapters.safetensors") for folder in (whole, parts))
    assert {EMBEDDING, HEAD} <= one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    base = arrays(Path(project.model) / "model.safetensors")
    assert not np.array_equal(base[HEAD], one[HEAD]) and not np.array_equal(base[EMBEDDING], one[EMBEDDING])
    result = project.run(fuse.main, BOTH, "name=whole", "export.formats=[mlx, hf, peft]")
    assert result.status == 0, result
    hf = next(path for path in Path("runs/whole").rglob("model*.safetensors") if "hf" in str(path))
    stored = mx.load(str(hf))[HEAD].astype(mx.float32)
    np.testing.assert_allclose(np.array(stored), one[HEAD], rtol=2**-7)
    [peft] = Path("runs/whole").rglob("adapter_model.safetensors")
    np.testing.assert_array_equal(arrays(peft)["base_model.model.lm_head.weight"], one[HEAD])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("start", ["base", "sft"])
def test_dpo_begins_at_ln_2(project: Project, start: str, bits: int | None) -> None:
    """The reference is the policy at step 0, also where quantized tables became float32."""
    rows = [
        {"prompt": f"第{n}个字？", "chosen": "好的" * (1 + n % 3), "rejected": "不" * (2 + n % 2)} for n in range(8)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    project.recipe["data"]["dpo"] = {"train": ["pairs.jsonl"]}
    project.recipe["dpo"] = {"batch_size": 4, "max_steps": 2, "start": start}
    if bits:
        project.recipe["model"]["quantize"] = {"bits": bits, "group_size": 32}
        project.recipe["model"]["dtype"] = "float32"
    project.write_recipe()
    if start == "sft":
        project.train(BOTH)
    result = project.run(dpo.main, BOTH)
    assert result.status == 0, result
    first = metrics(Path("runs/tiny/dpo"))[0]
    assert first["loss"] == pytest.approx(log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)  # rows of the two passes are packed otherwise
    assert {EMBEDDING, HEAD} <= arrays(Path("runs/tiny/dpo/adapters/adapters.safetensors")).keys()
    assert losses(Path("runs/tiny/dpo"))[1] != first["loss"]


def test_the_plan_says_what_they_cost(project: Project) -> None:
    """The tiny model's two tables of 300 x 64 values: weights, gradient and two moments in float32 are 0.6 MB."""
    without, with_them = project.run(plan.main, "--quick"), project.run(plan.main, BOTH, "--quick")
    line = "lora.modules_to_save: 0.00 GB of this are weights, gradient and two moments"
    assert with_them.status == 0 and line in with_them.out and line not in without.out


@pytest.mark.thorough
def test_two_ranks_train_the_tables_as_one_does(project: Project, tmp_path: Path) -> None:
    import ranks

    for name, count in (("one", 1), ("two", 2)):
        ranks.run(count, ["sft", "recipe.yaml", f"name={name}", BOTH, "sft.max_steps=3"], folder=tmp_path)
    one, two = (arrays(Path("runs", name, "sft/adapters/adapters.safetensors")) for name in ("one", "two"))
    base = arrays(Path(project.model) / "model.safetensors")
    assert one.keys() == two.keys()
    for name in (EMBEDDING, HEAD):
        moved = np.linalg.norm(one[name] - base[name])
        # Adam divides by the size of a gradient, so rounding moves a weight whose gradient is near 0 by whole steps.
        assert moved > 0.1 and np.linalg.norm(one[name] - two[name]) < 0.02 * moved


def test_an_adapter_with_tables_keeps_them_when_it_is_trained_further(project: Project) -> None:
    project.train("lora.modules_to_save=[lm_head]")
    result = project.sft("name=two", "sft.start=runs/tiny/sft/adapters")
    assert result.status == 0 and "modules_to_save [lm_head] (the recipe's lora section: [])" in result.out
    assert HEAD in arrays(Path("runs/two/sft/adapters/adapters.safetensors"))
