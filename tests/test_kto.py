"""KTO from command line to run folder: the dpo stage with dpo.loss kto, on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import ranks
from project import Project, Result, interrupt_after, metrics

from mlx_zh import cli, dpo, plan, prepare, report
from mlx_zh.errors import RecipeError
from mlx_zh.models.adapters.files import read_adapter
from mlx_zh.recipe import Dpo, load_recipe
from mlx_zh.stages.labelled_answers import imbalance

GOOD = [(f"第{n}个字？", "好的" * (1 + n % 3), True) for n in range(6)]
BAD = [(f"第{n}个字？", "no " * (1 + n % 4) + "!", False) for n in range(6)]
VALIDATION = [("第一个字？", "好的好的", True), ("第二个字？", "no no", False), ("三？", "nono", False)]


def rows(answers: list[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": said, "label": label} for prompt, said, label in answers]


def write(name: str, found: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")


@pytest.fixture
def labelling(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with labelled answers, whose recipe has no SFT data, and a cache of its own."""
    monkeypatch.setenv("MLX_ZH_CACHE", "cache")
    write("answers.jsonl", rows([answer for both in zip(GOOD, BAD, strict=True) for answer in both]))
    write("validation.jsonl", rows(VALIDATION))
    del project.recipe["data"]["sft"]
    project.recipe["data"]["dpo"] = {"train": ["answers.jsonl"], "validation": ["validation.jsonl"]}
    project.recipe["dpo"] = {"loss": "kto", "batch_size": 4, "max_steps": 5, "learning_rate": 1e-2}
    project.write_recipe()
    return project


def run(project: Project, *arguments: str) -> Result:
    return project.run(dpo.main, *arguments)


def learn(project: Project, *arguments: str, name: str = "tiny") -> Path:
    """The folder of a run that must end well: `runs/NAME/dpo`."""
    result = run(project, f"name={name}", *arguments)
    assert (result.status, result.err) == (0, ""), result
    return Path("runs", name, "dpo")


def weights(folder: Path) -> dict[str, mx.array]:
    return read_adapter(folder / "adapters")[1]


def same(left: dict[str, mx.array], right: dict[str, mx.array]) -> bool:
    return left.keys() == right.keys() and all(mx.array_equal(left[n], right[n]).item() for n in left)


def test_rewards_part_and_the_reference_is_the_policy_at_step_0(labelling: Project) -> None:
    result = run(labelling)
    assert (result.status, result.err) == (0, ""), result
    for shown in (
        "answers.jsonl: 12 answers",
        "KTO learns from 6 good and 6 bad answers.",
        "0 answers found in cache/reference/",
        "15 to compute.",
        "step 0: validation loss 0.5000, reward margin 0.00",
        "validation KL 0.00 -> ",
    ):
        assert shown in result.out, shown
    assert "warning" not in result.out
    assert re.search(r"\bKTO +\d+%", result.out)  # the progress bar
    lines = metrics(Path("runs/tiny/dpo"))
    assert lines[0]["eval_loss"] == pytest.approx(0.5, abs=1e-5)  # 1 - s(0), for either kind
    assert lines[0]["eval_kl"] == pytest.approx(0, abs=1e-4)
    names = {f"{kind}/{which}" for kind in ("rewards", "logps", "count") for which in ("chosen", "rejected")}
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 5 and all("kl" in step and step["kl"] >= 0 for step in steps)
    assert names | {"rewards/margins", "kl"} <= {name for step in steps for name in step}
    assert all(step["count/chosen"] + step["count/rejected"] == 4 for step in steps)
    assert lines[-1]["eval_rewards/margins"] > 0.5
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.05


def test_neither_rows_nor_the_memory_settings_change_the_run(labelling: Project) -> None:
    whole = metrics(learn(labelling, name="whole"))
    for settings in (["memory.micro_tokens=1"], ["memory.micro_tokens=60", "memory.checkpoint_layers=true"]):
        cut = metrics(learn(labelling, *settings, name="cut"))
        shutil.rmtree("runs/cut")
        for one, other in zip(whole, cut, strict=True):
            assert one.keys() == other.keys()
            for name in ("loss", "eval_loss", "kl", "rewards/margins", "eval_rewards/margins"):
                if name in one:
                    assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("settings", [[], ["dpo.neftune_alpha=5"], ["dpo.loss=apo_zero_unpaired"]])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    labelling: Project, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    straight = learn(labelling, *settings, name="straight")
    with monkeypatch.context() as patch:
        interrupt_after(patch, step=3)
        assert run(labelling, *settings).status == 130
    shutil.rmtree("cache")
    result = run(labelling, *settings)
    assert (result.status, result.err) == (0, "")
    assert "Going on after step 3 of 5." in result.out and "15 to compute" in result.out
    folder = Path("runs/tiny/dpo")
    assert metrics(folder) == metrics(straight)
    assert same(weights(folder), weights(straight))


def test_the_reference_is_computed_once(labelling: Project) -> None:
    """Other settings of the loss, and another epoch, ask for the same log-probs."""
    learn(labelling)
    result = run(labelling, "name=other", "dpo.beta=0.5", "dpo.desirable_weight=2", "dpo.max_steps=8")
    assert result.status == 0 and "15 answers found in" in result.out and " 0 to compute" in result.out


