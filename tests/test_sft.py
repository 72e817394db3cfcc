"""The SFT stage from command line to run folder, on a tiny model."""

from __future__ import annotations

import json
import math
import shlex
import signal
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model as load_mlx_lm
from project import TRAIN, VALIDATION, Project, contents, interrupt_after, losses, message, metrics

from mlx_zh.models.adapters.files import load_adapter, read_adapter
from mlx_zh.models.adapters.peft import write_peft
from mlx_zh.models.load import load_model
from mlx_zh.recipe import load_recipe

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def weights(folder: Path) -> dict[str, mx.array]:
    return read_adapter(folder / "adapters")[1]


def same(left: dict[str, mx.array], right: dict[str, mx.array]) -> bool:
    return left.keys() == right.keys() and all(mx.array_equal(left[name], right[name]).item() for name in left)


def config(folder: Path) -> dict:
    return json.loads((folder / "adapters" / "adapter_config.json").read_text())


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# The run folder


def test_a_run_leaves_what_the_design_says(project: Project):
    result = project.sft("evaluate.prompts=[你好]", "evaluate.max_new_tokens=3", "sft.eval_steps=3")
    assert (result.status, result.err) == (0, "")
    run = Path("runs/tiny")
    assert {path.name for path in (run / "sft" / "checkpoints").iterdir()} == {"best", "step-000006"}
    left = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and not p.match("step-000006/*")}
    assert left == {
        *("recipe.yaml", "manifest.json", "samples.json", "data/report.json"),
        *("sft/settings.json", "sft/summary.json", "sft/metrics.jsonl"),
        *("sft/adapters/adapters.safetensors", "sft/adapters/adapter_config.json"),
        *("sft/checkpoints/best/adapters.safetensors", "sft/checkpoints/best/adapter_config.json"),
    }
    overrides = ["evaluate.prompts=[你好]", "evaluate.max_new_tokens=3", "sft.eval_steps=3"]
    assert load_recipe(run / "recipe.yaml") == load_recipe("recipe.yaml", overrides)

    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["versions"]["mlx"] and manifest["machine"]["device"] and manifest["command"]
    assert manifest["model"]["source"] == str(project.model) and len(manifest["model"]["fingerprint"]) == 64
    assert manifest["data"].keys() == {"train.jsonl", "validation.jsonl"}

    answers = json.loads((run / "samples.json").read_text())
    assert answers["prompts"] == ["你好"]
    assert {name: len(said) for name, said in answers["answers"].items()} == {"base": 1, "sft": 1}
    for shown in ("train.jsonl: 12 examples", "validation loss", "> 你好", "runs/tiny/sft/adapters/"):
        assert shown in result.out


def test_metrics_have_a_line_a_step_and_one_a_validation(project: Project):
    folder = project.train("sft.eval_steps=3")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        *((0, True), (1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True)),
    ]
    names = "step epoch loss learning_rate grad_norm scored_tokens tokens tokens_per_second peak_memory_gb"
    assert all(list(line) == [*names.split(), "elapsed_seconds"] for line in lines if "loss" in line)
    # An epoch is 12 examples in 3 steps, and a scored token is a byte of a reply or the mark at its end.
    assert [line["epoch"] for line in lines if "loss" in line] == [round(n / 3, 4) for n in range(1, 7)]
    scored = sum(len(said.encode()) + 1 for _, said in TRAIN)
    assert sum(line["scored_tokens"] for line in lines[1:4]) == scored
    # Warm-up is 5 % of 6 steps, so one; then a cosine over the other five.
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == pytest.approx([1e-2] + [1e-2 * 0.5 * (1 + math.cos(math.pi * n / 5)) for n in range(5)])
    assert summary(folder)["eval_loss_before"] == lines[0]["eval_loss"]
    assert summary(folder)["eval_loss_after"] == lines[-1]["eval_loss"] < 0.7 * lines[0]["eval_loss"]


