"""The blind arena: two stages answer a prompt, their names are hidden until the vote, and the votes are counted.

The answers and votes have the forms of `mlx-zh arena` (`corpus.samples`, `judging.verdicts`), in the run folder. Each
line of answers also holds the seed of the order and which side was shown first. A vote goes to the run's file of
feedback too, where `prepare` reads it.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_zh.chatting import feedback
from mlx_zh.corpus.samples import Sampled, SampledAnswer, prompt_id
from mlx_zh.errors import StorageError, StudioError
from mlx_zh.judging.contest import Contest
from mlx_zh.judging.verdicts import VerdictFile, by_hand
from mlx_zh.stages.run_folder import ArenaFolder, RunFolder
from mlx_zh.studio.conversation import Answer, Column
from mlx_zh.system.digests import value_digest
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.links import check_file
from mlx_zh.system.record_lines import append_record

Choice = Literal["A", "B", "both", "neither"]


@dataclass
class BlindArena:
    """Votes on two stages; `columns` are theirs, and `shown` says which of them stands at A and at B."""

    run: RunFolder
    columns: tuple[Column, Column]
    seed: int = field(default_factory=lambda: secrets.randbits(31))
    prompts: int = 0  # that were shown since the page was opened
    voted: Choice | None = None
    _record: Sampled | None = None  # the last one that was voted on

    @property
    def folder(self) -> ArenaFolder:
        """Where answers and votes are kept."""
        first, second = self.columns
        return self.run.arena_of(f"blind-{first.run.name}-{first.stage}-{second.run.name}-{second.stage}")

    @property
    def swapped(self) -> bool:
        """Whether the second stage stands at A for this prompt."""
        return random.Random(f"order {self.seed} {self.prompts}").random() < 0.5

    @property
    def shown(self) -> tuple[Column, Column]:
        """The columns at A and at B."""
        first, second = self.columns
        return (second, first) if self.swapped else (first, second)

    def next(self) -> None:
        """Go on to another prompt, which both stages answer without what was said before."""
        self.prompts += 1
        self.voted, self._record = None, None
        for column in self.columns:
            column.clear()

    def vote(self, choice: Choice) -> None:
        """Record the vote. Raises StudioError if there is nothing to vote on, and what `feedback.compared` raises."""
        if self.voted is not None:
            raise StudioError("the vote on these answers is recorded already. Take it back to vote again.")
        first, second = self._answers()
        self._check_files()
        chosen: int | str = choice
        if choice in ("A", "B"):
            chosen = int((choice == "B") != self.swapped)
        sampled = self._sampled(first, second)
        about = {"order": [1, 0] if self.swapped else [0, 1], "order_seed": self.seed, "order_number": self.prompts}
        append_record(self.folder.answers, {**sampled.as_dict(), **about, "fingerprints": self._fingerprints()})
        VerdictFile(self.folder.chosen).append(by_hand(sampled, (0, 1, chosen)))
        feedback.compared(self.run.feedback, first.prompt, (first.given, second.given), chosen)
        self.voted, self._record = choice, sampled

    def undo(self) -> None:
        """Take the last vote back; the same answers can be voted on again."""
        if self._record is None:
            raise StudioError("there is no vote to take back.")
        first, second = self._answers()
        self._check_files()
        VerdictFile(self.folder.chosen).append(by_hand(self._record, (0, 1, "skip")))
        feedback.withdrawn(self.run.feedback, first.prompt, [first.given, second.given])
        self.voted, self._record = None, None

    def tally(self) -> Contest:
        """The votes on the two stages as they are now: those on adapters that were trained again do not count."""
        lines = _lines(self.folder.answers)
        now = self._fingerprints() if all(column.answers for column in self.columns) else []
        latest = now if now and None not in now else lines[-1][1] if lines else []
        samples = list({one.id: one for one, models in lines if models == latest}.values())
        return Contest.of(samples, VerdictFile(self.folder.chosen).read("hand", "", samples))

    def _check_files(self) -> None:
        """Raise StorageError where a link would lead a vote out of the run folder."""
        for path in (self.folder.answers, self.folder.chosen, self.run.feedback):
            check_file(self.run.path, path, StorageError)

    def _answers(self) -> tuple[Answer, Answer]:
        first, second = (column.last for column in self.columns)
        if first is None or second is None or not (first.complete and second.complete):
            raise StudioError("both answers must be complete before one can be chosen.")
        if first.text.strip() == second.text.strip():
            raise StudioError("both answers are the same, so there is nothing to choose.")
        return first, second

    def _fingerprints(self) -> list[str | None]:
        answers = [column.answers[-1] for column in self.columns]
        return [answer.origin.fingerprint if answer.origin else None for answer in answers]

    def _sampled(self, *answers: Answer) -> Sampled:
        prompt = tuple(answers[0].prompt)
        texts = [answer.text for answer in answers]
        said = tuple(map(_sampled_answer, answers))
        # Unlike a sample's id, because the same prompt may be asked again, with other answers.
        return Sampled(value_digest([prompt_id(prompt), *texts])[:16], prompt, None, said)


def _sampled_answer(answer: Answer) -> SampledAnswer:
    finish = "length" if answer.statistics.get("reason") == "length" else "stop"
    seed = answer.origin.seed if answer.origin and answer.origin.seed is not None else 0
    return SampledAnswer(answer.text, finish, int(answer.statistics.get("generated", 0)), seed)


def _lines(path: Path) -> list[tuple[Sampled, Any]]:
    """The answers that were voted on, and the fingerprints of their models; a damaged line is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in text_lines(text):
        try:
            values = parse_json(line)
            lines.append((Sampled.of(values), values.get("fingerprints")))
        except ValueError:
            continue
    return lines
