"""The DPO stage from command line to run folder, on a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sentences
from project import Project, Result, interrupt_after, losses, message, metrics

from mlx_zh import dpo
from mlx_zh.models.adapters.files import read_adapter
from mlx_zh.models.adapters.peft import write_peft
from mlx_zh.models.identity import sampled_fingerprint
from mlx_zh.training import reference

LN2 = math.log(2)
TRAIN = [(f"第{n}个字？", "好的" * (1 + n % 3), "好" + "no " * (1 + n % 4)) for n in range(10)]
VALIDATION = [("第一个字？", "好的好的", "no"), ("第二个字？", "好", "no no"), ("三？", "好的", "nono")]
TRL = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")] + [
    "logps/chosen",
    "logps/rejected",
]


def rows(pairs: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return [
        {"prompt": [message("user", p)], "chosen": [message("assistant", c)], "rejected": [message("assistant", r)]}
        for p, c, r in pairs
    ]


def write(name: str, found: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")


@pytest.fixture
def preferring(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with preference pairs, whose recipe has no SFT data, and a cache of its own."""
    monkeypatch.setenv("MLX_ZH_CACHE", "cache")
    write("pairs.jsonl", rows(TRAIN))
    write("pairs-validation.jsonl", rows(VALIDATION))
    del project.recipe["data"]["sft"]
    project.recipe["data"]["dpo"] = {"train": ["pairs.jsonl"], "validation": ["pairs-validation.jsonl"]}
    project.recipe["dpo"] = {"batch_size": 4, "max_steps": 5, "learning_rate": 1e-2}
    project.write_recipe()
    return project