def test_the_first_validation_loss_is_the_base_models_own(project: Project, byte_tokenizer):
    """Mean cross-entropy of the replies' bytes and end marks, from mlx-lm's forward over one conversation each."""
    folder = project.train("sft.max_steps=1")
    model, _ = load_mlx_lm(project.model)
    total, count = 0.0, 0
    for asked, said in VALIDATION:
        prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        first = len(byte_tokenizer.encode(prompt))
        tokens = byte_tokenizer.encode(f"{prompt}{said}<|im_end|>")
        logits = model(mx.array([tokens[:-1]]))[0, first - 1 :]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        total -= sum(logprobs[n, token].item() for n, token in enumerate(tokens[first:]))
        count += len(tokens) - first
    assert losses(folder, "eval_loss")[0] == pytest.approx(total / count, rel=1e-5)


def test_the_adapter_is_one_for_mlx_lm(project: Project):
    folder = project.train()
    ours = load_model(str(project.model)).model
    load_adapter(ours, folder / "adapters")
    theirs, _ = load_mlx_lm(project.model)
    base = theirs(mx.array([[1, 2, 3]]))
    load_adapters(theirs, str(folder / "adapters"))
    tokens = mx.array([[1, 2, 3]])
    assert mx.allclose(ours(tokens), theirs(tokens), atol=1e-5)
    assert not mx.allclose(base, theirs(tokens), atol=0.1)


# Settings of the recipe


def test_lora_settings_reach_the_adapter(project: Project):
    plain = project.train("sft.max_steps=1", name="plain")
    assert config(plain)["lora_parameters"] | {"keys": None} == {
        "rank": 4,
        "scale": 2.0,  # alpha 8 / rank 4
        "dropout": 0.0,
        "keys": None,
    }
    assert {name.split(".")[-2] for name in weights(plain)} == set(ALL)
    few = project.train("sft.max_steps=1", "lora.targets=[q_proj, v_proj]", "lora.num_layers=2", name="few")
    assert {name.rsplit(".", 1)[0] for name in weights(few)} == {
        f"model.layers.{layer}.self_attn.{target}" for layer in (1, 2) for target in ("q_proj", "v_proj")
    }
    stabilised = project.train("sft.max_steps=1", "lora.rslora=true", name="rslora")
    assert config(stabilised)["lora_parameters"]["scale"] == 4.0  # alpha 8 / sqrt(rank 4)


def test_loraplus_multiplies_the_rate_of_b(project: Project):
    """Adam's first step has the length of the learning rate whatever the gradient, so B is exactly 4 times as far."""
    once = weights(project.train("sft.max_steps=1", name="once"))
    more = weights(project.train("sft.max_steps=1", "lora.loraplus_ratio=4", name="more"))
    for name in once:
        assert mx.allclose(more[name], once[name] * (4 if name.endswith("lora_b") else 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        ["lora.type=dora"],
        ["lora.dropout=0.1", "sft.neftune_alpha=5"],
        ["lora.num_layers=1", "memory.checkpoint_layers=true", "memory.micro_tokens=64"],
        ["data.train_on=all", "sft.lr_scheduler=linear", "sft.weight_decay=0.1", "sft.max_grad_norm=null"],
    ],
    ids=lambda settings: settings[0],
)
def test_what_else_learns(project: Project, settings: list[str]):
    folder = project.train("sft.max_steps=8", *settings)
    before, after = losses(folder, "eval_loss")
    assert after < 0.9 * before
    assert config(folder)["fine_tune_type"] == ("dora" if "lora.type=dora" in settings else "lora")


def test_a_quantized_model_learns(project: Project, model_folder):
    before, after = losses(project.train(f"model.path={model_folder(quantized=4)}"), "eval_loss")
    assert after < 0.7 * before


