"""Five imported projects: the rows of a step, the steps and every learning rate equal those of the original trainer.

A warm-up is one step ahead of transformers' on purpose: there the first step has rate 0 and learns nothing.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from source_trainers import mlx_rates, trainer_rates, trainer_steps

from mlx_zh import sft
from mlx_zh.recipe import Recipe, load_recipe
from mlx_zh.training.order import Order
from mlx_zh.training.schedule import learning_rate

imports = importlib.import_module("mlx_zh.import").main  # the name is a word of the language


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(name: str, text: str, *options: str) -> Recipe:
    Path(name).write_text(text, encoding="utf-8")
    assert imports([name, "--out", "out.yaml", *options]) == 0
    return load_recipe("out.yaml")


def ours(recipe: Recipe, rows: int, stage: str = "sft") -> tuple[int, list[float]]:
    """The steps over this many rows, and the learning rate of each."""
    section = recipe.training(stage)
    total = Order(rows, section.batch_size, recipe.seed).steps(section.epochs, section.max_steps)
    ratio_steps = math.ceil(section.warmup_ratio * total)
    warmup = ratio_steps if section.warmup_steps is None else section.warmup_steps
    settings: Any = {"peak": section.learning_rate, "kind": section.lr_scheduler, "warmup": warmup}
    return total, [learning_rate(step, total, **settings) for step in range(total)]


def equal(theirs: list[float], mine: list[float], warmup: int) -> None:
    """Every rate after the warm-up is theirs; during it, each is theirs of one step later."""
    assert mine[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12, abs=1e-18)
    assert mine[:warmup] == pytest.approx(theirs[1 : warmup + 1], rel=1e-12)


def test_llama_factory(folder: Path) -> None:
    """41 rows, 2 a card on 2 cards, 3 accumulated: 12 rows a step, 4 steps an epoch, the last of 5 rows; 10 steps."""
    Path("data").mkdir()
    table = {"店规": {"file_name": "店规.json", "columns": {"prompt": "问", "response": "答"}}}
    Path("data/dataset_info.json").write_text(json.dumps(table), encoding="utf-8")
    text = """
model_name_or_path: Qwen/Qwen3-1.7B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 12
dataset: 店规
template: qwen3
cutoff_len: 300
per_device_train_batch_size: 2
gradient_accumulation_steps: 3
learning_rate: 2.0e-4
num_train_epochs: 2.5
lr_scheduler_type: cosine
warmup_ratio: 0.15
"""
    recipe = imported("train.yaml", text, "--devices", "2")
    assert recipe.sft.batch_size == 12 and recipe.data.max_length == 300
    assert (recipe.lora.rank, recipe.lora.alpha) == (12, 24)
    assert recipe.data.sft.train[0].columns == {"instruction": "问", "output": "答"}
    steps, rates = ours(recipe, 41)
    assert steps == trainer_steps(41, 2, 3, 2, 2.5) == 10
    equal(trainer_rates(10, 2e-4, "cosine", warmup_ratio=0.15), rates, warmup=2)


def test_trl(folder: Path) -> None:
    """DPO over 100 pairs: 4 a card, 5 accumulated, 1 epoch: 5 steps of 20. The reference is the model itself."""
    text = (
        "trl dpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name some/pairs --use_peft --lora_r 4 \\\n"
        "  --per_device_train_batch_size 4 --gradient_accumulation_steps 5 --num_train_epochs 1 --beta 0.3 \\\n"
        "  --warmup_steps 2 --lr_scheduler_type linear --label_smoothing 0.1\n"
    )
    recipe = imported("train.sh", text)
    assert (recipe.dpo.beta, recipe.dpo.label_smoothing, recipe.dpo.learning_rate) == (0.3, 0.1, 1e-6)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (4, 32, ("q_proj", "v_proj"))
    assert recipe.start("dpo") == "base" and recipe.dpo.reference == "start"
    steps, rates = ours(recipe, 100, "dpo")
    assert steps == trainer_steps(100, 4, 5, epochs=1) == 5
    equal(trainer_rates(5, 1e-6, "linear", warmup_steps=2), rates, warmup=2)


def test_unsloth(folder: Path) -> None:
    """Its own defaults: 4 rows, 2 accumulated, warm-up over a tenth, weight decay 0.001; 30 steps as it says."""
    text = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/Qwen3-4B", max_seq_length=512)
model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=8)
data = load_dataset("some/chats", split="train[:500]")
trainer = SFTTrainer(model=model, train_dataset=data, args=SFTConfig(max_steps=30, lr_scheduler_type="cosine"))
"""
    recipe = imported("train.py", text)
    assert (recipe.sft.batch_size, recipe.sft.weight_decay, recipe.seed) == (8, 0.001, 3407)
    assert recipe.data.sft.train[0].max_samples == 500 and recipe.data.train_on == "all"
    steps, rates = ours(recipe, 500)
    assert steps == trainer_steps(500, 4, 2, max_steps=30)
    equal(trainer_rates(30, 5e-5, "cosine", warmup_ratio=0.1), rates, warmup=3)