@pytest.fixture
def tuned(preferring: Project) -> Project:
    """The same after two steps of SFT."""
    preferring.recipe["data"]["sft"] = {"train": ["train.jsonl"]}
    preferring.recipe["sft"]["max_steps"] = 2
    preferring.write_recipe()
    preferring.train()
    return preferring


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of each forward pass for a reference."""
    calls: list[int] = []
    forward = reference.batch_logprobs

    def counted(model: Any, batch: Any, **options: Any) -> mx.array:
        calls.append(batch.num_sequences // 2)
        return forward(model, batch, **options)

    monkeypatch.setattr(reference, "batch_logprobs", counted)
    return calls


def run(project: Project, *arguments: str) -> Result:
    return project.run(dpo.main, *arguments)


def prefer(project: Project, *arguments: str, name: str = "tiny") -> Path:
    """The folder of a run that must end well: `runs/NAME/dpo`."""
    result = run(project, f"name={name}", *arguments)
    assert (result.status, result.err) == (0, ""), result
    return Path("runs", name, "dpo")


def weights(folder: Path) -> dict[str, mx.array]:
    return read_adapter(folder / "adapters")[1]


def same(left: dict[str, mx.array], right: dict[str, mx.array]) -> bool:
    return left.keys() == right.keys() and all(mx.array_equal(left[n], right[n]).item() for n in left)


# From SFT to DPO


def test_a_run_goes_on_from_the_sft_adapter(tuned: Project) -> None:
    result = run(tuned, "evaluate.prompts=[你好]", "evaluate.max_new_tokens=3")
    assert (result.status, result.err) == (0, "")
    folder = Path("runs/tiny/dpo")
    for shown in (
        "pairs.jsonl: 10 pairs",
        "Starting from the adapter in runs/tiny/sft/adapters.",
        "0 pairs found in cache/reference/",
        "13 to compute.",
        "step 0: validation loss 0.6931, reward accuracy",
        "validation reward margin 0.00 -> ",
        "runs/tiny/dpo/adapters/",
    ):
        assert shown in result.out, shown
    assert "warning" not in result.out
    before, after = weights(Path("runs/tiny/sft")), weights(folder)
    assert before.keys() == after.keys() and not same(before, after)
    answers = json.loads(Path("runs/tiny/samples.json").read_text())["answers"]
    assert answers.keys() == {"base", "dpo"}  # SFT was run without prompts
    about = json.loads((folder / "adapters" / "adapter_config.json").read_text())["mlx_zh"]
    assert about["stage"] == "dpo" and about["base"] == str(tuned.model)
    manifest = json.loads(Path("runs/tiny/manifest.json").read_text())
    assert manifest["data"].keys() == {"train.jsonl", "pairs.jsonl", "pairs-validation.jsonl"}


def test_the_reference_of_a_continued_adapter_is_the_policy_at_step_0(tuned: Project) -> None:
    """SFT that went on from an adapter, then DPO on it: before the first step margins are 0 and the loss is ln 2."""
    start = ["name=two", "sft.start=runs/tiny/sft/adapters"]
    assert tuned.sft(*start).status == 0
    lines = metrics(prefer(tuned, *start[1:], name="two"))
    assert lines[0]["step"] == 0 and lines[0]["eval_loss"] == pytest.approx(LN2, abs=1e-5)
    assert lines[0]["eval_rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_a_peft_folder_is_a_start(tuned: Project) -> None:
    """The same adapter in either form gives the same run, digit for digit."""
    spec, arrays = read_adapter(Path("runs/tiny/sft/adapters"))
    names = {name.rpartition(".")[0] for name in arrays}
    write_peft(Path("peft"), spec, arrays, base="org/model", matrices=names)
    other = metrics(prefer(tuned, "dpo.start=peft", name="peft"))
    assert other == metrics(prefer(tuned))


def test_metrics_have_trls_names_and_start_at_ln_2(tuned: Project) -> None:
    lines = metrics(prefer(tuned, "dpo.eval_steps=2"))
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5] and [line["step"] for line in checks] == [0, 2, 4, 5]
    assert all(set(TRL) <= line.keys() for line in steps)
    assert all({f"eval_{name}" for name in TRL} <= line.keys() for line in checks)
    assert [line["pairs"] for line in steps] == [4, 4, 2, 4, 4]  # 10 pairs: the third step of an epoch is smaller
    assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-5) and checks[0]["eval_loss"] == pytest.approx(LN2, abs=1e-5)
    for line, name in ((steps[0], "rewards/"), (checks[0], "eval_rewards/")):
        assert [line[name + which] for which in ("chosen", "rejected", "margins")] == pytest.approx([0] * 3, abs=1e-5)
    assert checks[-1]["eval_loss"] < 0.6 and checks[-1]["eval_rewards/margins"] > 0.2
    assert checks[-1]["eval_rewards/accuracies"] == 1.0


def test_without_sft_data_it_starts_from_the_base(preferring: Project) -> None:
    result = run(preferring)
    assert result.status == 0 and "Starting from the base model." in result.out
    assert losses(Path("runs/tiny/dpo"))[0] == pytest.approx(LN2, abs=1e-5)


def test_sft_that_was_not_run_is_missed(preferring: Project) -> None:
    preferring.recipe["data"]["sft"] = {"train": ["train.jsonl"]}
    preferring.write_recipe()
    result = run(preferring)
    assert result.status == 2 and "run `mlx-zh sft recipe.yaml` first, or set dpo.start=base" in result.err
    assert not Path("runs").exists()
    assert run(preferring, "dpo.start=base").status == 0


def test_another_adapter_keeps_its_shape(tuned: Project) -> None:
    """From an adapter of another rank than the recipe's: a warning, and no new matrices."""
    folder = prefer(tuned, "dpo.start=runs/tiny/sft/adapters", "lora.rank=8", "lora.alpha=32", name="other")
    assert weights(folder).keys() == weights(Path("runs/tiny/sft")).keys()
    assert json.loads((folder / "adapters" / "adapter_config.json").read_text())["lora_parameters"]["rank"] == 4
    result = run(tuned, "name=again", "dpo.start=runs/tiny/sft/adapters", "lora.rank=8", "lora.alpha=32")
    assert (
        "keeps the shape of the adapter in runs/tiny/sft/adapters: rank 4 (the recipe's lora section: 8)"
        in result.out
    )
    assert "scale 2.0 (the recipe's lora section: 4.0)" in result.out
    (warning,) = sentences.kept(Path("runs/again/dpo/warnings.jsonl"))
    assert warning is not None and "rank 为 4（配方的 lora 部分为 8）" in warning.text("zh")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("nowhere", "dpo.start is nowhere, but there is no adapter in nowhere"),
        ("runs/tiny", "no adapter in runs/tiny"),
    ],
)
def test_an_adapter_that_is_not_there_is_named(preferring: Project, start: str, message: str) -> None:
    result = run(preferring, f"dpo.start={start}")
    assert result.status == 2 and message in result.err


