"""Rounds: the model answers, pairs are chosen, DPO learns them, and the next round starts from there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.samples import Sampled, SampledAnswer, prompt_id
from mlx_zh.errors import RecipeError
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE
from mlx_zh.pipeline.steps import steps
from mlx_zh.recipe import Recipe, load_recipe
from mlx_zh.reporting.findings import Findings, gather
from mlx_zh.reporting.markdown import markdown
from mlx_zh.reporting.page import page
from mlx_zh.stages import rounds, side
from mlx_zh.stages.rounds import is_kept_out
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system.locks import Lock

SUMS = [(a, b) for a in range(20) for b in range(10)]
PROMPTS = Path("prompts.jsonl")


class Model:
    """Stands in for the processes of `sample` and `dpo`. A round more makes `gain` more of its ten answers right."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.gain, self.right = [3, 3, 0], 2
        self.stop_at: str | None = None

    def __call__(self, stage: str, arguments: list[str], lock: Lock) -> int:
        recipe = arguments[0]
        name = Path(recipe).name if stage == "sample" else Path(recipe).parent.name
        self.ran.append(f"{stage} {name}")
        if f"{stage} {name}" == self.stop_at:
            return 130
        return self._sample(arguments) if stage == "sample" else self._dpo(Path(recipe), arguments)

    def _sample(self, arguments: list[str]) -> int:
        arguments = [word for word in arguments if "=" not in word]
        options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        recipe = Path(arguments[0])
        run = RunFolder(recipe if recipe.is_dir() else Path("runs/tiny"))
        right = self.right + sum(self.gain[: int(run.path.name) if run.path.name.isdecimal() else 0])
        lines = []
        for row in map(json.loads, Path(options["--prompts"]).read_text().splitlines()):
            messages = (Message("user", row["messages"][0]["content"]),)
            texts = [
                row["answer"] if (n + int(row["answer"])) % 10 < right else "99" for n in range(int(options["--n"]))
            ]
            answers = tuple(SampledAnswer(text, "stop", 2, n) for n, text in enumerate(texts))
            lines.append(json.dumps(Sampled(prompt_id(messages), messages, row["answer"], answers).as_dict()))
        folder = run.samples_called(options["--label"])
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.answers.write_text("\n".join(lines) + "\n")
        return 0

    def _dpo(self, given: Path, arguments: list[str]) -> int:
        assert arguments[1:] == ["--renew"]
        recipe = load_recipe(given)
        run = RunFolder.of(recipe)
        assert run.path == given.parent
        run.recipe.write_text(recipe.to_yaml())
        _adapter(run, "dpo")
        return 0


def _adapter(run: RunFolder, stage: str) -> None:
    run.stage(stage).adapter.mkdir(parents=True, exist_ok=True)
    for file in (CONFIG_FILE, ADAPTER_FILE):
        (run.stage(stage).adapter / file).write_text("{}")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.chdir(tmp_path)
    found = Model()
    for module in (rounds, side):
        monkeypatch.setattr(module, "run_stage", found)
    rows = [{"messages": [{"role": "user", "content": f"{a}+{b}=?"}], "answer": str(a + b)} for a, b in SUMS]
    PROMPTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_recipe()
    _adapter(RunFolder(Path("runs/tiny")), "sft")
    return found


def write_recipe(**changes: Any) -> None:
    settings = {"count": 3, "prompts": str(PROMPTS), "check": 0.4, **changes}
    data = {"sft": {"train": ["sft.jsonl"]}, "system": "算一算"}
    recipe = {"name": "tiny", "model": {"path": "m"}, "data": data, "dpo": {"beta": 0.3}, "rounds": settings}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


def _record(number: int) -> dict[str, Any]:
    return json.loads(Path(f"runs/tiny/rounds/{number}/round.json").read_text())


def _kept_out() -> set[str]:
    return {f"{a}+{b}=?" for a, b in SUMS if is_kept_out(prompt_id((Message("user", f"{a}+{b}=?"),)), 0.4)}