def test_full_fine_tuning_trains_float32_weights_of_a_bfloat16_model(project: Project, model_folder):
    """At a rate of 1e-4 a bfloat16 weight near 0.2 would not move at all: its neighbours are 1e-3 away."""
    path = model_folder(dtype="bfloat16")
    folder = project.train(
        f"model.path={path}", "model.dtype=bfloat16", "lora.type=full", "sft.learning_rate=1e-4", "sft.max_steps=3"
    )
    trained, base = weights(folder), mx.load(str(path / "model.safetensors"))
    assert trained.keys() == base.keys()  # every block, so embedding, norm and head too
    assert {array.dtype for array in trained.values()} == {mx.float32}
    moved = [mx.abs(array - base[name]).max().item() for name, array in trained.items()]
    assert min(moved) > 0 and max(moved) < 4e-4
    before, after = losses(folder, "eval_loss")
    assert after < before

    loaded = load_model(str(path), dtype="bfloat16").model
    load_adapter(loaded, folder / "adapters")
    assert mx.array_equal(loaded.lm_head.weight.astype(mx.float32), trained["lm_head.weight"])


def test_full_fine_tuning_of_some_layers(project: Project):
    folder = project.train("lora.type=full", "lora.num_layers=1", "sft.learning_rate=1e-3")
    assert {name.split(".")[2] for name in weights(folder)} == {"2"}
    before, after = losses(folder, "eval_loss")
    assert after < before


def test_noise_is_for_training_alone(project: Project):
    plain = project.train("sft.max_steps=2", name="plain")
    noisy = project.train("sft.max_steps=2", "sft.neftune_alpha=5", name="noisy")
    assert losses(plain, "eval_loss")[0] == losses(noisy, "eval_loss")[0]
    assert losses(plain)[0] != losses(noisy)[0]


@pytest.mark.parametrize(("train_on", "scored"), [("assistant", 4 + 7), ("last", 7), ("all", 10 + 16 + 9 + 18)])
def test_train_on_says_which_turns_are_scored(project: Project, train_on: str, scored: int):
    """A reply's bytes and its end mark: 好 is 3 + 1, 好的 is 6 + 1.

    `all` scores headers too, 6 tokens for the user and 11 for the assistant, and line breaks between turns, but not
    the very first token, which nothing predicts: 问 is 5 + 4 + 1, 好 11 + 4 + 1, ? 6 + 2 + 1 and 好的 11 + 7.
    """
    turns = [message("user", "问"), message("assistant", "好"), message("user", "?"), message("assistant", "好的")]
    Path("train.jsonl").write_text(json.dumps({"messages": turns}))
    folder = project.train("sft.max_steps=1", f"data.train_on={train_on}")
    assert metrics(folder)[1]["scored_tokens"] == scored


def test_max_steps_may_go_beyond_the_epochs_and_batches_beyond_the_data(project: Project):
    folder = project.train("sft.epochs=1", "sft.batch_size=20", "sft.max_steps=3")
    assert [(line["step"], line["epoch"]) for line in metrics(folder) if "loss" in line] == [(1, 1), (2, 2), (3, 3)]


def test_a_batch_that_does_not_divide_the_data_leaves_a_smaller_one(project: Project):
    project.recipe["sft"] = {"batch_size": 5, "epochs": 2}
    project.write_recipe()
    steps = [line for line in metrics(project.train()) if "loss" in line]
    assert [line["epoch"] for line in steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-4)
    scored = sum(len(said.encode()) + 1 for _, said in TRAIN)
    assert [sum(line["scored_tokens"] for line in half) for half in (steps[:3], steps[3:])] == [scored, scored]


WORSE = ["sft.eval_steps=1", "sft.early_stopping=2", "sft.max_steps=9"]


@pytest.fixture
def ever_worse(project: Project) -> Project:
    """What is learned makes the validation reply less likely with every step, so patience of 2 ends it at step 2."""
    project.write_data("validation.jsonl", (("第一个字？", "ZZZZ"),))
    return project


def test_early_stopping_ends_a_run_that_gets_worse(ever_worse: Project):
    folder = ever_worse.train(*WORSE, "sft.load_best=true")
    found = summary(folder)
    assert (found["finished"], found["steps"], found["best"]["step"]) == ("early_stopping", 2, 0)
    assert found["eval_loss_after"] == found["eval_loss_before"]
    assert not any(array.any().item() for name, array in weights(folder).items() if name.endswith("lora_b"))
    assert "is finished" in ever_worse.sft(*WORSE, "sft.load_best=true").out