def test_an_adapter_of_another_base_model_is_refused(tuned: Project, model_folder: Any) -> None:
    result = run(tuned, f"model.path={model_folder(seed=5)}")
    assert result.status == 2 and "was trained on" in result.err and "run the SFT stage again" in result.err


@pytest.mark.parametrize("settings", [["lora.type=dora"], ["lora.type=full", "lora.num_layers=1"]])
def test_what_else_starts_at_ln_2(preferring: Project, settings: list[str]) -> None:
    found = metrics(prefer(preferring, *settings))
    assert found[0]["eval_loss"] == pytest.approx(LN2, abs=1e-5) and found[1]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert found[-1]["eval_loss"] < LN2


@pytest.mark.parametrize("changes", [{"quantized": 4}, {"dtype": "bfloat16"}])
def test_other_precisions_pass_the_check_of_the_first_step(
    preferring: Project, model_folder: Any, changes: dict[str, Any]
) -> None:
    """bfloat16 is computed as such here, not in float32: rounding differs from row to row."""
    dtype = ["model.dtype=bfloat16"] if "dtype" in changes else []
    folder = prefer(preferring, f"model.path={model_folder(**changes)}", *dtype, "memory.micro_tokens=60")
    assert losses(folder)[0] == pytest.approx(LN2, abs=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        ["dpo.loss=simpo", "dpo.beta=2.0"],
        ["dpo.loss=orpo"],
        ["dpo.loss=aot", "memory.micro_tokens=60"],
        ["dpo.loss=ipo", "dpo.ld_alpha=0.5"],
        ["dpo.f_divergence=js", "dpo.sft_weight=0.5", "dpo.label_smoothing=0.1", "dpo.neftune_alpha=5"],
    ],
)
def test_other_losses_learn(preferring: Project, settings: list[str], forwards: list[int]) -> None:
    found = metrics(prefer(preferring, *settings, "lora.dropout=0.1"))
    assert found[-1]["eval_loss"] < found[0]["eval_loss"]
    assert found[-1]["eval_rewards/margins"] > found[0]["eval_rewards/margins"]
    assert bool(forwards) == (settings[0] not in ("dpo.loss=simpo", "dpo.loss=orpo"))


# The reference


def test_the_reference_is_found_again(tuned: Project, forwards: list[int]) -> None:
    """By a sweep over beta and loss, another seed, and a run over more pairs, which costs only those."""
    prefer(tuned)
    assert sum(forwards) == 13
    del forwards[:]
    settings = (["dpo.beta=0.5"], ["dpo.loss=ipo", "dpo.ld_alpha=0.5"], ["seed=7", "memory.micro_tokens=50"])
    for number, changes in enumerate(settings):
        result = run(tuned, f"name=sweep{number}", "dpo.start=runs/tiny/sft/adapters", *changes)
        assert (
            result.status == 0 and "13 pairs found in cache/reference/" in result.out and "0 to compute" in result.out
        )
    write("pairs.jsonl", rows([*TRAIN, ("新的字？", "好的", "no")]))
    result = run(tuned, "name=grown", "dpo.start=runs/tiny/sft/adapters")
    assert "13 pairs found" in result.out and "1 to compute" in result.out
    assert forwards == [1]