def test_each_round_starts_from_the_one_before_and_the_last_is_within_noise(model, run_stage, capsys):
    assert run_stage(rounds.main, "recipe.yaml") == 0
    assert model.ran == [
        *("sample recipe.yaml", "dpo 1", "sample 1"),
        *("sample 1", "dpo 2", "sample 2"),
        *("sample 2", "dpo 3", "sample 3"),
    ]
    starts = [load_recipe(f"runs/tiny/rounds/{number}/round.yaml").dpo.start for number in (1, 2, 3)]
    assert starts == ["runs/tiny/sft/adapters", "runs/tiny/rounds/1/dpo/adapters", "runs/tiny/rounds/2/dpo/adapters"]
    assert [_record(number)["ends"] for number in (1, 2, 3)] == [None, None, "noise"]
    assert _record(3)["win_rate"] is None  # the third model answers as the second does
    out = capsys.readouterr().out
    assert "The rounds end after round 3" in out and "mlx-zh chat runs/tiny/rounds/2" in out


def test_a_round_s_recipe_is_that_of_the_run_with_its_own_pairs(model, run_stage):
    run_stage(rounds.main, "recipe.yaml")
    recipe = load_recipe("runs/tiny/rounds/2/round.yaml")
    assert (recipe.run_folder(), recipe.rounds, recipe.data.system) == (Path("runs/tiny/rounds/2"), None, "算一算")
    assert (recipe.dpo.beta, recipe.dpo.reference, recipe.data.sft.train) == (0.3, "start", ())
    assert [source.path for source in recipe.data.dpo.train] == ["runs/tiny/rounds/2/pairs.jsonl"]
    # Sums look alike, and each is another one.
    assert (recipe.data.deduplicate.exact, recipe.data.deduplicate.near) == (False, None)


def test_no_round_learns_what_it_is_checked_on(model, run_stage):
    run_stage(rounds.main, "recipe.yaml")
    kept_out = _kept_out()
    assert 0.3 * len(SUMS) < len(kept_out) < 0.5 * len(SUMS)
    for number in (1, 2, 3):
        pairs, _ = load_preferences(Path(f"runs/tiny/rounds/{number}/pairs.jsonl"))
        assert pairs and not {pair.prompt[0].content for pair in pairs} & kept_out
        rows = Path(f"runs/tiny/rounds/{number}/check-prompts.jsonl").read_text().splitlines()
        assert {json.loads(row)["messages"][0]["content"] for row in rows} == kept_out
        assert _record(number)["check"] == len(kept_out)


def test_a_round_that_is_worse_ends_them(model, run_stage, capsys):
    model.right, model.gain = 8, [-6, 0, 0]
    assert run_stage(rounds.main, "recipe.yaml") == 0
    assert _record(1)["ends"] == "worse" and not Path("runs/tiny/rounds/2").exists()
    assert "The best model of the rounds is tiny sft: `mlx-zh chat recipe.yaml`." in capsys.readouterr().out


def test_right_answers_of_both_are_recorded(model, run_stage):
    run_stage(rounds.main, "recipe.yaml")
    asked = [sum(map(int, prompt[:-2].split("+"))) for prompt in _kept_out()]
    # The first answer, number 0, is right where the last digit of the sum is below `right`: 2, then 2 + 3.
    expected = [[sum(total % 10 < right for total in asked), len(asked)] for right in (2, 5)]
    assert _record(1)["right"] == expected


def test_without_pairs_nothing_is_tuned(model, run_stage, capsys):
    model.right = 0
    assert run_stage(rounds.main, "recipe.yaml") == 0
    assert model.ran == ["sample recipe.yaml"]
    assert (_record(1)["ends"], _record(1)["left_out"]) == (
        "no-pairs",
        {"the answers are the same": len(SUMS) - len(_kept_out())},
    )
    assert "end before the training of round 1" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sample recipe.yaml", "dpo 1", "sample 1", "dpo 2"])
