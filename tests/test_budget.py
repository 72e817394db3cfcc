"""A time budget in the stages: measured and decided once, stored, applied by every command, and forecast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import Project, interrupt_after, losses, message, metrics, run_stages_here

from mlx_zh import dpo, prepare, run, sft
from mlx_zh import eval as evaluation
from mlx_zh.pipeline import process, runner
from mlx_zh.planning.pace import Pace
from mlx_zh.recipe import load_recipe
from mlx_zh.stages import budgeting, measuring
from mlx_zh.stages.run_folder import RunFolder

EXAM = Path(__file__).resolve().parent.parent / "data" / "quickstart" / "exam"
PACE = Pace(training=0.036, forward=0.009, update=0.18, generation=0.018)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine of a fixed pace; gives the seconds that each measuring was allowed to take."""
    asked: list[float] = []

    def measure(*_: Any, seconds: float) -> Pace:
        asked.append(seconds)
        return PACE

    monkeypatch.setattr(measuring, "measure_pace", measure)
    return asked


@pytest.fixture
def budgeted(project: Project, measured: list[float]) -> Project:
    """A recipe of 300 steps, of which ten minutes buy fewer."""
    project.recipe["sft"] = {"batch_size": 4, "epochs": 100, "learning_rate": 1e-2}
    project.recipe["budget"] = "10m"
    project.write_recipe()
    return project


def record(name: str = "tiny") -> dict[str, Any]:
    value: dict[str, Any] = json.loads(Path("runs", name, "budget.json").read_text(encoding="utf-8"))
    return value


