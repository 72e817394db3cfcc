"""Two stages answer the same prompts, and the answers are compared: the table, and the record in the run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_zh.corpus.samples import Sampled
from mlx_zh.errors import DataError
from mlx_zh.exams.statistics import wilson
from mlx_zh.judging import rules
from mlx_zh.judging.contest import Contest, matched
from mlx_zh.judging.judges import Bias
from mlx_zh.stages.answer_verdicts import Verdicts, bias_rows
from mlx_zh.stages.run_folder import ArenaFolder
from mlx_zh.stages.side import Asked, Side
from mlx_zh.system import console
from mlx_zh.system.locks import Lock
from mlx_zh.system.storage import write_json


@dataclass
class Arena:
    """Two sides and the prompts that both answer. What is decided is kept in the first side's run folder."""

    sides: tuple[Side, Side]
    asked: Asked
    decided: Verdicts = field(init=False)

    @property
    def folder(self) -> ArenaFolder:
        """Where the verdicts and the result are."""
        first, second = self.sides
        return first.run.arena_of(f"{first.stage}-{second.recipe.name}-{second.stage}")

    def answer(self, lock: Lock) -> int:
        """Let both sides answer; returns the exit status of a side that failed, else 0.

        Raises DataError where there are no prompts that both answered.
        """
        for side in self.sides:
            if status := side.draw(self.asked, lock):
                return status
        pairs = matched(*(side.drawn(self.asked) for side in self.sides))
        if not pairs:
            raise DataError(f"{self.asked.prompts} has no prompt that both models answered.")
        self.decided = Verdicts(self.folder.chosen, pairs)
        return 0

    def finish(self) -> Contest:
        """Record and say who won."""
        samples, about = self.decided.samples, dict(self.decided.about)
        contest = Contest.of(samples, self.decided.verdicts)
        right = [right_answers(samples, index) for index in (0, 1)]
        sides: list[dict[str, Any]] = [
            {"run": side.recipe.name, "stage": side.stage, "adapter": side.digest} for side in self.sides
        ]
        for side, (count, checked) in zip(sides, right, strict=True):
            side |= {"right": count, "checked": checked}
        for name in ("answers", "checked", "right"):  # of both together
            about.pop(name, None)
        record = {"version": 1, "prompts": len(samples), "sides": sides, **about, **contest.as_dict()}
        write_json(self.folder.result, record)
        console.say(console.table(self._rows(contest, right)))
        console.say(self._conclusion(contest))
        console.say(f"{self.folder.result} has the record.")
        return contest

    def _rows(self, contest: Contest, right: list[tuple[int, int]]) -> list[tuple[str, str]]:
        first, second = (side.name for side in self.sides)
        if first == second:
            first, second = f"1 {first}", f"2 {second}"
        rows = [("prompts", str(len(self.decided.samples))), (f"{first} better", str(contest.lost))]
        rows += [(f"{second} better", str(contest.won)), ("ties", str(contest.tied))]
        if contest.win_rate is not None:
            low, high = contest.interval
            rows.append((f"win rate of {second}", f"{contest.win_rate:.0%} ({low:.0%} to {high:.0%})"))
        for name, (count, checked) in zip((first, second), right, strict=True):
            if checked:
                rows.append((f"right answers of {name}", rate(count, checked)))
        if "bias" in self.decided.about:
            rows += bias_rows(Bias(**self.decided.about["bias"]))
        return rows

    def _conclusion(self, contest: Contest) -> str:
        first, second = (side.name for side in self.sides)
        if contest.noise:
            return "The difference is within noise: either may be the better one."
        return f"{second if contest.won > contest.lost else first} is better, by more than chance."


def right_answers(samples: list[Sampled], index: int) -> tuple[int, int]:
    """How many of the answers with a number are right, and how many have a known solution to be compared with."""
    judged = [rules.right(sampled, sampled.answers[index].text) for sampled in samples]
    return judged.count(True), len(judged) - judged.count(None)


def rate(count: int, total: int) -> str:
    """A share with its 95 % interval, for the terminal."""
    low, high = wilson(count, total)
    return f"{count} / {total} = {count / total:.0%} ({low:.0%} to {high:.0%})"
