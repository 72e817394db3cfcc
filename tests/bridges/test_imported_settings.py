"""What single settings mean in their own programs, and what a recipe makes of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_zh import prepare
from mlx_zh.bridges.project import Imported, Wishes, import_project
from mlx_zh.core.families import FAMILIES
from mlx_zh.errors import RecipeError

LEAST = {"model_name_or_path": "Qwen/Qwen3-1.7B", "stage": "sft", "finetuning_type": "lora", "dataset": "a"}
TABLE: dict[str, Any] = {
    "a": {"file_name": "a.json"},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "问", "chosen": "好", "rejected": "坏"},
    },
    "hub": {"hf_hub_url": "x/y", "ms_hub_url": "z/y", "subset": "s", "split": "train_sft", "formatting": "sharegpt"},
    "raw": {"file_name": "raw.json", "columns": {"prompt": "正文"}, "num_samples": 7},
    "marked": {"file_name": "marked.json", "columns": {"kto_tag": "label"}},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_ZH_LANG", "en")
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(TABLE))
    return tmp_path


def of(file: str, text: str, **wishes: Any) -> Imported:
    Path(file).write_text(text, encoding="utf-8")
    return import_project([Path(file)], Wishes(**wishes))


def factory(**values: Any) -> Imported:
    return of("t.yaml", yaml.safe_dump({**LEAST, **values}))


def differing(imported: Imported) -> list[str]:
    return [row.theirs.split(":")[0] for row in imported.rows if row.level == "differs"]


def refusal(**values: Any) -> str:
    with pytest.raises(RecipeError) as error:
        factory(**values)
    return str(error.value)


def test_their_defaults_are_written_where_ours_are_others() -> None:
    recipe = factory().recipe
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.data.max_length) == (8, 16, 2048)
    assert (recipe.sft.batch_size, recipe.sft.epochs, recipe.sft.learning_rate) == (8, 3, 5e-5)
    assert (recipe.sft.lr_scheduler, recipe.sft.warmup_ratio) == ("linear", 0)
    assert not recipe.data.deduplicate.exact and recipe.data.deduplicate.near is None


def test_constant_has_no_warmup_there() -> None:
    assert factory(lr_scheduler_type="constant", warmup_ratio=0.1).recipe.sft.warmup_steps == 0
    assert factory(lr_scheduler_type="constant_with_warmup", warmup_ratio=0.1).recipe.sft.warmup_ratio == 0.1


def test_warmup_steps_go_before_the_ratio_and_below_one_are_a_share() -> None:
    assert factory(warmup_steps=7, warmup_ratio=0.5).recipe.sft.warmup_steps == 7
    assert factory(warmup_steps=0.25).recipe.sft.warmup_ratio == 0.25


def test_preferences_compare_with_the_model_without_an_adapter() -> None:
    """LLaMA-Factory turns the adapter off for the reference, also an adapter that it goes on training."""
    more = {"stage": "dpo", "dataset": "pairs", "lora_dropout": 0.1}
    alone = factory(**more).recipe
    assert (alone.start("dpo"), alone.dpo.reference, alone.lora.dropout) == ("base", "start", 0)
    further = factory(**more, adapter_name_or_path="saves/x", pref_beta=0.4, pref_ftx=0.2).recipe
    assert (further.dpo.start, further.dpo.reference) == ("saves/x", "base")
    assert (further.dpo.beta, further.dpo.sft_weight) == (0.4, 0.2)
    assert further.data.dpo.train[0].columns == {"instruction": "问", "chosen": "好", "rejected": "坏"}


def test_losses_of_preferences() -> None:
    simpo = factory(stage="dpo", dataset="pairs", pref_loss="simpo", simpo_gamma=1.5, pref_beta=2.0).recipe
    assert (simpo.dpo.loss, simpo.dpo.simpo_gamma, simpo.dpo.reference) == ("simpo", 1.5, "none")
    kto = factory(stage="kto", dataset="marked", kto_rejected_weight=0.5).recipe
    assert (kto.dpo.loss, kto.dpo.undesirable_weight, kto.dpo.desirable_weight) == ("kto", 0.5, 1.0)
    assert "kto_pair" in refusal(stage="dpo", dataset="pairs", pref_loss="kto_pair")
    assert "pairs is for dpo" in refusal(dataset="pairs")


def test_frozen_layers_are_the_last_ones() -> None:
    recipe = factory(finetuning_type="freeze", freeze_trainable_layers=3).recipe
    assert (recipe.lora.type, recipe.lora.num_layers) == ("full", 3)
    assert recipe.model.path == "Qwen/Qwen3-1.7B" and recipe.model.quantize is None
    assert "first ones" in refusal(finetuning_type="freeze", freeze_trainable_layers=-2)


def test_raw_text_is_read_from_the_column_of_prompts() -> None:
    imported = factory(stage="pt", dataset="raw", max_samples=100)
    source = imported.recipe.data.sft.train[0]
    assert (source.format, source.columns, source.max_samples) == ("text", {"text": "正文"}, 7)
    assert "packing" in differing(imported)


def test_a_set_on_both_hubs() -> None:
    recipe = factory(dataset="hub", max_samples=50).recipe
    entry = recipe.data.registry["hub"]
    assert entry.ids == {"huggingface": "x/y", "modelscope": "z/y"}
    assert (entry.subset, entry.split, entry.format) == ("s", "train_sft", "sharegpt")
    assert recipe.data.sft.train[0].max_samples == 50


def test_mixing() -> None:
    recipe = factory(dataset="a, hub", mix_strategy="interleave_under", interleave_probs="0.7, 0.3").recipe
    assert recipe.data.mixing == "interleave"
    assert [source.weight for source in recipe.data.sft.train] == [0.7, 0.3]
    assert "mix_strategy" in differing(factory(dataset="a,hub", mix_strategy="interleave_over"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("pissa_init", True), ("packing", True), ("use_galore", True), ("val_size", 100), ("optim", "adafactor")],
)
def test_what_changes_the_result_is_a_warning(setting: str, value: Any) -> None:
    imported = factory(**{setting: value})
    assert setting in differing(imported)
    head = imported.text.partition("\nmodel:")[0]
    assert setting in head  # it stands at the top of the recipe too
    assert setting not in differing(factory(**{setting: False if value is True else None}))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"stage": "rm"}, "no reward models"),
        ({"stage": "ppo"}, "no PPO"),
        ({"finetuning_type": "oft"}, "oft"),
        ({"use_dft_loss": True}, "cross-entropy"),
        ({"export_dir": "x"}, "mlx-zh fuse"),
        ({"dataset": "none"}, "has: a, pairs"),
        ({"model_name_or_path": "someone/Llama-3-8B-AWQ"}, "AWQ"),
        ({"model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}, "images"),
        ({"model_name_or_path": "deepseek-ai/DeepSeek-V2-Lite"}, "DeepSeek-V2"),
        ({"finetuning_type": "full", "quantization_bit": 4}, "in full"),
        ({"lora_rank": "many", "cutoff_len": -1}, "cutoff_len must be"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(values: dict[str, Any], reason: str) -> None:
    assert reason in refusal(**values)


def test_all_reasons_are_told_at_once() -> None:
    told = refusal(lora_rank="many", use_dft_loss=True, model_name_or_path="Qwen/Qwen2-VL-2B", dataset="none")
    assert told.count("\n  - ") == 4


@pytest.mark.parametrize(
    ("model", "path", "bits"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b", None),
        ("LLM-Research/Meta-Llama-3.1-8B-Instruct", "llama3.1-8b", None),
        ("unsloth/Qwen3-14B-unsloth-bnb-4bit", "qwen3-14b", None),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B-Base", 4),
        ("someone/Qwen3-8B", "someone/Qwen3-8B", 4),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", None),
        ("mlx-community/Qwen3-4B-4bit", "qwen3-4b", None),
    ],
)
def test_models_get_short_names_or_four_bits(model: str, path: str, bits: int | None) -> None:
    found = factory(model_name_or_path=model).recipe.model
    assert (found.path, found.quantize and found.quantize.bits) == (path, bits)


def test_a_template_of_another_family_is_a_difference() -> None:
    assert "template" not in differing(factory(template="qwen3"))
    assert "template" in differing(factory(template="llama3"))
    assert "template" in differing(factory(template="alpaca"))


def test_thinking_is_turned_off_only_where_the_model_has_the_switch() -> None:
    """LLaMA-Factory's other templates do not read enable_thinking, and model.thinking is refused for other models."""
    off = factory(template="qwen3", enable_thinking=False)
    assert off.recipe.model.thinking == "off"
    plain = factory(template="qwen", enable_thinking=False, model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct")
    assert plain.recipe.model.thinking == "auto" and not differing(plain)
    written = factory(template="mimo", enable_thinking=False, model_name_or_path="XiaomiMiMo/MiMo-7B-RL")
    assert written.recipe.model.thinking == "auto" and differing(written) == ["enable_thinking"]


def test_the_tables_name_what_exists() -> None:
    from mlx_zh.bridges.base_models import tables
    from mlx_zh.models.catalog import catalog

    assert set(tables()["short"].values()) <= set(catalog())
    assert set(FAMILIES) <= {entry["type"] for entry in tables()["families"]}


def test_devices_of_a_script() -> None:
    command = (
        "llamafactory-cli train --stage sft --model_name_or_path Qwen/Qwen3-1.7B --dataset a --finetuning_type lora"
    )
    for start, devices in (("", 1), ("CUDA_VISIBLE_DEVICES=0,1,5 ", 3), ("NNODES=2 NPROC_PER_NODE=4 ", 8)):
        imported = of("t.sh", f"#!/bin/bash\n{start}{command} \\\n  --per_device_train_batch_size 2\n")
        assert imported.recipe.sft.batch_size == 2 * devices
    assert of("t.sh", command, devices=5).recipe.sft.batch_size == 40


OPTIONS = "--model_name_or_path Qwen/Qwen3-1.7B --per_device_train_batch_size 2 --learning_rate 1e-5"


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
@pytest.mark.parametrize(
    ("start", "devices"),
    [
        ("python", 1),
        ("torchrun --nproc_per_node 4 --nnodes 2", 8),
        ("deepspeed --num_gpus 3", 3),
        ("deepspeed --include localhost:0,1,2,3@other:0,5 --master_port=9901", 6),
        ("accelerate launch --gpu_ids 0,2", 2),
        ("accelerate launch --config_file conf/cards.yaml", 5),
        ("accelerate launch --config_file conf/one.yaml", 1),
    ],
)
def test_a_script_of_llama_factory_is_not_taken_for_one_of_trl(start: str, devices: int, stage: str) -> None:
    """Its stages have the names of TRL's trainers; and how many cards each launcher names."""
    Path("conf").mkdir()
    Path("conf/cards.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 5\n"
    )
    Path("conf/one.yaml").write_text("distributed_type: 'NO'\nnum_processes: 8\n")
    data = {"sft": "a", "dpo": "pairs", "kto": "marked"}[stage]
    imported = of("t.sh", f"{start} src/train.py --stage {stage} --do_train --dataset {data} {OPTIONS}\n")
    assert imported.program == "llama-factory"
    assert imported.recipe.training("sft" if stage == "sft" else "dpo").batch_size == 2 * devices


@pytest.mark.parametrize("start", ["trl sft", "python trl/scripts/sft.py", "accelerate launch -m trl.scripts.sft"])
def test_scripts_of_trl(start: str) -> None:
    assert of("t.sh", f"{start} --dataset_name x/y {OPTIONS}\n").program == "trl"


@pytest.mark.parametrize(
    ("named", "devices"),
    [("num_processes: 4", 4), ("accelerate_config: zero2", 8), ("accelerate_config: no.yaml", 1)],
)
def test_devices_in_a_file_of_trl(named: str, devices: int) -> None:
    """Options of accelerate may stand in TRL's file; TRL's own configurations are for 8 processes."""
    text = "model_name_or_path: Qwen/Qwen3-1.7B\ndataset_name: x/y\nper_device_train_batch_size: 2\n"
    imported = of("t.yaml", f"{text}{named}\n")
    assert imported.recipe.sft.batch_size == 2 * devices
    assert any("how many" in row.note for row in imported.rows) == (devices == 1)
    assert not [row for row in imported.rows if "is known" in row.note]


@pytest.mark.parametrize(
    "start",
    [
        "FORCE_TORCHRUN=1 llamafactory-cli train",
        "NNODES=2 NODE_RANK=0 llamafactory-cli train",
        "torchrun src/train.py",
        "deepspeed src/train.py",
        "accelerate launch --config_file none.yaml src/train.py",
    ],
)
def test_a_launcher_that_does_not_say_how_many_cards_is_told(start: str) -> None:
    imported = of("t.sh", f"{start} --stage sft --dataset a {OPTIONS}\n")
    assert any("how many" in row.note for row in imported.rows)


def test_a_usual_file_of_llama_factory_has_no_unknown_setting() -> None:
    """Settings of its sample files, and those that a file keeps when it is changed to another stage."""
    imported = factory(
        per_device_eval_batch_size=1,
        pref_beta=0.1,
        pref_loss="sigmoid",
        freeze_trainable_layers=2,
        preprocessing_num_workers=16,
        dataloader_num_workers=4,
        data_seed=7,
        max_new_tokens=512,
        temperature=0.95,
        metric_for_best_model="eval_loss",
    )
    assert not differing(imported)


def test_a_command_line_over_its_file() -> None:
    Path("conf").mkdir()
    Path("conf/x.yaml").write_text(yaml.safe_dump({**LEAST, "learning_rate": 1e-3, "lora_rank": 4}))
    recipe = of("t.sh", "export X=6\nllamafactory-cli train conf/x.yaml lora_rank=${X} cutoff_len=99\n").recipe
    assert (recipe.lora.rank, recipe.data.max_length, recipe.sft.learning_rate) == (6, 99, 1e-3)


NOTEBOOK = [
    "%%capture\nimport os\nif 'COLAB_' in os.environ:\n    !pip install unsloth \\\n        accelerate\n%cd /content",
    "%%bash\nnvidia-smi -L | head -n 1",
    "from unsloth import FastLanguageModel\nfrom trl import SFTTrainer, SFTConfig\nsize = 1024",
    "model, tokenizer = FastLanguageModel.from_pretrained(model_name='unsloth/Qwen3-4B', max_seq_length=size)",
    "model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=8)\ntokenizer?",
    "data = load_dataset('some/chats')\ndata = data.select(range(900)).train_test_split(test_size=0.1)",
    "trainer = SFTTrainer(model=model, train_dataset=data['train'], args=SFTConfig(max_steps=30))\ntrainer.train()",
    "if False:\n    model, tokenizer = FastLanguageModel.from_pretrained('lora_model', max_seq_length=4096)",
]


@pytest.mark.parametrize("form", ["ipynb", "py"])
def test_the_model_is_the_one_before_the_training(form: str) -> None:
    """Notebooks load their result again at the end, to try it. Lines for the shell and %%bash are no Python."""
    cells = [{"cell_type": "code", "source": source.splitlines(keepends=True)} for source in NOTEBOOK]
    script = "\n".join(source for source in NOTEBOOK if not source.startswith("%%bash"))
    recipe = of(f"t.{form}", json.dumps({"cells": cells}) if form == "ipynb" else script).recipe
    assert (recipe.model.path, recipe.data.max_length) == ("qwen3-4b", 1024)
    assert recipe.data.sft.train[0].max_samples == 900 and recipe.data.validation_fraction == 0.1


SCRIPT = """
from trl import {kind}Config, {kind}Trainer
from peft import LoraConfig
data = load_dataset("some/rows", split="train")
args = {kind}Config(per_device_train_batch_size=4, num_train_epochs=1)
trainer = {kind}Trainer(model="Qwen/Qwen2.5-0.5B-Instruct", args=args, train_dataset=data, peft_config=LoraConfig())
"""


@pytest.mark.parametrize(("kind", "rate"), [("SFT", 2e-5), ("DPO", 1e-6), ("KTO", 1e-6)])
def test_a_script_without_unsloth_has_the_defaults_of_trl_and_peft(kind: str, rate: float) -> None:
    """Unsloth's are others: 2 accumulated, warm-up, weight decay, 4 bits."""
    imported = of("t.py", SCRIPT.format(kind=kind))
    recipe, stage = imported.recipe, "sft" if kind == "SFT" else "dpo"
    training = recipe.training(stage)
    assert imported.program == "trl"
    assert (training.batch_size, training.learning_rate, training.warmup_ratio) == (4, rate, 0)
    assert (training.weight_decay, recipe.seed, recipe.data.max_length) == (0, 42, 1024)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (8, 8, ("q_proj", "v_proj"))


def test_a_script_that_writes_its_prompts_itself_is_told() -> None:
    own = of("t.py", SCRIPT.format(kind="SFT").replace("epochs=1", "epochs=1, dataset_text_field='text'"))
    assert any("chat template" in row.note for row in own.rows)
    text = SCRIPT.format(kind="SFT").replace("epochs=1", "epochs=1, dataset_text_field='text'")
    rendered = of("t.py", f"{text}\nx = tokenizer.apply_chat_template(rows, tokenize=False)\n")
    assert not any("chat template" in row.note for row in rendered.rows)


def test_a_slice_for_validation_is_told() -> None:
    part = {"path": "x/y", "train_split": "train[:100]", "valid_split": "train[-100:]"}
    values = {"model": "Qwen/Qwen3-8B", "iters": 100, "hf_dataset": part}
    notes = [row.note for row in of("m.yaml", yaml.safe_dump(values)).rows]
    assert any("train[-100:]" in note and "data.sft.validation" in note for note in notes)
    values["hf_dataset"] = part | {"valid_split": "test"}
    recipe = yaml.safe_load(of("m.yaml", yaml.safe_dump(values)).text)
    assert recipe["data"]["sft"]["validation"][0]["split"] == "test"


def test_adapters_of_tables_are_told() -> None:
    script = "trl sft --model_name_or_path Qwen/Qwen3-8B --dataset_name x/y --use_peft --lora_target_modules "
    for names, differs in (("q_proj v_proj", False), ("q_proj embed_tokens", True)):
        rows = of("run.sh", script + names + "\n").rows
        assert any(row.level == "differs" and "embed_tokens" in row.note for row in rows) == differs


def test_schedules_of_mlx_lm_that_end_elsewhere_are_told() -> None:
    values: dict[str, Any] = {"model": "mlx-community/Qwen3-0.6B-4bit", "data": "d", "iters": 100}
    for arguments, differs in (([1e-4, 100], False), ([1e-4, 100, 2e-5], True), ([1e-4, 400], True)):
        values["lr_schedule"] = {"name": "cosine_decay", "arguments": arguments}
        notes = [row.note for row in of("m.yaml", yaml.safe_dump(values)).rows]
        assert any("learning rate differs by up to" in note for note in notes) == differs
    # Ends at 2e-5 of 1e-4: a fifth of the highest rate, at the last step a little less.
    values["lr_schedule"]["arguments"] = [1e-4, 100, 2e-5]
    notes = [row.note for row in of("m.yaml", yaml.safe_dump(values)).rows]
    assert any("up to 20.0 %" in note for note in notes)


def test_imported_pairs_and_labels_are_read(project: Any) -> None:
    """The columns and formats of dataset_info.json, as `mlx-zh prepare` reads them."""
    Path("data").mkdir(exist_ok=True)
    Path("data/dataset_info.json").write_text(json.dumps(TABLE))
    Path("data/pairs.json").write_text(json.dumps([{"问": f"{n}？", "好": "好的", "坏": "不"} for n in range(6)]))
    marked = [{"instruction": f"{n}？", "output": "好的", "label": n % 2 == 0} for n in range(6)]
    Path("data/marked.json").write_text(json.dumps(marked))
    Path("data/raw.json").write_text(json.dumps([{"正文": f"第{n}段文字。"} for n in range(6)]))
    for stage, name in (("dpo", "pairs"), ("kto", "marked"), ("pt", "raw")):
        Path("recipe.yaml").unlink()
        values = {**LEAST, "model_name_or_path": str(project.model), "stage": stage, "dataset": name}
        Path("t.yaml").write_text(yaml.safe_dump(values))
        importlib.import_module("mlx_zh.import").main(["t.yaml", "--out", "recipe.yaml", "--name", stage])
        result = project.run(prepare.main)
        assert result.status == 0, result.err
        assert "6" in result.out


def pair(sft: dict[str, Any], dpo: dict[str, Any]) -> Imported:
    Path("sft.yaml").write_text(yaml.safe_dump({**LEAST, "output_dir": "saves/sft", **sft}))
    Path("dpo.yaml").write_text(yaml.safe_dump({**LEAST, "stage": "dpo", "dataset": "pairs", **dpo}))
    return import_project([Path("dpo.yaml"), Path("sft.yaml")], Wishes())


def test_sft_and_preferences_become_one_recipe() -> None:
    """After SFT's adapter the reference is the model alone there; after a merged model it is what was merged."""
    further = pair({"learning_rate": 2e-4}, {"adapter_name_or_path": "saves/sft/", "learning_rate": 1e-6}).recipe
    assert (further.start("dpo"), further.dpo.reference) == ("sft", "base")
    assert (further.sft.learning_rate, further.dpo.learning_rate) == (2e-4, 1e-6)
    merged = pair({}, {"model_name_or_path": "saves/merged"}).recipe
    assert (merged.start("dpo"), merged.dpo.reference) == ("sft", "start")
    assert merged.model.path == "qwen3-1.7b"
    apart = pair({}, {}).recipe
    assert apart.start("dpo") == "base"
    different = pair({"lora_rank": 4}, {"lora_rank": 32, "adapter_name_or_path": "saves/sft"})
    assert different.recipe.lora.rank == 4
    assert any("lora.rank" in row.note and "32" in row.note for row in different.rows)
    with pytest.raises(RecipeError, match="one is of SFT"):
        pair({}, {"stage": "sft", "dataset": "a"})