SCHEDULE = {"name": "cosine_decay", "warmup": 10, "warmup_init": 1e-6, "arguments": [3e-4, 89]}


def test_mlx_lm(folder: Path) -> None:
    """300 iterations, 3 of which make a step of 6 rows: 100 steps. After the warm-up, MLX's own schedule."""
    values = {
        "model": "mlx-community/Qwen3-0.6B-4bit",
        "train": True,
        "data": "chats",
        "batch_size": 2,
        "iters": 300,
        "grad_accumulation_steps": 3,
        "lr_schedule": SCHEDULE,
        "lora_parameters": {"rank": 5, "scale": 3.0, "dropout": 0.0},
    }
    recipe = imported("lora.yaml", yaml.safe_dump(values))
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.num_layers) == (5, 15, 16)
    assert recipe.sft.batch_size == 6 and recipe.sft.max_grad_norm is None and recipe.data.train_on == "all"
    steps, rates = ours(recipe, 1000)
    theirs = mlx_rates(300, 3, SCHEDULE, 0.0)
    assert steps == len(theirs) == 100
    float32 = 3e-4 * 2**-22  # MLX's cosine, near 0 a difference of numbers near 1
    assert rates[10:] == pytest.approx(theirs[10:], rel=0, abs=float32)
    rising = [abs(mine - other) for mine, other in zip(rates[:10], theirs[:10], strict=True)]
    assert max(rising) <= 3e-4 / 10  # a step of the rise


def test_mlx_lm_lora(folder: Path) -> None:
    """DPO for 2 epochs of 45 pairs, 4 at a time: 12 steps an epoch, at one rate. Its scale is 10 by default."""
    values = {"model": "mlx-community/Qwen3-0.6B-4bit", "train_mode": "dpo", "train_type": "dora", "data": "pairs"}
    values |= {"epochs": 2, "batch_size": 4, "beta": 0.2, "dpo_cpo_loss_type": "hinge", "learning_rate": 2e-6}
    recipe = imported("dpo.yaml", yaml.safe_dump(values))
    assert (recipe.dpo.loss, recipe.dpo.beta, recipe.lora.type) == ("hinge", 0.2, "dora")
    assert (recipe.lora.alpha, recipe.lora.num_layers) == (80, "all")
    steps, rates = ours(recipe, 45, "dpo")
    theirs = mlx_rates(2 * math.ceil(45 / 4), 1, None, 2e-6)
    assert (steps, rates) == (len(theirs), theirs)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 63, 64, 65])
@pytest.mark.parametrize(("per_device", "accumulation", "devices"), [(1, 8, 1), (3, 5, 1), (2, 3, 4), (8, 1, 2)])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.5, 3.0])
def test_steps_for_any_number_of_rows(
    rows: int, per_device: int, accumulation: int, devices: int, epochs: float
) -> None:
    """Rows that do not fill a batch, a step or an epoch are a step of their own in both."""
    order = Order(rows, per_device * accumulation * devices, 0)
    assert order.steps(epochs, None) == trainer_steps(rows, per_device, accumulation, devices, epochs)


def test_a_run_takes_these_steps(project: Any) -> None:
    """Imported and trained on a tiny model: steps, rates and tokens of metrics.jsonl are those of the original."""
    Path("data").mkdir()
    rows = [{"instruction": f"第{n}个字？", "input": "", "output": "好的" * (1 + n % 3)} for n in range(11)]
    rows[3] = rows[2]  # repeated rows are learned there too
    Path("data/ours.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    Path("data/dataset_info.json").write_text(json.dumps({"ours": {"file_name": "ours.json"}}))
    values = {"model_name_or_path": str(project.model), "stage": "sft", "finetuning_type": "lora", "lora_rank": 4}
    values |= {"dataset": "ours", "template": "qwen", "cutoff_len": 64, "per_device_train_batch_size": 2}
    values |= {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "learning_rate": 1e-2, "warmup_ratio": 0.3}
    Path("lf.yaml").write_text(yaml.safe_dump(values))
    Path("recipe.yaml").unlink()
    assert imports(["lf.yaml", "--out", "recipe.yaml", "--name", "tiny"]) == 0
    assert project.run(sft.main).status == 0
    lines = [json.loads(line) for line in Path("runs/tiny/sft/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "learning_rate" in line]
    assert len(lines) == trainer_steps(11, 2, 2, epochs=2) == 6
    equal(trainer_rates(6, 1e-2, "linear", warmup_ratio=0.3), [line["learning_rate"] for line in lines], warmup=2)
    # An answer is its bytes and the end token; a token a byte, 6 bytes a word.
    an_epoch = sum(len(row["output"].encode()) + 1 for row in rows)
    assert sum(line["scored_tokens"] for line in lines) == 2 * an_epoch