def test_the_decision_is_written_down_and_trained(budgeted: Project, measured: list[float]) -> None:
    result = budgeted.sft()
    assert (result.status, result.err) == (0, "")
    steps = record()["steps"]["sft"]
    assert 20 <= steps < 300 and measured == [30.0]  # 5 % of ten minutes
    assert f"{steps} of 300 steps of 4 examples" in result.out
    assert sum(record()["seconds"].values()) < 0.95 * 600
    assert json.loads(Path("runs/tiny/sft/summary.json").read_text())["steps"] == steps
    stored = yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text(encoding="utf-8"))
    assert (stored["sft"]["max_steps"], stored["budget"]) == (steps, "10m")
    first_line = Path("runs/tiny/recipe.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith("# Decided by the budget of 10m on 20")
    assert first_line.endswith(f"from the measured speed: sft.max_steps {steps}.")
    assert json.loads(Path("runs/tiny/manifest.json").read_text(encoding="utf-8"))["budget"] == record()
    # The learning rate is planned over the decided steps: it rises over 5 % of them and is near 0 in the last.
    rates = [line["learning_rate"] for line in metrics(Path("runs/tiny/sft")) if "loss" in line]
    assert rates.index(max(rates)) + 1 == -(-steps // 20) and rates[-1] < 0.01 * max(rates)


def test_the_same_command_measures_once_and_finds_nothing_to_do(budgeted: Project, measured: list[float]) -> None:
    assert budgeted.sft().status == 0
    again = budgeted.sft()
    assert again.status == 0 and "nothing is left to train" in again.out and len(measured) == 1
    assert f"steps SFT {record()['steps']['sft']}/300." in again.out
    # The stored recipe is what the decision gave, so it needs no other.
    Path("recipe.yaml").write_bytes(Path("runs/tiny/recipe.yaml").read_bytes())
    stored = budgeted.sft()
    assert stored.status == 0 and "nothing is left to train" in stored.out and len(measured) == 1


def test_a_stopped_run_goes_on_to_the_decided_end(
    budgeted: Project, measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = budgeted.train(name="whole")
    with monkeypatch.context() as stopped:
        interrupt_after(stopped, 2)
        assert budgeted.sft("name=parts").status == 130
    assert len(losses(Path("runs/parts/sft"))) == 2
    parts = budgeted.train(name="parts")
    assert len(measured) == 2 and metrics(parts) == metrics(whole)


def test_a_run_killed_before_its_first_step_keeps_the_decision(budgeted: Project, measured: list[float]) -> None:
    recipe = load_recipe("recipe.yaml")
    decided = budgeting.settle(recipe)
    assert not Path("runs/tiny/sft").exists() and len(measured) == 1
    assert budgeting.settle(recipe) == decided == budgeting.decided(recipe)
    folder = budgeted.train()
    assert len(measured) == 1 and len(losses(folder)) == decided.sft.max_steps


def test_another_budget_is_decided_again_and_says_what_that_means(budgeted: Project, measured: list[float]) -> None:
    budgeted.train()
    before = record()["steps"]["sft"]
    result = budgeted.sft("--budget", "20m")
    after = record()["steps"]["sft"]
    assert len(measured) == 2 and after > before
    assert 'budget "10m" -> "20m"' in result.out and "starts over" in result.out
    assert result.status == 2 and f"sft.max_steps {before} -> {after}" in result.err and "--fresh" in result.err
    assert budgeted.sft("--budget=20m", "--fresh").status == 0 and len(measured) == 2
    assert Path("runs/tiny/sft-old1").is_dir()


def test_other_keys_leave_the_decision_alone(budgeted: Project, measured: list[float]) -> None:
    recipe = load_recipe("recipe.yaml")
    steps = budgeting.settle(recipe).sft.max_steps
    for override in ("memory.micro_tokens=64", "evaluate.max_new_tokens=9", "sft.learning_rate=1e-3"):
        assert budgeting.settle(load_recipe("recipe.yaml", [override])).sft.max_steps == steps
    assert len(measured) == 1
    budgeting.settle(load_recipe("recipe.yaml", ["sft.batch_size=2"]))
    assert len(measured) == 2


def test_a_forgotten_budget_is_mentioned(budgeted: Project) -> None:
    budgeted.train()
    del budgeted.recipe["budget"]
    budgeted.write_recipe()
    result = budgeted.sft()
    assert result.status == 2 and "add budget=10m or write" in result.out


def test_a_budget_that_is_too_small_names_one_that_is_not(budgeted: Project) -> None:
    refused = budgeted.sft("--budget", "30s")
    assert refused.status == 2 and "is too little time" in refused.err
    least = refused.err.rsplit(" is ", 1)[1].strip().rstrip(".")
    assert not Path("runs/tiny/budget.json").exists()
    assert budgeted.sft("--budget", least).status == 0
    # The fewest useful steps, and what the rounding to a minute adds.
    assert 20 <= record()["steps"]["sft"] <= 20 + 60 / record()["steps_seconds"]["sft"]


@pytest.mark.parametrize("text", ["soon", "8", "0h", "1:30", "30m1h"])
def test_what_is_no_time(project: Project, text: str) -> None:
    refused = project.sft("--budget", text)
    assert refused.status == 2 and "budget must be a length of time, such as 90m, 8h" in refused.err


def test_no_more_is_prepared_than_is_trained(budgeted: Project) -> None:
    budgeted.write_data("train.jsonl", tuple((f"第{n}个字？", "好的" * (1 + n % 3)) for n in range(400)))
    budgeted.recipe["sft"]["epochs"] = 1
    budgeted.write_recipe()
    assert budgeted.run(prepare.main, "data.deduplicate.near=null").status == 0
    assert budgeted.sft("data.deduplicate.near=null").status == 0
    steps = record()["steps"]["sft"]
    report = json.loads(Path("runs/tiny/data/report.json").read_text(encoding="utf-8"))["sft"]["train"]
    assert 4 * steps <= report["examples"] == record()["max_samples"]["sft"][0] <= 4 * steps * 1.1 + 1 < 400


def test_steps_beyond_the_epochs_are_not_taken(budgeted: Project, measured: list[float]) -> None:
    """Of 400 rows counted for the budget, duplicates leave 12: an epoch is 3 steps, whatever the budget allows."""
    rows = tuple((f"第{n % 12}个字？", "好的") for n in range(400))
    budgeted.write_data("train.jsonl", rows)
    budgeted.recipe["sft"]["epochs"] = 1
    budgeted.write_recipe()
    folder = budgeted.train("data.deduplicate.near=null")
    assert record()["steps"]["sft"] > 3 and len(losses(folder)) == 3
    assert "nothing is left to train" in budgeted.sft("data.deduplicate.near=null").out


def test_exams_are_thinned_unless_the_recipe_says_how_many(budgeted: Project) -> None:
    budgeted.recipe["evaluate"] = {"benchmarks": [str(EXAM)], "bootstrap": 50, "shots": 0}
    budgeted.write_recipe()
    assert budgeted.run(evaluation.main, "--stage", "base").status == 0
    limit = record()["limit"]
    answers = [json.loads(line) for line in Path("runs/tiny/eval/base-exam.jsonl").read_text().splitlines()]
    subjects = {answer["subject"] for answer in answers}
    assert limit and len(answers) == limit * len(subjects)
    own = load_recipe("recipe.yaml", ["evaluate.limit=2", "name=own"])
    assert budgeting.settle(own).evaluate.limit == 2 and record("own")["limit"] is None


@pytest.fixture
def whole(budgeted: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A recipe with every stage, which runs in this process; gives the stages that ran since the last look."""
    pairs = [
        {
            "prompt": [message("user", f"第{n}个字？")],
            "chosen": [message("assistant", "好的")],
            "rejected": [message("assistant", "不知道")],
        }
        for n in range(8)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    budgeted.recipe["data"]["dpo"] = {"train": ["pairs.jsonl"]}
    budgeted.recipe["dpo"] = {"batch_size": 4, "epochs": 100, "learning_rate": 1e-3}
    budgeted.recipe["budget"] = "30m"
    budgeted.write_recipe()
    return run_stages_here(monkeypatch, [runner, process])


@pytest.mark.thorough
def test_a_whole_run_decides_first_and_a_second_has_nothing_to_do(
    whole: Callable[[], list[str]], measured: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["recipe.yaml", "--dry-run"]) == 0
    assert "is decided when the run starts" in capsys.readouterr().out and whole() == [] and measured == []
    assert run.main(["recipe.yaml"]) == 0
    assert whole() == ["stages.deciding", "prepare", "sft", "dpo", "report"]
    steps = record()["steps"]
    for stage in ("sft", "dpo"):
        assert json.loads(Path(f"runs/tiny/{stage}/summary.json").read_text())["steps"] == steps[stage]
    # Full lengths are shared in proportion, and neither stage gets less than is useful.
    assert steps["sft"] >= 20 and steps["dpo"] >= 10
    capsys.readouterr()
    assert run.main(["recipe.yaml"]) == 0
    assert "Nothing to do" in capsys.readouterr().out and whole() == [] and len(measured) == 1
    # Another budget puts training and what follows out of date, as any key does.
    assert run.main(["recipe.yaml", "--budget=40m"]) == 0
    shown = capsys.readouterr().out
    assert whole()[0] == "stages.deciding" and 'budget "30m" -> "40m"' in shown
    assert f"sft.max_steps {steps['sft']} -> {record()['steps']['sft']}" in shown
    assert Path("runs/tiny/sft-old1").is_dir() and len(measured) == 2


def test_stages_by_hand_share_one_decision(whole: Callable[[], list[str]], measured: list[float]) -> None:
    for main in (prepare.main, sft.main, dpo.main):
        assert (main(["recipe.yaml"]) or 0) == 0
    assert len(measured) == 1
    assert run.main(["recipe.yaml"]) == 0 and whole()[0] == "prepare" and len(measured) == 1


class _Ranks:
    """Rank 0 of two, of which the other is four times as slow."""

    size, first, rank = 2, True, 0

    def collect(self, value: dict[str, float]) -> list[dict[str, float]]:
        return [value, {name: 4 * each for name, each in value.items()}]

    def each(self, work: Callable[[], Any]) -> Any:
        return work()

    def broadcast_result(self, make: Callable[[], Any]) -> Any:
        return json.loads(json.dumps(make()))  # as it is sent


def test_the_slowest_rank_counts_and_each_takes_its_share(budgeted: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_zh.stages import run_models

    opened = run_models.open_model
    monkeypatch.setattr(run_models, "open_model", lambda recipe, _: opened(recipe))
    budgeted.recipe["budget"] = "30m"
    budgeted.write_recipe()
    ranks: Any = _Ranks()
    recipe = load_recipe("recipe.yaml")
    decided = budgeting.settle(recipe, ranks)
    assert record()["pace"]["training"] == 4 * PACE.training / 2
    assert decided == budgeting.settle(recipe, ranks) == budgeting.decided(recipe)


def test_a_real_measurement_is_positive_and_leaves_the_run_alone(project: Project) -> None:
    budget = "3m"
    project.recipe["sft"] = {"batch_size": 4, "epochs": 1, "learning_rate": 1e-2}
    project.write_recipe()
    result = project.sft("--budget", budget)
    assert (result.status, result.err) == (0, ""), result
    assert all(seconds > 0 for seconds in record()["pace"].values())
    assert record()["steps"] == {} and "all 3 steps" in result.out
    # As without a budget: measuring has changed neither weights nor data.
    plain = project.train(name="plain")
    assert losses(plain) == losses(Path("runs/tiny/sft"))


def test_a_damaged_decision_is_made_again(budgeted: Project, measured: list[float]) -> None:
    run_folder = RunFolder.of(load_recipe("recipe.yaml"))
    run_folder.path.mkdir(parents=True)
    for text in ("", "{}", "[]", '{"pace": {}}'):
        run_folder.budget.write_text(text)
        assert budgeting.read_record(run_folder) is None
    budgeting.settle(load_recipe("recipe.yaml"))
    assert len(measured) == 1
