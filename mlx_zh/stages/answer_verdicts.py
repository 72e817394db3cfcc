"""Verdicts on answers, by rules, by a judge or by hand: what is decided is kept, so that it goes on after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from mlx_zh.corpus.samples import Sampled
from mlx_zh.errors import JudgeError, RefusedByJudge
from mlx_zh.judging import judges, rules, verdicts
from mlx_zh.judging.agreement import Agreement, agreement, votes_of
from mlx_zh.judging.judges import Bias, Judge
from mlx_zh.judging.verdicts import PromptVerdict, VerdictFile
from mlx_zh.language.notice import Notice
from mlx_zh.stages.hand_votes import Voter, shown_pair
from mlx_zh.stages.judge_models import LocalJudge
from mlx_zh.system import console

Item = TypeVar("Item")
Result = TypeVar("Result")
_REFUSALS = 3  # of the first questions; a judge who refuses them all will refuse the others too


@dataclass
class Verdicts:
    """Prompts with their answers, and the verdicts on them so far, which are kept in the file `path`."""

    path: Path
    samples: list[Sampled]
    verdicts: dict[str, PromptVerdict] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # for the record: who decided, and how sure that is

    @property
    def _file(self) -> VerdictFile:
        return VerdictFile(self.path)

    def by_rules(self, settings: rules.Settings) -> None:
        """Judge every answer by the rules."""
        self.verdicts = self._file.read("rule", rules.key(settings), self.samples)
        self._add(*(verdicts.by_rules(sampled, settings) for sampled in self._undecided()))
        self.about |= {"by": "rule", "settings": asdict(settings)}
        judged = [rules.right(s, answer.text) for s in self.samples for answer in s.answers]
        checked = [is_right for is_right in judged if is_right is not None]
        self.about |= {"answers": len(judged), "checked": len(checked), "right": sum(checked)}
        if not checked:
            console.warn(Notice("no-known-solutions"), keep=False)

    def by_judge(self, judge: Judge, parallel: int, votes: Path | None = None) -> None:
        """Let a judge compare the answers to each prompt, and measure how far it is to be trusted.

        Raises JudgeError; verdicts until then are kept.
        """
        key = judges.key(judge.name)
        voted = votes_of(votes) if votes is not None else []
        asked = [*self.samples, *(sampled for sampled, _ in voted)]
        self.verdicts = self._file.read("judge", key, asked)
        waiting = [sampled for sampled in asked if sampled.id not in self.verdicts]
        done = len(self.verdicts)
        console.say(f"{judge.name} judges the answers to {len(waiting)} prompts; {done} are judged already.")
        bar = console.CountBar("JUDGE", len(waiting), "prompt")
        try:
            threads = 1 if isinstance(judge, LocalJudge) else max(1, parallel)
            for verdict in _judged(waiting, judge, threads):
                self._add(verdict)
                bar.update(1)
        finally:
            bar.close()
        people = [verdicts.by_hand(sampled, (0, 1, choice)) for sampled, choice in voted]
        people += self._file.read("hand", "", self.samples).values()
        own = [self.verdicts[sampled.id] for sampled in self.samples]
        bias = Bias.of(comparison for verdict in own for comparison in verdict.comparisons)
        self.about |= {"by": "judge", "judge": judge.name, "bias": asdict(bias)}
        self._trust(bias, agreement(people, self.verdicts))

    def by_hand(self, voter: Voter | None = None) -> None:
        """Ask a person about two answers to each prompt, until the person stops.

        Raises DataError without a terminal.
        """
        self.verdicts = self._file.read("hand", "", self.samples)
        voter, open_ones = voter or Voter.at_terminal(), [s for s in self._undecided() if shown_pair(s) is not None]
        console.say(f"{len(open_ones)} prompts to decide; {len(self.verdicts)} are decided already.")
        for number, sampled in enumerate(open_ones, start=1):
            vote = voter.ask(sampled, f"{number}/{len(open_ones)}")
            if vote is None:
                break
            self._add(verdicts.by_hand(sampled, vote))
        self.about |= {"by": "hand"}

    def _undecided(self) -> list[Sampled]:
        return [sampled for sampled in self.samples if sampled.id not in self.verdicts]

    def _add(self, *decided: PromptVerdict) -> None:
        self._file.append(*decided)
        self.verdicts |= {verdict.id: verdict for verdict in decided}

    def _trust(self, bias: Bias, agreed: Agreement) -> None:
        """Record and say how the judge treats positions, and how often it decides as people did."""
        if agreed.votes:
            self.about["agreement"] = asdict(agreed)
        console.say(console.table([*bias_rows(bias), *_agreement_rows(agreed)]))


def _judged(samples: Sequence[Sampled], judge: Judge, threads: int) -> Iterator[PromptVerdict]:
    """The verdicts as they come, with so many questions at a time. Raises JudgeError."""

    def ask(sampled: Sampled) -> tuple[PromptVerdict, RefusedByJudge | None]:
        try:
            return verdicts.by_judge(sampled, judge), None
        except RefusedByJudge as error:
            return verdicts.refused(sampled, judge), error

    answered = refused = 0
    for verdict, error in _in_threads(ask, samples, threads):
        answered, refused = answered + 1, refused + (error is not None)
        if error is not None and refused == answered and refused >= min(_REFUSALS, len(samples)):
            raise JudgeError(f"{error} All of its first {refused} questions were refused.") from error
        yield verdict


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """`work` of each item, in any order, `threads` at a time; after an error or a stop, no further item is begun."""
    if threads == 1:
        yield from map(work, items)
        return
    pool, rest = ThreadPoolExecutor(threads), iter(items)
    running: set[Future[Result]] = set()
    try:
        running = {pool.submit(work, item) for item in islice(rest, threads)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(work, item) for item in islice(rest, len(done))}
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def bias_rows(bias: Bias) -> list[tuple[str, str]]:
    """Lines on a judge's position bias."""
    low, high = bias.interval
    rows = [("comparisons in both orders", f"{bias.asked // 2}")]
    if bias.decided:
        share = f"{bias.first / bias.decided:.0%} ({low:.0%} to {high:.0%})"
        rows.append(("first answer preferred", share))
    if bias.comparisons:
        rows.append(("orders contradict each other", f"{bias.contradicted} / {bias.comparisons}"))
    return rows + ([("replies without a verdict", f"{bias.unread} / {bias.asked}")] if bias.unread else [])


def _agreement_rows(agreed: Agreement) -> list[tuple[str, str]]:
    if not agreed.votes:
        return []
    low, high = agreed.interval
    rate = f"{agreed.agreed} / {agreed.decided} ({low:.0%} to {high:.0%})"
    return [("agrees with your votes", rate), ("ties where you decided", f"{agreed.ties} / {agreed.votes}")]