def test_only_pairs_that_the_run_visits_are_computed(tuned: Project, forwards: list[int]) -> None:
    """One step of 4 pairs, and 3 for validation."""
    prefer(tuned, "dpo.max_steps=1")
    assert sum(forwards) == 7


def test_a_killed_reference_pass_is_taken_up(tuned: Project, forwards: list[int], monkeypatch: Any) -> None:
    settings = ["memory.micro_tokens=60"]
    monkeypatch.setattr(reference, "_MAX_TOKENS", 60)
    with monkeypatch.context() as patch:
        append = reference.ReferenceStore.append

        def interrupted(store: Any, entries: Any) -> None:
            if len(forwards) == 3:
                raise KeyboardInterrupt
            append(store, entries)

        patch.setattr(reference.ReferenceStore, "append", interrupted)
        result = run(tuned, *settings)
    assert result.status == 130 and "the reference log-probs computed so far are kept" in result.out
    kept = sum(forwards[:2])
    assert 0 < kept < 10
    del forwards[:]
    result = run(tuned, *settings)
    assert result.status == 0 and f"{kept} pairs found" in result.out and f"{13 - kept} to compute" in result.out
    assert sum(forwards) == 13 - kept
    assert losses(Path("runs/tiny/dpo"))[0] == pytest.approx(LN2, abs=1e-5)


def test_the_base_as_reference_has_no_adapter_on(tuned: Project) -> None:
    """With DoRA a scale of 0 would not do. Starting from SFT, the first rewards are what SFT learned, not 0; and what
    was computed for the base serves a run that starts from it."""
    shutil.rmtree("runs")
    tuned.train("lora.type=dora")
    folder = prefer(tuned, "dpo.reference=base", "lora.type=dora")
    first = metrics(folder)[1]
    assert abs(first["rewards/chosen"]) > 0.01 and abs(first["loss"] - LN2) > 1e-3
    result = run(tuned, "name=from-base", "dpo.start=base", "lora.type=dora")
    assert "13 pairs found" in result.out and "0 to compute" in result.out
    assert losses(Path("runs/from-base/dpo"))[0] == pytest.approx(LN2, abs=1e-5)


def test_a_wrong_reference_stops_the_first_step(tuned: Project) -> None:
    """The file of another model under this one's name: refused with the usual causes, and no adapter is written."""
    prefer(tuned, "dpo.start=base", name="base")
    base = next(Path("cache/reference").iterdir())
    prefer(tuned, name="tiny")
    own = next(path for path in Path("cache/reference").iterdir() if path != base)
    shutil.copy(base, own)
    result = run(tuned, "--fresh")
    assert result.status == 2
    for shown in (
        "rewards/chosen is",
        "not 0",
        "ln 2 = 0.6931",
        "dropout",
        "another adapter",
        "rendered differently",
    ):
        assert shown in result.err, shown
    assert not Path("runs/tiny/dpo/adapters").exists()
    own.unlink()
    assert run(tuned).status == 0


# Going on


@pytest.mark.parametrize("settings", [[], ["dpo.loss=aot", "dpo.sft_weight=0.3"], ["dpo.neftune_alpha=5"]])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tuned: Project, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    """Even when the reference has to be computed again: it is of the start weights, not of the checkpoint's."""
    straight = prefer(tuned, *settings, "dpo.start=runs/tiny/sft/adapters", name="straight")
    with monkeypatch.context() as patch:
        interrupt_after(patch, step=3)
        assert run(tuned, *settings).status == 130
    shutil.rmtree("cache")
    result = run(tuned, *settings)
    assert (result.status, result.err) == (0, "")
    assert "Going on after step 3 of 5." in result.out and "13 to compute" in result.out
    folder = Path("runs/tiny/dpo")
    assert metrics(folder) == metrics(straight)
    assert same(weights(folder), weights(straight))


