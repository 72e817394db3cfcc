"""How often a rule or a judge decides as a person did, on the same two answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.feedback import WITHDRAWN
from mlx_zh.corpus.samples import Sampled, SampledAnswer, prompt_id
from mlx_zh.errors import DataError
from mlx_zh.exams.statistics import Interval, wilson
from mlx_zh.judging.verdicts import PromptVerdict
from mlx_zh.system.digests import value_digest
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import parse_json


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of `votes` of a person for one of two answers: `agreed` verdicts for the same one, and `ties`."""

    votes: int
    agreed: int
    ties: int

    @property
    def decided(self) -> int:
        """Votes on answers that are no tie for the judge."""
        return self.votes - self.ties

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the rate of agreement among what was decided; a judge who guesses has 0.5."""
        return wilson(self.agreed, self.decided)


def agreement(people: Iterable[PromptVerdict], others: Mapping[str, PromptVerdict]) -> Agreement:
    """The votes of people against the verdicts of others, by the prompt's id, on the same answers."""
    votes = agreed = ties = 0
    for person in people:
        other = others.get(person.id)
        if other is None or other.refused or person.vote is None or person.vote[2] not in (0, 1):
            continue
        first, second, choice = person.vote
        if other.answers != person.answers:
            continue
        votes += 1
        winner = other.better(first, second)
        ties += winner is None
        agreed += winner == (first, second)[int(choice)]
    return Agreement(votes, agreed, ties)


def votes_of(path: Path) -> list[tuple[Sampled, int]]:
    """The pairs of answers in a file of the chat's feedback, and the number of the better one, 0 or 1.

    The last vote on the same answers counts. Lines of another form are left out. Raises DataError for a file that
    cannot be read.
    """
    try:
        lines = list(text_lines(path.read_text(encoding="utf-8", errors="replace")))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    votes: dict[str, tuple[Sampled, int]] = {}
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or row.get("kind") != "feedback":
            continue
        choice = row.get("choice")
        if type(choice) is not int and choice != WITHDRAWN:
            continue
        prompt, answers = row.get("prompt", []), row.get("answers", [])
        if not fits(prompt, list[dict[str, str]]) or not fits(answers, list[str]) or len(answers) != 2 or not prompt:
            continue
        if choice not in (0, 1, WITHDRAWN) or not all({"role", "content"} <= turn.keys() for turn in prompt):
            continue
        messages = tuple(Message(turn["role"], turn["content"]) for turn in prompt)
        # Unlike a sample's id, because the same prompt may stand there with several pairs of answers.
        id = value_digest([prompt_id(messages), *sorted(answers)])[:16]
        if choice == WITHDRAWN:
            votes.pop(id, None)
            continue
        said = tuple(SampledAnswer(text, "stop", 0, 0) for text in answers)
        votes[id] = (Sampled(id, messages, None, said), choice)
    return list(votes.values())