def test_stopped_anywhere_it_goes_on_to_the_same_end(model, run_stage, stage):
    run_stage(rounds.main, "recipe.yaml")
    expected = [_record(number) for number in (1, 2, 3)]
    shutil.rmtree("runs/tiny/rounds")
    model.stop_at = stage
    assert run_stage(rounds.main, "recipe.yaml") == 130
    model.stop_at = None
    assert run_stage(rounds.main, "recipe.yaml") == 0
    assert [_record(number) for number in (1, 2, 3)] == expected


def test_fewer_rounds_leave_no_record_of_more(model, run_stage):
    run_stage(rounds.main, "recipe.yaml")
    assert run_stage(rounds.main, "recipe.yaml", "rounds.count=1") == 0
    assert not Path("runs/tiny/rounds/3/round.json").exists()
    assert not Path("runs/tiny/rounds/2/round.json").exists()


def _recipe(value: Any) -> Recipe:
    Path("recipe.yaml").write_text(yaml.safe_dump({"name": "tiny", "model": {"path": "m"}, "rounds": value}))
    return load_recipe("recipe.yaml")


def test_a_number_alone_is_how_many_rounds(model):
    assert _recipe(2).rounds == _recipe({"count": 2}).rounds
    assert _recipe(0).rounds is None
    assert "rounds" not in _recipe(0).model_dump()  # digests of recipes without rounds stay what they are


@pytest.mark.parametrize(
    "value",
    [
        True,
        -1,
        "two",
        {"by": "judge"},
        {"judge": "m"},
        {"by": "judge", "judge_url": "https://h"},
        {"samples": 1},
        {"check": 0},
    ],
)
def test_rounds_that_cannot_be_are_refused(model, value):
    with pytest.raises(RecipeError, match="rounds"):
        _recipe(value)


def test_the_step_stands_between_dpo_and_the_report(model):
    recipe = load_recipe("recipe.yaml")
    names = [step.name for step in steps(recipe, RunFolder.of(recipe))]
    assert names == ["prepare", "sft", "rounds", "report"]
    step = steps(recipe, RunFolder.of(recipe))[2]
    assert (step.stage, step.after) == ("stages.rounds", ("sft",)) and str(PROMPTS) in step.files


def _gathered() -> Findings:
    return gather(RunFolder(Path("runs/tiny")), "", name="tiny", bootstrap=200, seed=0)


def test_the_report_shows_each_round(model, run_stage):
    run_stage(rounds.main, "recipe.yaml")
    text = markdown(_gathered(), "now", [])
    table = [line for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |", "| 3 |"))]
    (count, total), (after, _) = _record(1)["right"]
    assert (
        f"{count}/{total} = {count / total:.1%}" in table[0] and f"{after}/{total} = {after / total:.1%}" in table[0]
    )
    assert "The rounds end after round 3" in table[2] and len(table) == 3
    assert "多轮自我改进" in page(_gathered(), "now")


@pytest.mark.parametrize("key", ["right", "interval", "win_rate", "ends", "round"])
def test_a_strange_record_of_a_round_does_not_break_the_report(model, run_stage, key):
    write_recipe(count=1)
    run_stage(rounds.main, "recipe.yaml")
    whole = _record(1)
    for value in (None, "<b>", [[1]], [["a", "b"], [3, 2]], -1, {"a": 1}):
        Path("runs/tiny/rounds/1/round.json").write_text(json.dumps({**whole, key: value}))
        found = _gathered()
        assert "<b>" not in markdown(found, "now", []), value
        assert page(found, "now"), value


def test_a_damaged_record_is_an_alarm(model, run_stage):
    run_stage(rounds.main, "recipe.yaml")
    Path("runs/tiny/rounds/2/round.json").write_text("{")
    assert [alarm.where.en for alarm in _gathered().alarms if "round" in alarm.where.en] == ["rounds/2/round.json"]
    assert len(_gathered().rounds) == 2
