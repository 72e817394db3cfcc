"""Choosing among the samples of a run: who chooses, what is kept of it, and the data file that comes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from mlx_zh.corpus.samples import Sampled, read_samples
from mlx_zh.errors import DataError, JudgeError, RefusedByJudge
from mlx_zh.judging import judges, rules, verdicts
from mlx_zh.judging.agreement import Agreement, agreement, votes_of
from mlx_zh.judging.judges import Bias, Judge
from mlx_zh.judging.preferences import Chosen, To, choose
from mlx_zh.judging.verdicts import PromptVerdict, VerdictFile
from mlx_zh.language.notice import Notice
from mlx_zh.stages.hand_votes import Voter, shown_pair
from mlx_zh.stages.judge_models import LocalJudge
from mlx_zh.stages.run_folder import RunFolder, SamplesFolder
from mlx_zh.system import console
from mlx_zh.system.storage import write_exact_text, write_json

Item = TypeVar("Item")
Result = TypeVar("Result")
_REFUSALS = 3  # of the first questions; a judge who refuses them all will refuse the others too


@dataclass
class Choosing:
    """The samples of one label, and the verdicts on them so far."""

    folder: SamplesFolder
    words: str  # the recipe on the command line
    samples: list[Sampled]
    verdicts: dict[str, PromptVerdict] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # for the record: who chose, and how sure that is

    @staticmethod
    def of(run: RunFolder, label: str | None, words: str) -> Choosing:
        """The samples of a label, or the newest ones. Raises DataError if there are none."""
        folder = run.samples_called(label) if label else _newest(run, words)
        if not folder.answers.is_file():
            labels = ", ".join(sorted(path.parent.name for path in _labels(run))) or "none"
            raise DataError(
                f"{folder.answers} does not exist. The samples of this run are: {labels}. "
                f"`mlx-zh sample {words}` draws them."
            )
        samples = sorted(read_samples(folder.answers), key=lambda sampled: sampled.id)
        if not samples:
            raise DataError(f"{folder.answers} holds no sampled answers. `mlx-zh sample {words}` draws them.")
        return Choosing(folder, words, samples)

    @property
    def _file(self) -> VerdictFile:
        return VerdictFile(self.folder.chosen)

    def by_rules(self, settings: rules.Settings) -> None:
        """Judge every answer by the rules."""
        self.verdicts = self._file.read("rule", rules.key(settings), self.samples)
        for sampled in self._undecided():
            self._add(verdicts.by_rules(sampled, settings))
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

    def finish(self, to: To, out: Path | None) -> int:
        """Write the data file and say what it holds; returns the exit status, 1 if it would be empty."""
        chosen = choose(self.samples, self.verdicts, to)
        path = out or self.folder.path / f"{to}.jsonl"
        counts = {"prompts": len(self.samples), "used": chosen.prompts, "rows": len(chosen.rows), "file": str(path)}
        undecided = len(self.samples) - chosen.prompts - chosen.left_out.total()
        counts |= {"left_out": dict(chosen.left_out), "undecided": undecided}
        write_json(self.folder.choice, {"version": 1, "to": to, **self.about, **counts})
        console.say(console.table(_counted(len(self.samples), chosen, undecided)))
        if not chosen.rows:
            console.say("No prompt has a better and a worse answer, so no data file was written.")
            return 1
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen.rows)
        write_exact_text(path, "".join(lines))  # as the model wrote it: what is learned must not have changed
        console.say(f"{path} holds {len(chosen.rows)} rows. Name it in a recipe:\n")
        console.say(_recipe_lines(path, to))
        return 0

    def _undecided(self) -> list[Sampled]:
        return [sampled for sampled in self.samples if sampled.id not in self.verdicts]

    def _add(self, verdict: PromptVerdict) -> None:
        self._file.append(verdict)
        self.verdicts[verdict.id] = verdict

    def _trust(self, bias: Bias, agreed: Agreement) -> None:
        """Record and say how the judge treats positions, and how often it decides as people did."""
        if agreed.votes:
            self.about["agreement"] = asdict(agreed)
        console.say(console.table([*bias_rows(bias), *_agreement_rows(agreed)]))


def _newest(run: RunFolder, words: str) -> SamplesFolder:
    paths = sorted(_labels(run), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise DataError(f"{run.sampled} holds no samples. `mlx-zh sample {words}` draws them.")
    return SamplesFolder(paths[-1].parent)


def _labels(run: RunFolder) -> list[Path]:
    return list(run.sampled.glob("*/answers.jsonl"))


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


def _counted(prompts: int, chosen: Chosen, undecided: int) -> list[tuple[str, str]]:
    rows = [("prompts", str(prompts)), ("used", str(chosen.prompts))]
    rows += [(reason, str(count)) for reason, count in chosen.left_out.most_common()]
    return rows + ([("not decided yet", str(undecided))] if undecided else [])


def _recipe_lines(path: Path, to: To) -> str:
    """The lines that name a data file in a recipe."""
    section = "sft" if to == "best" else "dpo"
    lines = ["data:", f"  {section}:", f"    train: [{json.dumps(os.path.abspath(path), ensure_ascii=False)}]"]
    return "\n".join([*lines, *(["dpo:", "  loss: kto"] if to == "kto" else [])])