def test_load_best_takes_the_weights_of_the_lowest_validation_loss(project: Project):
    """The rate is warmed up to one that ruins the model, so the best weights are those of an early step."""
    settings = ["sft.learning_rate=1", "sft.warmup_steps=60", "sft.max_steps=40", "sft.eval_steps=4"]
    folder = project.train(*settings, "sft.load_best=true", name="best")
    best = summary(folder)["best"]
    evaluated = {line["step"]: line["eval_loss"] for line in metrics(folder) if "eval_loss" in line}
    assert best["step"] == min(evaluated, key=evaluated.__getitem__) not in (0, 40)
    assert summary(folder)["eval_loss_after"] == best["eval_loss"] == min(evaluated.values())
    assert same(weights(folder), read_adapter(folder / "checkpoints" / "best")[1])
    last = project.train(*settings, name="last")
    assert metrics(last) == metrics(folder)
    assert summary(last)["eval_loss_after"] == evaluated[40]
    assert not same(weights(last), weights(folder))


def test_the_best_is_kept_where_it_is_asked_for(project: Project):
    kept = project.train("sft.max_steps=1", name="kept")
    without = project.train("sft.max_steps=1", "checkpoint.keep_best=false", name="without")
    assert [(folder / "checkpoints" / "best").exists() for folder in (kept, without)] == [True, False]


# Again, on, and anew


def test_a_finished_run_only_reports(project: Project, monkeypatch):
    first = project.sft("evaluate.prompts=[你好]", "evaluate.max_new_tokens=3")
    before = contents(Path("runs"))
    monkeypatch.setattr("mlx_zh.training.loop.Loop.run", lambda self: pytest.fail("trained again"))
    again = project.sft("evaluate.prompts=[你好]", "evaluate.max_new_tokens=3", "memory.micro_tokens=64")
    assert (again.status, again.err) == (0, "")
    assert "runs/tiny/sft is finished: nothing is left to train. To train again, add --fresh." in again.out
    report = first.out[first.out.index("  > 你好") :]
    assert again.out.endswith(report) and "validation loss" in report
    assert contents(Path("runs")) == before


def test_other_settings_are_refused_by_name_and_nothing_is_touched(project: Project):
    project.train()
    before = contents(Path("runs"))
    result = project.sft("sft.learning_rate=2e-3", "lora.targets=[q_proj]", "data.system=你是助手", "seed=7")
    assert result.status == 2
    assert result.err == (
        'error: runs/tiny/sft holds a run with other settings: data.system null -> "你是助手"; '
        'lora.targets "all" -> ["q_proj"]; seed 42 -> 7; sft.learning_rate 0.01 -> 0.002. Give this recipe another '
        "name, or start over with --fresh (the old folder is kept beside it). To train the adapter that is here for "
        "sft.epochs more: name=tiny-2 sft.start=runs/tiny/sft/adapters\n"
    )
    project.write_data("train.jsonl", TRAIN[:-1])
    assert "holds a run with other settings: the content of train.jsonl. Give" in project.sft().err
    assert contents(Path("runs")) == before


def test_more_epochs_of_a_finished_run_are_refused_with_the_way_that_works(project: Project):
    project.recipe["sft"] |= {"max_steps": None, "epochs": 1}
    project.write_recipe()
    project.train()
    refused = project.sft("sft.epochs=2")
    assert refused.status == 2
    assert "sft.epochs 1.0 -> 2.0. Its learning rate was planned for its own number of steps" in refused.err
    words = refused.err.rpartition("for sft.epochs more: ")[2].split()
    assert words == ["name=tiny-2", "sft.start=runs/tiny/sft/adapters"]
    further = project.sft("sft.epochs=2", *words)
    assert (further.status, further.err) == (0, "")
    assert "Starting from the adapter in runs/tiny/sft/adapters." in further.out
    assert max(line["epoch"] for line in metrics(Path("runs/tiny-2/sft")) if "epoch" in line) == 2
    again = project.sft("sft.epochs=2")
    assert "name=tiny-3 sft.start=runs/tiny/sft/adapters" in again.err  # tiny-2 is taken