def test_one_file_of_pairs_serves_dpo_and_kto(labelling: Project) -> None:
    pairs = [{"prompt": g[0], "chosen": g[1], "rejected": b[1]} for g, b in zip(GOOD, BAD, strict=True)]
    write("pairs.jsonl", pairs)
    files = ["data.dpo.train=[pairs.jsonl]", "data.dpo.validation=[]"]
    by_dpo = metrics(learn(labelling, *files, "dpo.loss=sigmoid", name="dpo"))
    by_kto = metrics(learn(labelling, *files, name="kto"))
    by_rows = metrics(learn(labelling, "data.dpo.validation=[]", name="rows"))
    assert by_dpo[0]["pairs"] == 4 and "kl" not in by_dpo[0]
    assert by_kto == by_rows


def test_labels_without_the_loss_and_the_loss_without_labels_are_errors(labelling: Project) -> None:
    result = run(labelling, "dpo.loss=sigmoid")
    assert result.status == 2 and "write dpo.loss: kto" in result.err
    write("answers.jsonl", [{"prompt": "一", "completion": "二"}])
    result = run(labelling)
    assert result.status == 2 and "neither 'label' nor 'kto_tag' says whether the answer is good" in result.err
    write("answers.jsonl", rows([("同一个问题", said, label) for _, said, label in (*GOOD, *BAD)]))
    result = run(labelling, "data.deduplicate.near=null")
    assert result.status == 2 and "all rows have the same prompt" in result.err


def test_answers_of_one_kind_or_far_from_balanced_are_told(labelling: Project) -> None:
    write("answers.jsonl", rows(GOOD))
    result = run(labelling)
    assert result.status == 0 and "all training answers are of one kind (6 good, 0 bad)" in result.out
    steps = [line for line in metrics(Path("runs/tiny/dpo")) if "loss" in line]
    assert all("rewards/rejected" not in step and "rewards/margins" not in step for step in steps)
    write("answers.jsonl", rows([*GOOD, *BAD[:2]]))
    result = run(labelling, "name=few")
    assert result.status == 0 and "Set dpo.undesirable_weight=3 " in result.out


@pytest.mark.parametrize(
    ("section", "good", "bad", "change"),
    [
        ({}, 100, 100, None),
        ({}, 133, 100, None),
        ({}, 134, 100, "dpo.undesirable_weight=1.34"),
        ({}, 99, 100, "dpo.desirable_weight=1.01"),
        ({"desirable_weight": 4.0}, 25, 100, None),
        ({"undesirable_weight": 0.5}, 100, 400, "dpo.desirable_weight=2"),
        ({"undesirable_weight": 0.0}, 100, 400, None),
    ],
)
def test_balance_counts_the_weights(section: dict[str, float], good: int, bad: int, change: str | None) -> None:
    notice = imbalance(Dpo(loss="kto", **section), good, bad)
    assert (None if notice is None else notice.values["change"]) == change


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["dpo.loss=sigmoid", "dpo.desirable_weight=2"], "dpo.desirable_weight"),
        (["dpo.ld_alpha=0.5"], "dpo.ld_alpha"),
        (["dpo.label_smoothing=0.1"], "dpo.label_smoothing"),
        (["dpo.reference=none"], "dpo.reference"),
        (["dpo.kto_chosen_weight=1.5"], "dpo.desirable_weight"),
        (["dpo.kto_rejected_weight=1.5"], "dpo.undesirable_weight"),
        (["data.kto.train=[a.jsonl]"], "data.dpo"),
    ],
)
def test_keys_that_mean_nothing_here_are_named(labelling: Project, settings: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe("recipe.yaml", settings)


def test_the_weights_leave_older_recipes_as_they_were() -> None:
    assert not {"desirable_weight", "undesirable_weight"} & Dpo().model_dump().keys()
    assert Dpo(loss="kto", desirable_weight=2.0).model_dump()["desirable_weight"] == 2.0


def test_prepare_plan_and_report_know_what_it_is(labelling: Project) -> None:
    result = labelling.run(plan.main)
    assert result.status == 0 and "reference log-probs of 15 answers" in result.out, result
    result = labelling.run(prepare.main, "--show", "2")
    assert result.status == 0 and "[good] " in result.out and "[bad] " in result.out, result
    learn(labelling)
    result = labelling.run(report.main)
    assert result.status == 0, result
    page = Path("runs/tiny/report.html").read_text(encoding="utf-8")
    assert "KTO KL term" in page and "KTO reward margin" in page


@pytest.mark.slow
def test_two_ranks_give_the_run_of_one(labelling: Project) -> None:
    alone = metrics(learn(labelling, name="alone"))
    ends = ranks.ends(2, ["dpo", "recipe.yaml", "name=two"], folder=Path.cwd())
    assert [status for status, _, _ in ends] == [0, 0], ends
    for one, other in zip(alone, metrics(Path("runs/two/dpo")), strict=True):
        for name in ("loss", "eval_loss", "kl", "rewards/margins", "eval_kl"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


def test_a_command_kto_names_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match=r"mlx-zh dpo RECIPE dpo\.loss=kto"):
        cli._stage(["kto", "recipe.yaml"])
