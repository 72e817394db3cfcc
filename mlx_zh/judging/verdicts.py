"""What was decided about the answers to a prompt, and the file that keeps it: one line of JSON for each prompt.

{"kind": "verdict", "version": 1, "id": the prompt's, "by": "rule" | "judge" | "hand", "key": a digest of the rules
 or the judge, "answers": a digest of the answers, "scores": [one for each answer; higher is better],
 "faults": [[names of rules], …], "comparisons": [[first, second, "1" | "2" | "tie" | null, the same for the other
 order], …], "vote": [first, second, 0 | 1 | "both" | "neither" | "skip"] or null, "refused": whether the judge
 refused the prompt}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from mlx_zh.corpus.samples import Sampled
from mlx_zh.errors import DataError
from mlx_zh.judging import judges, rules
from mlx_zh.judging.judges import Comparison, Judge
from mlx_zh.system.digests import value_digest
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.storage import append

By = Literal["rule", "judge", "hand"]
Vote = tuple[int, int, int | str]  # the two answers, and 0 or 1 (the better of them), both, neither or skip

_GOOD, _BAD = 0.75, 0.25  # share of its comparisons that a good answer wins at least, and a bad one at most


@dataclass(frozen=True, slots=True)
class PromptVerdict:
    """The verdict on the answers to one prompt; the head of this file explains the fields."""

    id: str
    by: By
    key: str
    answers: str
    scores: tuple[float, ...]
    faults: tuple[tuple[str, ...], ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    vote: Vote | None = None
    refused: bool = False

    def label(self, index: int) -> bool | None:
        """Whether an answer is good; None where that was not decided."""
        if self.by == "rule":
            return not self.faults[index]
        return True if self.scores[index] >= _GOOD else False if self.scores[index] <= _BAD else None

    def better(self, first: int, second: int) -> int | None:
        """Which of two answers is better; None for a tie, and where they were not compared."""
        for comparison in self.comparisons:
            if {comparison.first, comparison.second} == {first, second}:
                return comparison.winner
        if self.by == "judge" or self.scores[first] == self.scores[second]:
            return None
        return first if self.scores[first] > self.scores[second] else second

    def as_dict(self) -> dict[str, Any]:
        """The line of the file as plain values."""
        compared = [[c.first, c.second, *c.verdicts] for c in self.comparisons]
        return {"kind": "verdict", "version": 1, **asdict(self), "comparisons": compared}


def digest(sampled: Sampled) -> str:
    """A digest of the answers that a verdict is about."""
    return value_digest([[answer.text, answer.finish] for answer in sampled.answers])[:16]


def by_rules(sampled: Sampled, settings: rules.Settings) -> PromptVerdict:
    """The verdict of the rules."""
    faults = tuple(tuple(rules.faults(sampled, answer, settings)) for answer in sampled.answers)
    scores = tuple(map(rules.score, faults))
    return PromptVerdict(sampled.id, "rule", rules.key(settings), digest(sampled), scores, faults)


def by_judge(sampled: Sampled, judge: Judge) -> PromptVerdict:
    """The verdict of a judge, who compares each answer with each other one; equal answers are compared once.

    An answer's score is the share of its comparisons that it wins; a tie counts half. Raises JudgeError.
    """
    texts = [answer.text for answer in sampled.answers]
    first = {text: texts.index(text) for text in texts}  # the number of the first answer with a text
    compared = []
    for one, other in combinations(first, 2):
        result = judges.compare(judge, sampled.prompt, sampled.reference, (one, other))
        compared.append(Comparison(first[one], first[other], result.verdicts))
    scores = tuple(_share_won(first[text], compared) for text in texts)
    key = judges.key(judge.name)
    return PromptVerdict(sampled.id, "judge", key, digest(sampled), scores, comparisons=tuple(compared))


def _share_won(index: int, compared: Sequence[Comparison]) -> float:
    own = [comparison.winner for comparison in compared if index in (comparison.first, comparison.second)]
    return sum(0.5 if winner is None else winner == index for winner in own) / len(own) if own else 0.5


def refused(sampled: Sampled, judge: Judge) -> PromptVerdict:
    """The verdict on a prompt that the judge refuses: none."""
    scores = (0.5,) * len(sampled.answers)
    return PromptVerdict(sampled.id, "judge", judges.key(judge.name), digest(sampled), scores, refused=True)


def by_hand(sampled: Sampled, vote: Vote) -> PromptVerdict:
    """The verdict of a person on two of the answers; the others have none."""
    first, second, choice = vote
    scores = [0.5] * len(sampled.answers)
    if choice in ("both", "neither"):
        scores[first] = scores[second] = float(choice == "both")
    elif choice in (0, 1):
        scores[first], scores[second] = float(choice == 0), float(choice == 1)
    return PromptVerdict(sampled.id, "hand", "", digest(sampled), tuple(scores), vote=vote)


@dataclass(frozen=True)
class VerdictFile:
    """The verdicts of a set of samples, of all rules, judges and people."""

    path: Path

    def read(self, by: By, key: str, samples: Sequence[Sampled]) -> dict[str, PromptVerdict]:
        """The verdicts on these answers under this key, by the prompt's id; later lines replace earlier ones.

        A damaged line is left out. Raises DataError for a file that cannot be read.
        """
        current = {sampled.id: (digest(sampled), len(sampled.answers)) for sampled in samples}
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        verdicts = {}
        for line in text_lines(text):
            verdict = _parsed(line)
            if verdict is None or (verdict.by, verdict.key) != (by, key):
                continue
            if current.get(verdict.id) == (verdict.answers, len(verdict.scores)):
                verdicts[verdict.id] = verdict
        return verdicts

    def append(self, *verdicts: PromptVerdict) -> None:
        """Add verdicts, so that they survive a power cut. Raises StorageError."""
        if verdicts:
            lines = [json.dumps(verdict.as_dict(), ensure_ascii=False) + "\n" for verdict in verdicts]
            append(self.path, ("\n" + "".join(lines)).encode(), flush=True)  # a killed one may lack its newline


def _parsed(line: str) -> PromptVerdict | None:
    """The verdict of a line; None for a line of another form."""
    try:
        values = parse_json(line)
        if (values.pop("kind"), values.pop("version")) != ("verdict", 1):
            return None
        compared = values.pop("comparisons")
        values["comparisons"] = tuple(Comparison(one, two, (a, b)) for one, two, a, b in compared)
        values["scores"], values["faults"] = tuple(values["scores"]), tuple(map(tuple, values["faults"]))
        values["vote"] = None if values["vote"] is None else tuple(values["vote"])
        verdict = PromptVerdict(**values)
        return verdict if _is_whole(verdict) else None
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _is_whole(verdict: PromptVerdict) -> bool:
    count = len(verdict.scores)
    numbers = [n for c in verdict.comparisons for n in (c.first, c.second)] + list((verdict.vote or ())[:2])
    known = all(v in ("1", "2", "tie", None) for c in verdict.comparisons for v in c.verdicts)
    texts = fits([verdict.id, verdict.by, verdict.key, verdict.answers], list[str])
    voted = verdict.vote is None or (len(verdict.vote) == 3 and verdict.vote[2] in (0, 1, "both", "neither", "skip"))
    return (
        texts
        and voted
        and known
        and all(isinstance(score, int | float) and not isinstance(score, bool) for score in verdict.scores)
        and all(isinstance(n, int) and 0 <= n < count for n in numbers)
        and (verdict.by != "rule" or len(verdict.faults) == count)
    )
