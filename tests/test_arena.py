"""`mlx-zh arena`: two stages answer the same prompts, and the record says who won and how sure that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_zh import arena
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.samples import Sampled, SampledAnswer, prompt_id
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE
from mlx_zh.stages import side
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system.locks import Lock

QUESTIONS = [(n, n + 1) for n in range(20)]
PROMPTS = Path("prompts.jsonl")


class Answers:
    """Stands in for the process of `mlx-zh sample`: a model that is right from sum number `wrong` on."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.wrong: dict[str, int] = {}
        self.status = 0

    def __call__(self, stage: str, arguments: list[str], lock: Lock) -> int:
        assert stage == "sample"
        given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        assert (given["--n"], given["--temperature"], given["--prompts"]) == ("1", "0", str(PROMPTS))
        self.asked.append((arguments[0], given["--stage"]))
        if self.status:
            return self.status
        folder = RunFolder(Path("runs") / arguments[0]).samples_called(given["--label"])
        folder.path.mkdir(parents=True, exist_ok=True)
        lines = [self._line(a, b, self.wrong[f"{arguments[0]} {given['--stage']}"]) for a, b in QUESTIONS]
        folder.answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    @staticmethod
    def _line(a: int, b: int, wrong: int) -> dict[str, object]:
        messages = (Message("user", f"{a}+{b}=?"),)
        said = SampledAnswer(str(a + b if a >= wrong else 99), "stop", 2, 1)
        return Sampled(prompt_id(messages), messages, str(a + b), (said,)).as_dict()


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Two runs, `one` with the stages sft and dpo, `two` with sft."""
    monkeypatch.chdir(tmp_path)
    found = Answers()
    monkeypatch.setattr(side, "run_stage", found)
    for name, stages in (("one", ["sft", "dpo"]), ("two", ["sft"]), ("bare", [])):
        run = RunFolder(Path("runs") / name)
        run.path.mkdir(parents=True)
        run.recipe.write_text(f"name: {name}\nmodel: {{path: no-model}}\n")
        for stage in stages:
            run.stage(stage).adapter.mkdir(parents=True)
            for file in (CONFIG_FILE, ADAPTER_FILE):
                (run.stage(stage).adapter / file).write_text("{}")
    PROMPTS.write_text(
        "".join(json.dumps({"prompt": f"{a}+{b}=?", "answer": str(a + b)}) + "\n" for a, b in QUESTIONS)
    )
    return found


def _record(label: str, run: str = "one") -> dict[str, Any]:
    return json.loads((Path("runs") / run / "arena" / label / "result.json").read_text())


def test_the_newest_stages_are_compared(answers, run_stage, capsys):
    answers.wrong = {"one dpo": 12, "two sft": 2}
    assert run_stage(arena.main, "one", "two", "--prompts", PROMPTS) == 0
    assert answers.asked == [("one", "dpo"), ("two", "sft")]
    record = _record("dpo-two-sft")
    # Wrong are 12 and 2 of 20: the second wins the ten sums that only it got right.
    assert (record["prompts"], record["won"], record["tied"], record["lost"]) == (20, 10, 10, 0)
    assert [(side["right"], side["checked"]) for side in record["sides"]] == [(8, 20), (18, 20)]
    # Wilson: 10 of 10 begins at 10 / (10 + 1.96²) = 0.72.
    assert record["interval"] == pytest.approx([0.7225, 1], abs=1e-4) and record["noise"] is False
    out = capsys.readouterr().out
    assert "two sft is better, by more than chance." in out and "100% (72% to 100%)" in out


def test_two_stages_of_a_run(answers, run_stage, capsys):
    answers.wrong = {"one sft": 3, "one dpo": 5}
    assert run_stage(arena.main, "one", "one", "--stage", "sft,dpo", "--prompts", PROMPTS) == 0
    record = _record("sft-one-dpo")
    assert (record["won"], record["tied"], record["lost"], record["noise"]) == (0, 18, 2, True)
    assert "within noise" in capsys.readouterr().out


def test_three_stages_are_refused(answers, capsys):
    with pytest.raises(SystemExit):
        arena.main(["one", "one", "--stage", "base,sft,dpo", "--prompts", str(PROMPTS)])
    assert "--stage takes one stage or two" in capsys.readouterr().err


def test_one_stage_is_that_of_both(answers, run_stage):
    answers.wrong = {"one base": 0, "two base": 0}
    assert run_stage(arena.main, "one", "two", "--stage", "base", "--prompts", PROMPTS) == 0
    assert answers.asked == [("one", "base"), ("two", "base")]
    assert _record("base-two-base")["tied"] == 20


def test_a_failed_answer_is_the_command_s_status(answers, run_stage):
    answers.status = 2
    assert run_stage(arena.main, "one", "two", "--prompts", PROMPTS) == 2
    assert answers.asked == [("one", "dpo")]
    assert not (Path("runs/one/arena")).exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["one", "none", "--prompts", str(PROMPTS)], "no recipe at none"),
        (["one", "two", "--prompts", str(PROMPTS), "--stage", "fuse"], "there is no stage 'fuse'"),
        (["one", "bare", "--prompts", str(PROMPTS), "--stage", "dpo"], "holds no adapter yet"),
        (["one", "two", "--prompts", str(PROMPTS), "--by", "judge"], "--by judge needs a judge"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(answers, told, arguments, part):
    assert part in told(lambda: arena.main(arguments))
    assert answers.asked == []