def test_a_finished_run_only_reports_and_another_start_is_another_run(tuned: Project) -> None:
    prefer(tuned)
    result = run(tuned)
    assert result.status == 0 and "nothing is left to train" in result.out and "reward accuracy" in result.out
    shutil.rmtree("runs/tiny/sft")
    tuned.train("sft.learning_rate=5e-3")
    result = run(tuned)
    assert result.status == 2 and "the adapter to start from" in result.err
    assert run(tuned, "--fresh").status == 0


# Warnings


def test_weights_that_do_not_move_are_told(tuned: Project) -> None:
    result = run(tuned, "dpo.learning_rate=1e-20")
    assert result.status == 0 and "warning: the first step changed no weight" in result.out


# Data


def test_pairs_that_cannot_be_used_are_counted_with_a_reason(preferring: Project) -> None:
    usable = rows(TRAIN[:4])
    several = [message("system", "简短。"), message("user", "一"), message("assistant", "二"), message("user", "三")]
    bad = rows(
        [
            ("同", "一样", "一样 "),
            ("空", "好", ""),
            ("长" * 60, "好", "坏"),
            ("一", "好" * 60, "坏"),
            ("二", "好", "坏" * 60),
        ]
    )
    write("pairs.jsonl", [*usable, {**usable[0], "prompt": several}, *bad])
    result = run(preferring)
    assert result.status == 2 and "pairs.jsonl:6" in result.err and "pairs.jsonl:7" in result.err
    result = run(preferring, "data.on_invalid=skip")
    assert result.status == 0
    line = next(line for line in result.out.splitlines() if line.startswith("pairs.jsonl"))
    assert line.startswith("pairs.jsonl: 5 pairs (")
    for reason in (
        "1 identical responses",
        "1 empty response",
        "1 prompt longer than max_length",
        "1 chosen response does not fit into max_length",
        "1 rejected response does not fit into max_length",
    ):
        assert reason in line
    assert losses(Path("runs/tiny/dpo"))[0] == pytest.approx(LN2, abs=1e-5)


def test_no_pairs_is_an_error(preferring: Project) -> None:
    result = run(preferring, "data.dpo.train=[]")
    assert result.status == 2 and "data.dpo.train names no file" in result.err
    write("pairs.jsonl", rows([("长" * 60, "好", "坏")]))
    result = run(preferring)
    assert result.status == 2 and "nothing is left to learn from in pairs.jsonl" in result.err


def test_a_system_message_is_put_before_prompts_that_have_none(preferring: Project) -> None:
    """Twelve bytes and a turn's marks more: 'system', a newline and '你好', at the front of every prompt."""
    plain = metrics(prefer(preferring, "dpo.max_steps=1"))[1]["tokens"]
    longer = metrics(prefer(preferring, "dpo.max_steps=1", "data.system=你好", name="system"))[1]["tokens"]
    turn = 1 + len(b"system\n") + len("你好".encode()) + 1 + len(b"\n")
    assert longer - plain == 4 * turn


def test_weights_between_the_samples_of_earlier_versions_make_another_reference(
    preferring: Project, forwards: list[int]
) -> None:
    """Few rows of the embedding differ, nothing at the beginning, middle and end of a tensor."""
    shutil.copytree(preferring.model, "patched")
    path = Path("patched/model.safetensors")
    arrays = dict(mx.load(str(path)))
    table = arrays["model.embed_tokens.weight"]
    patched = np.array(table)
    patched[len(patched) // 4] *= 2
    mx.save_safetensors(str(path), arrays | {"model.embed_tokens.weight": mx.array(patched)})
    assert sampled_fingerprint(Path("patched")) == sampled_fingerprint(preferring.model)
    prefer(preferring, name="one")
    computed = sum(forwards)
    prefer(preferring, "model.path=patched", name="two")
    assert sum(forwards) == 2 * computed
