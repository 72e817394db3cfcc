"""`mlx-zh choose`: from sampled answers to a data file that a recipe names, by rule, by a judge and by hand."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_zh import choose
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.samples import Sampled, SampledAnswer, prompt_id
from mlx_zh.errors import JudgeError, RefusedByJudge
from mlx_zh.language.translation import label
from mlx_zh.recipe import Recipe
from mlx_zh.stages.choosing import Choosing
from mlx_zh.stages.hand_votes import Voter, shown_pair
from mlx_zh.stages.run_folder import RunFolder, SamplesFolder

SUMS = [(one, one + 1) for one in range(1, 7)]


def _sampled(prompt: str, texts: tuple[str, ...], reference: str | None) -> Sampled:
    messages = (Message("user", prompt),)
    answers = tuple(SampledAnswer(text, "stop", 1, index) for index, text in enumerate(texts))
    return Sampled(prompt_id(messages), messages, reference, answers)


def _write(folder: SamplesFolder, samples: list[Sampled], more: str = "") -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(one.as_dict(), ensure_ascii=False) + "\n" for one in samples)
    folder.answers.write_text(lines + more, encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run with six sums, each answered wrongly and rightly."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("name: tiny\nmodel: {path: no-model}\n", encoding="utf-8")
    run = RunFolder(Path("runs/tiny"))
    samples = [_sampled(f"{a}+{b}=?", (f"等于 {a}", f"等于 {a + b}"), str(a + b)) for a, b in SUMS]
    _write(run.samples_called("sft"), samples, more='{"kind": "samples", "versi')
    return run


def _choice(run: RunFolder) -> dict[str, Any]:
    return json.loads(run.samples_called("sft").choice.read_text(encoding="utf-8"))


def test_the_printed_lines_are_a_recipe_of_the_data(run, run_stage, capsys):
    assert run_stage(choose.main, "recipe.yaml", "--by", "rule", "--to", "pairs") == 0
    out = capsys.readouterr().out
    path = run.samples_called("sft").path / "pairs.jsonl"
    lines = yaml.safe_load(out[out.index("data:\n") :])
    recipe = Recipe.model_validate({"name": "next", "model": {"path": "m"}, **lines})
    assert Path(recipe.data.dpo.train[0].path).samefile(path)
    pairs, _ = load_preferences(path)
    assert sorted((pair.prompt[0].content, pair.chosen, pair.rejected) for pair in pairs) == [
        (f"{a}+{b}=?", f"等于 {a + b}", f"等于 {a}") for a, b in SUMS
    ]
    record = _choice(run)
    assert (record["prompts"], record["used"], record["rows"], record["right"], record["answers"]) == (6, 6, 6, 6, 12)


def test_the_same_choice_gives_the_same_file(run, run_stage):
    path = run.samples_called("sft").path / "pairs.jsonl"
    contents = []
    for _ in range(2):
        assert run_stage(choose.main, "recipe.yaml") == 0
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert len(run.samples_called("sft").chosen.read_text().split()) > 0


def test_no_pair_is_no_file(run, run_stage, capsys):
    _write(run.samples_called("sft"), [_sampled("你好？", ("你好", "您好"), None)])
    assert run_stage(choose.main, "recipe.yaml") == 1
    out = capsys.readouterr().out
    assert "all answers good" in out and "No prompt has a known solution" in out
    assert not (run.samples_called("sft").path / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--longest", "5", "--by", "judge", "--judge", "m"], "--longest is for --by rule"),
        (["--judge-url", "http://127.0.0.1:9/v1"], "--judge-url is for --by judge"),
        (["--votes", "feedback.jsonl", "--by", "hand"], "--votes is for --by judge"),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(run, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        choose.main(["recipe.yaml", *arguments])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_samples_that_are_not_there_are_named(run, told):
    said = told(lambda: choose.main(["recipe.yaml", "--samples", "dpo"]))
    assert "The samples of this run are: sft." in said


def test_the_newest_samples_are_taken(run, run_stage):
    import os

    _write(run.samples_called("later"), [_sampled("1+1=?", ("2", "3"), "2")])
    os.utime(run.samples_called("sft").answers, (1, 1))
    assert run_stage(choose.main, "recipe.yaml") == 0
    assert (run.samples_called("later").path / "pairs.jsonl").exists()


class Judge:
    """Prefers the answer with the larger number at its end; fails after so many questions."""

    name = "judge (here)"

    def __init__(self, fails_after: int = 10**9, error: type[JudgeError] = JudgeError) -> None:
        self.asked, self._fails_after, self._error = 0, fails_after, error

    def ask(self, messages: Any) -> str:
        if self.asked >= self._fails_after:
            raise self._error("the judge at here does not answer.")
        self.asked += 1
        text = messages[-1]["content"]
        first, second = (int(part.split("\n")[0]) for part in text.split("等于 ")[1:3])
        return "判定：1" if first > second else "判定：2"


def test_a_judge_s_verdicts_survive_its_failure(run):
    """Six prompts with two questions each. The judge fails at the sixth question: two prompts are decided."""
    folder = Choosing.of(run, "sft", "recipe.yaml")
    with pytest.raises(JudgeError):
        folder.decided.by_judge(Judge(fails_after=5), parallel=1)
    again, judge = Choosing.of(run, "sft", "recipe.yaml"), Judge()
    again.decided.by_judge(judge, parallel=1)
    assert judge.asked == 12 - 2 * 2
    assert again.finish("pairs", None) == 0
    assert _choice(run)["rows"] == 6
    assert _choice(run)["bias"] == {
        "asked": 12, "decided": 12, "first": 6, "comparisons": 6, "contradicted": 0, "unread": 0,
    }  # fmt: skip


def test_questions_at_the_same_time_give_the_same_verdicts(run):
    contents = []
    for parallel in (1, 4):
        run.samples_called("sft").chosen.unlink(missing_ok=True)
        choosing_now = Choosing.of(run, "sft", "recipe.yaml")
        choosing_now.decided.by_judge(Judge(), parallel)
        choosing_now.finish("pairs", None)
        contents.append((run.samples_called("sft").path / "pairs.jsonl").read_bytes())
    assert contents[0] == contents[1]


def test_a_refused_prompt_is_left_out_and_counted(run):
    class Refusing(Judge):
        def ask(self, messages: Any) -> str:
            if "3+4=?" in messages[-1]["content"]:
                raise RefusedByJudge("the judge at here refuses a question.")
            return super().ask(messages)

    now = Choosing.of(run, "sft", "recipe.yaml")
    now.decided.by_judge(Refusing(), parallel=1)
    assert now.finish("pairs", None) == 0
    assert (_choice(run)["rows"], _choice(run)["left_out"]) == (5, {"refused by the judge": 1})


def test_a_judge_who_refuses_everything_is_asked_three_times(run):
    judge = Judge(fails_after=0, error=RefusedByJudge)
    now = Choosing.of(run, "sft", "recipe.yaml")
    with pytest.raises(JudgeError, match="first 3 questions were refused"):
        now.decided.by_judge(judge, parallel=1)


def test_the_judge_is_compared_with_votes_in_the_chat(run, tmp_path: Path, capsys):
    rows = [
        {"kind": "feedback", "version": 1, "prompt": [{"role": "user", "content": f"第 {n} 个？"}],
         "answers": ["等于 1", "等于 2"], "choice": choice}
        for n, choice in enumerate([1, 1, 0, "both"])
    ]  # fmt: skip
    votes = tmp_path / "feedback.jsonl"
    votes.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*rows, rows[0]]) + '{"kind"')
    now = Choosing.of(run, "sft", "recipe.yaml")
    now.decided.by_judge(Judge(), 1, votes)
    now.finish("pairs", None)
    assert _choice(run)["agreement"] == {"votes": 3, "agreed": 2, "ties": 0}
    assert _choice(run)["prompts"] == 6  # the votes are no samples
    assert "2 / 3" in capsys.readouterr().out


class Hand:
    """A person at the terminal: sees what is printed, and types the lines."""

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)

    def __call__(self, _: str) -> str:
        if not self._lines:
            raise EOFError
        return self._lines.pop(0)


def _shown_first(out: str) -> list[str]:
    return [line.split("等于 ")[1] for line in out.splitlines() if line.startswith("  1  ")]


def test_votes_by_hand_are_about_the_answer_that_was_shown(run, capsys):
    """The order is hidden: the person takes what stands first, each time."""
    now = Choosing.of(run, "sft", "recipe.yaml")
    now.decided.by_hand(Voter(Hand(*["1"] * 6)))
    out = capsys.readouterr().out
    now.finish("pairs", None)
    rows = [json.loads(line) for line in (run.samples_called("sft").path / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen"]["content"].split(" ")[1] for row in rows] == _shown_first(out)
    answers = {one.id: one.answers for one in now.decided.samples}
    firsts = [
        answers[one.id][0].text == f"等于 {said}"
        for one, said in zip(now.decided.samples, _shown_first(out), strict=True)
    ]
    assert set(firsts) == {True, False}  # neither answer always stands first


def test_a_person_may_stop_and_go_on(run):
    now = Choosing.of(run, "sft", "recipe.yaml")
    now.decided.by_hand(Voter(Hand("什么", "１", "b", "都不好", "跳过", "q")))
    assert [verdict.vote[2] for verdict in now.decided.verdicts.values()][1:] == ["both", "neither", "skip"]
    again = Choosing.of(run, "sft", "recipe.yaml")
    again.decided.by_hand(Voter(Hand("2")))
    assert len(again.decided.verdicts) == 5
    again.finish("pairs", None)
    assert _choice(run)["undecided"] == 1


def test_by_hand_needs_a_terminal(run, told, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert "--by rule" in told(lambda: choose.main(["recipe.yaml", "--by", "hand"]))


def test_controls_in_answers_do_not_reach_the_terminal(run, capsys):
    one = _sampled("\x1b[2J?", ("\x1b]0;x\x07a", "b\u202e"), None)
    Voter(Hand("s")).ask(one, "1/1")
    assert "\x1b" not in (out := capsys.readouterr().out) and "\x07" not in out and "\u202e" not in out
    assert shown_pair(_sampled("?", ("a", "a "), None)) is None


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "--by judge needs a judge"),
        (["--judge", "m", "--judge-url", "https://judge.example"], "two judges"),
        (["--judge-url", "https://judge.example"], "--judge-model"),
        (["--judge-url", "judge", "--judge-model", "m"], "no address"),
    ],
)
def test_a_judge_must_be_named_whole(run, told, options, part):
    assert part in told(lambda: choose.main(["recipe.yaml", "--by", "judge", *options]))


def test_a_local_judge_reads_the_question_and_answers(project, capsys):
    """A tiny random model says nothing sensible: no verdict can be read, and the answers are nearly equal."""
    folder = RunFolder(Path("runs/tiny")).samples_called("sft")
    _write(folder, [_sampled("3+4=?", ("7", "8"), None)])
    options = ["--by", "judge", "--judge", str(project.model), "--judge-tokens", "4"]
    result = project.run(choose.main, *options)
    assert result.status == 1 and "answers nearly equal" in result.out
    assert json.loads(folder.choice.read_text())["bias"]["unread"] == 2


@pytest.mark.parametrize("name", ["prompts", "used", "skipped", "ties", "not decided yet", "all answers bad"])
def test_counts_are_labelled_in_chinese(name: str) -> None:
    shown = label(name, "zh")
    assert shown != name and not any(letter.isascii() for letter in shown)