def test_the_way_that_works_can_be_pasted_with_a_space_in_the_folder(project: Project):
    project.recipe["sft"] |= {"max_steps": None, "epochs": 1}
    project.recipe["runs"] = "my runs"
    project.write_recipe()
    assert project.sft().status == 0
    words = shlex.split(project.sft("sft.epochs=2").err.rpartition("for sft.epochs more: ")[2])
    assert words == ["name=tiny-2", "sft.start=my runs/tiny/sft/adapters"]
    assert project.sft("sft.epochs=2", *words).status == 0


@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_training_goes_on_exactly_from_an_adapter_with_new_data(project: Project, form: str):
    """The first validation of the second run is the last one of the first, digit for digit."""
    first = project.train("sft.learning_rate=1e-2")
    adapter = first / "adapters"
    if form == "peft":
        spec, weights = read_adapter(adapter)
        names = {name.rpartition(".")[0] for name in weights}
        write_peft(Path("peft"), spec, weights, base="org/model", matrices=names)
        adapter = Path("peft")
    project.write_data("train.jsonl", TRAIN[:5])
    second = project.train(f"sft.start={adapter}", name="two")
    assert losses(second, "eval_loss")[0] == losses(first, "eval_loss")[-1]
    assert losses(second, "eval_loss")[-1] != losses(second, "eval_loss")[0]
    again = project.sft("name=two", f"sft.start={adapter}")
    assert "is finished" in again.out
    (adapter / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes() + b"\n")
    assert "other settings: the adapter to start from." in project.sft("name=two", f"sft.start={adapter}").err


