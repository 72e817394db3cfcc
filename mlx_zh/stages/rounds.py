"""The rounds of a run, after its training: `python -m mlx_zh.stages.rounds RECIPE [--force] [KEY=VALUE ...]`.

A round is ordinary stages: the model before it answers the prompts, pairs are chosen among the answers, and DPO
learns them, from the weights of that model and with it as reference. Then both answer the prompts that were kept
apart.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_zh.corpus.samples import Sampled, plain
from mlx_zh.errors import DataError
from mlx_zh.judging.contest import Contest, matched
from mlx_zh.judging.judges import Judge
from mlx_zh.judging.preferences import Chosen, choose
from mlx_zh.judging.rules import Settings
from mlx_zh.judging.verdicts import PromptVerdict, by_rules
from mlx_zh.language.notice import Notice
from mlx_zh.pipeline.process import run_stage
from mlx_zh.recipe import Deduplicate, Recipe, Rounds, Source, Split
from mlx_zh.stages.answer_verdicts import Verdicts
from mlx_zh.stages.command import find_recipe
from mlx_zh.stages.contest import rate, right_answers
from mlx_zh.stages.judge_models import judge_named
from mlx_zh.stages.run_folder import RoundFolder, RunFolder
from mlx_zh.stages.side import Asked, Side
from mlx_zh.system import console
from mlx_zh.system.locks import Lock
from mlx_zh.system.redaction import redacted
from mlx_zh.system.storage import write_exact_text, write_json, write_text

NOISE, WORSE, NO_PAIRS = "noise", "worse", "no-pairs"  # why the rounds end
_ENDS = {NOISE: "rounds-end-noise", WORSE: "rounds-end-worse", NO_PAIRS: "rounds-end-no-pairs"}
PROMPTS = "train"  # the set of prompts of a recipe that names none: those of its training data


@dataclass(frozen=True)
class Round:
    """One round: the model that it starts from, and its folder."""

    recipe: Recipe  # of the whole run
    settings: Rounds
    number: int
    before: Side
    folder: RoundFolder
    options: Sequence[str] = ()  # of `dpo`

    def run(self, lock: Lock) -> int | dict[str, Any]:
        """Sample, choose, tune and compare; returns the record, or the exit status of a stage that failed."""
        self.folder.result.unlink(missing_ok=True)
        asked = self._asked("rounds", self.settings.prompts or PROMPTS)
        if status := self.before.draw(asked, lock):
            return status
        samples = self.before.drawn(asked)
        kept_out = {sampled.id for sampled in samples if is_kept_out(sampled.id, self.settings.check)}
        chosen = self._choose([sampled for sampled in samples if sampled.id not in kept_out])
        record: dict[str, Any] = {"version": 1, "round": self.number, "prompts": len(samples), "check": len(kept_out)}
        record |= {"pairs": len(chosen.rows), "left_out": dict(chosen.left_out)}
        if not chosen.rows:
            return record | {"ends": NO_PAIRS}
        if status := self._tune(lock):
            return status
        after = Side.of(str(self.folder.path), "dpo")
        earlier = [sampled for sampled in samples if sampled.id in kept_out]
        _write_prompts(self.folder.check_prompts, earlier)
        check = self._asked("check", str(self.folder.check_prompts))
        if status := after.draw(check, lock):
            return status
        return record | self._compared(earlier, after.drawn(check))

    def _asked(self, purpose: str, prompts: str) -> Asked:
        settings = self.settings
        options = ("--temperature", str(settings.temperature), "--max-tokens", str(settings.max_new_tokens))
        return Asked(purpose, prompts, settings.samples, options)

    def _choose(self, samples: list[Sampled]) -> Chosen:
        """Choose pairs among the samples and write them."""
        decided = self._decided(self.folder.chosen, samples)
        chosen = choose(samples, decided, "pairs")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen.rows)
        write_exact_text(self.folder.pairs, "".join(lines))
        console.say(f"{len(chosen.rows)} pairs from {len(samples)} prompts.")
        return chosen

    def _decided(self, path: Path, samples: list[Sampled]) -> dict[str, PromptVerdict]:
        """The verdicts on samples, kept in a file."""
        verdicts = Verdicts(path, samples)
        if self.settings.by == "rule":
            verdicts.by_rules(Settings())
        else:
            verdicts.by_judge(self._judge(), parallel=4)
        return verdicts.verdicts

    def _judge(self) -> Judge:
        settings = self.settings
        url, model = settings.judge_url, settings.judge_model
        return judge_named(self.recipe, settings.judge, (url, model) if url and model else None)

    def _tune(self, lock: Lock) -> int:
        """Run DPO on the pairs; returns its exit status."""
        write_text(self.folder.given, derived(self.recipe, self.folder, self.before).to_yaml(redacted))
        return run_stage("dpo", [str(self.folder.given), "--renew", *self.options], lock)

    def _compared(self, before: list[Sampled], after: list[Sampled]) -> dict[str, Any]:
        """The contest on the prompts that were kept apart, as part of the record."""
        pairs = matched(before, after)
        if self.settings.by == "rule":
            sides = [{one.id: by_rules(one, Settings()) for one in samples} for samples in (before, after)]
            contest = Contest.by_scores(*sides)
        else:
            contest = Contest.of(pairs, self._decided(self.folder.check, pairs))
        right = [right_answers(pairs, index) for index in (0, 1)]
        ends = NOISE if contest.noise else WORSE if contest.lost > contest.won else None
        console.say(console.table(_rows(contest, right)))
        return {"right": [list(counts) for counts in right], **contest.as_dict(), "ends": ends}


def is_kept_out(id: str, share: float) -> bool:
    """Whether a prompt, by its id of hex digits, is one that no round learns from: the same in every round."""
    return int(id[:8], 16) < share * 16**8


def derived(recipe: Recipe, folder: RoundFolder, before: Side) -> Recipe:
    """The recipe of a round: DPO on its pairs, from the weights of the model before, which are the reference."""
    # The pairs were chosen among different prompts: those that look alike, such as sums, are different ones.
    pairs = Split(train=(Source(path=str(folder.pairs)),))
    data = {
        "sft": Split(),
        "dpo": pairs,
        "validation_fraction": 0.0,
        "deduplicate": Deduplicate(exact=False, near=None),
    }
    start = "base" if before.adapter is None else str(before.adapter)
    update = {
        "name": folder.path.name,
        "runs": str(folder.path.parent),
        "budget": None,
        "rounds": None,
        "data": recipe.data.model_copy(update=data),
        "dpo": recipe.dpo.model_copy(update={"start": start}),
    }
    return recipe.model_copy(update=update)


def _write_prompts(path: Path, samples: Collection[Sampled]) -> None:
    """Write prompts, with their known solutions, as a file that `sample` reads."""
    rows = [{"messages": plain(one.prompt), "answer": one.reference} for one in samples]
    write_exact_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _rows(contest: Contest, right: list[tuple[int, int]]) -> list[tuple[str, str]]:
    rows = [("prompts better than before", str(contest.won)), ("worse than before", str(contest.lost))]
    rows.append(("as before", str(contest.tied)))
    if contest.win_rate is not None:
        low, high = contest.interval
        rows.append(("win rate", f"{contest.win_rate:.0%} ({low:.0%} to {high:.0%})"))
    for name, (count, checked) in zip(("right answers before", "right answers after"), right, strict=True):
        if checked:
            rows.append((name, rate(count, checked)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the rounds of a recipe until one is not better; returns the exit status. Raises MlxZhError."""
    target, *rest = argv or []
    overrides = [text for text in rest if not text.startswith("--")]
    options = [text for text in rest if text.startswith("--")]
    recipe = find_recipe(target, overrides)
    settings = recipe.rounds
    if settings is None:
        raise DataError(f"{target}: the recipe has no rounds.")
    run = RunFolder.of(recipe)
    with run.at_work("rounds") as lock:
        for folder in run.rounds.glob("*/"):
            if folder.name.isdecimal() and int(folder.name) > settings.count:
                run.round(int(folder.name)).result.unlink(missing_ok=True)
        before = Side.of(target, overrides=overrides)
        for number in range(1, settings.count + 1):
            console.say(f"Round {number} of {settings.count}: answers of {before.name}, pairs among them, DPO.")
            one = Round(recipe, settings, number, before, run.round(number), options)
            record = one.run(lock)
            if isinstance(record, int):
                return record
            write_json(one.folder.result, record)
            if record["ends"] is not None:
                console.say(Notice(_ENDS[record["ends"]], round=number))
                break
            before = Side.of(str(one.folder.path), "dpo")
        console.say(f"The best model of the rounds is {before.name}: `mlx-zh chat {' '.join(before.words)}`.")
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