def test_an_interrupted_run_from_an_adapter_goes_on_as_if_it_had_not_been(project: Project, monkeypatch):
    start = f"sft.start={project.train() / 'adapters'}"
    whole = project.train(start, name="whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert project.sft("name=cut", start).status == 130
    cut = project.train(start, name="cut")
    assert metrics(cut) == metrics(whole)
    assert contents(cut / "adapters")["runs/cut/sft/adapters/adapters.safetensors"][1] == (
        (whole / "adapters/adapters.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("runs/tiny/sft", "there is no adapter in runs/tiny/sft: it is in runs/tiny/sft/adapters, so set sft.start="),
        ("runs/tiny", "there is no adapter in runs/tiny: it is in runs/tiny/sft/adapters, so set sft.start="),
        (
            "nowhere",
            "there is no adapter in nowhere: set it to the folder that holds adapters.safetensors or adapter_",
        ),
    ],
)
def test_a_start_that_is_no_adapter_is_refused_with_what_to_do(project: Project, start: str, expected: str):
    project.train()
    refused = project.sft("name=two", f"sft.start={start}")
    assert refused.status == 2 and expected in refused.err
    assert not Path("runs/two/sft").exists()


def test_a_run_does_not_start_from_what_it_overwrites(project: Project):
    project.train()
    before = contents(Path("runs/tiny/sft"))
    refused = project.sft("--fresh", "sft.start=runs/tiny/sft/adapters")
    assert refused.status == 2 and "Give the new run another name, for example name=tiny-2" in refused.err
    assert contents(Path("runs/tiny/sft")) == before


def test_renew_starts_over_only_where_the_settings_differ(project: Project):
    """What `mlx-zh run` asks for: the same settings are not trained again, others do not end in an error."""
    before = contents(project.train())
    assert "is finished" in project.sft("--renew").out
    assert contents(Path("runs/tiny/sft")) == before
    result = project.sft("--renew", "seed=7")
    assert (result.status, result.err) == (0, "")
    assert "runs/tiny/sft holds a run with other settings: seed 42 -> 7." in result.out
    assert Path("runs/tiny/sft-old1").is_dir()


def test_what_the_other_stage_learns_from_is_no_other_setting(project: Project):
    project.train()
    assert "is finished" in project.sft("data.dpo.train=[pairs.jsonl]", "checkpoint.keep=5").out


def test_fresh_keeps_the_old_run_beside_the_new_one(project: Project):
    old = contents(project.train())
    for number in (1, 2):
        result = project.sft("--fresh", "seed=7")
        assert (result.status, result.err) == (0, "")
        assert f"The earlier run is kept in runs/tiny/sft-old{number}." in result.out
    kept = contents(Path("runs/tiny/sft-old1"))
    assert [value for _, value in kept.items()] == [value for _, value in old.items()]
    assert losses(Path("runs/tiny/sft")) == losses(Path("runs/tiny/sft-old2")) != losses(Path("runs/tiny/sft-old1"))


@pytest.mark.parametrize("settings", [[], ["lora.dropout=0.2", "sft.neftune_alpha=5"]], ids=["plain", "noise"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(project: Project, monkeypatch, settings: list[str]):
    settings = [*settings, "sft.eval_steps=2", "evaluate.prompts=[你好]", "evaluate.max_new_tokens=3"]
    straight = project.train(*settings, name="straight")
    with monkeypatch.context() as patch:
        interrupt_after(patch, step=3)
        result = project.sft(*settings)
    assert result.status == 130
    assert "Finishing this step and saving; press Ctrl-C again to leave at once." in result.out
    assert "Stopped after step 3; run the same command to go on from there." in result.out
    folder = Path("runs/tiny/sft")
    assert not (folder / "adapters").exists() and not (folder / "summary.json").exists()
    base = json.loads(Path("runs/tiny/samples.json").read_text())["answers"]

    result = project.sft(*settings)
    assert (result.status, result.err) == (0, "")
    assert "Going on after step 3 of 6." in result.out
    assert metrics(folder) == metrics(straight)
    assert same(weights(folder), weights(straight))
    assert json.loads(Path("runs/tiny/samples.json").read_text())["answers"]["base"] == base["base"]


def test_an_interrupted_run_goes_on_with_other_memory_but_not_with_other_learning(project: Project, monkeypatch):
    straight = project.train(name="straight")
    with monkeypatch.context() as patch:
        interrupt_after(patch, step=3)
        assert project.sft().status == 130
    refused = project.sft("sft.max_steps=20")
    assert refused.status == 2 and "sft.max_steps 6 -> 20" in refused.err
    folder = project.train("memory.micro_tokens=50", "memory.checkpoint_layers=true", "memory.logit_rows=7")
    assert losses(folder) == pytest.approx(losses(straight), rel=1e-5)


def test_an_interruption_at_an_early_stop_does_not_undo_it(ever_worse: Project, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, step=2)
        assert ever_worse.sft(*WORSE).status == 0
    assert summary(Path("runs/tiny/sft"))["steps"] == 2
    for file in ("summary.json", "adapters/adapter_config.json"):  # as if killed before these were written
        Path("runs/tiny/sft", file).unlink()
    folder = ever_worse.train(*WORSE)
    assert (summary(folder)["finished"], summary(folder)["steps"]) == ("early_stopping", 2)


def reached(name: str) -> int:
    folder = Path("runs", name, "sft")
    return len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0


def test_signals_to_real_runs(project: Project):
    """Ctrl-C is heeded after the step in hand; after `kill -9` the last checkpoint counts. Both end as undisturbed.

    The two run side by side, and each gets its signal as soon as it has taken five steps.
    """
    settings = ["sft.max_steps=40", "sft.batch_size=8", "checkpoint.every_steps=4"]
    signals = {"interrupted": (signal.SIGINT, 130), "killed": (signal.SIGKILL, -signal.SIGKILL)}
    processes = {name: project.start(f"name={name}", *settings) for name in signals}
    try:
        waiting, end = set(signals), time.monotonic() + 120
        while waiting:
            assert time.monotonic() < end, f"{waiting} do not get on"
            for name in [name for name in waiting if reached(name) >= 5]:
                processes[name].send_signal(signals[name][0])
                waiting.remove(name)
            time.sleep(0.01)
        for name, process in processes.items():
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (signals[name][1], "")
            assert ("run the same command to go on from there." in out) == (name == "interrupted")
            assert 5 <= reached(name) < 40
    finally:
        for process in processes.values():
            process.kill()
    straight = project.train(*settings, name="straight")
    for name in signals:
        folder = project.train(*settings, name=name)
        assert metrics(folder) == metrics(straight)
        assert same(weights(folder), weights(straight))
