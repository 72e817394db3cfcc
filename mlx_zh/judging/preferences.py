"""From verdicts to rows of data: pairs for DPO, labelled answers for KTO, and the best answers for SFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_zh.corpus.samples import Sampled, plain
from mlx_zh.judging.verdicts import PromptVerdict

To = Literal["pairs", "kto", "best"]

# Why a prompt gives no row, in the order in which the reasons are looked for.
REFUSED, ONE, SAME = "refused by the judge", "one answer only", "the answers are the same"
SKIPPED, ALL_GOOD, ALL_BAD, NEAR = "skipped", "all answers good", "all answers bad", "answers nearly equal"

NEAREST = 0.5  # a judge's scores that differ by less are nearly equal


@dataclass
class Chosen:
    """Rows of data, and how many prompts were left out, by reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    prompts: int = 0  # that gave a row
    left_out: Counter[str] = field(default_factory=Counter)


def choose(samples: Iterable[Sampled], verdicts: Mapping[str, PromptVerdict], to: To) -> Chosen:
    """The rows that verdicts give, in the order of the samples. Prompts that wait for a verdict are not counted.

    Of answers with the same score the first one stands for all: samples are exchangeable, so that this favours no
    length.
    """
    chosen = Chosen()
    for sampled in samples:
        verdict = verdicts.get(sampled.id)
        reason = _nothing_to_choose(sampled) if verdict is None else left_out(sampled, verdict)
        if verdict is None and reason is None:
            continue
        if verdict is None or reason is not None:
            chosen.left_out[str(reason)] += 1
            continue
        chosen.prompts += 1
        chosen.rows += _ROWS[to](sampled, verdict)
    return chosen


def left_out(sampled: Sampled, verdict: PromptVerdict) -> str | None:
    """Why a prompt gives no row; None if it gives one."""
    if verdict.refused:
        return REFUSED
    if (reason := _nothing_to_choose(sampled)) is not None:
        return reason
    if verdict.vote is not None and verdict.vote[2] == "skip":
        return SKIPPED
    if verdict.by == "judge":
        near = max(verdict.scores) - min(verdict.scores) < NEAREST
        return NEAR if near else None
    voted = range(len(verdict.scores)) if verdict.vote is None else verdict.vote[:2]
    good = {verdict.label(int(index)) for index in voted}
    if good == {True}:
        return ALL_GOOD
    if good == {False}:
        return ALL_BAD
    best, worst = _ends(verdict)
    return SAME if _text(sampled, best) == _text(sampled, worst) else None


def _nothing_to_choose(sampled: Sampled) -> str | None:
    """Why no verdict could give a row; None if one could."""
    if len(sampled.answers) < 2:
        return ONE
    return SAME if len({answer.text.strip() for answer in sampled.answers}) < 2 else None


def _ends(verdict: PromptVerdict) -> tuple[int, int]:
    """The numbers of the best and of the worst answer."""
    scores = verdict.scores
    return scores.index(max(scores)), scores.index(min(scores))


def _text(sampled: Sampled, index: int) -> str:
    return sampled.answers[index].text.strip()


def _pair(sampled: Sampled, verdict: PromptVerdict) -> list[dict[str, Any]]:
    best, worst = _ends(verdict)
    said = {"chosen": _text(sampled, best), "rejected": _text(sampled, worst)}
    return [{"messages": plain(sampled.prompt), **{name: _turn(text) for name, text in said.items()}}]


def _labelled(sampled: Sampled, verdict: PromptVerdict) -> list[dict[str, Any]]:
    """One row for each different answer whose label was decided."""
    labels: dict[str, bool] = {}
    for index in range(len(sampled.answers)):
        label, text = verdict.label(index), _text(sampled, index)
        if label is not None and text:
            labels.setdefault(text, label)
    return [
        {"prompt": plain(sampled.prompt), "completion": [_turn(text)], "label": label}
        for text, label in labels.items()
    ]


def _best(sampled: Sampled, verdict: PromptVerdict) -> list[dict[str, Any]]:
    best, _ = _ends(verdict)
    return [{"messages": [*plain(sampled.prompt), _turn(_text(sampled, best))]}]


def _turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


_ROWS = {"pairs": _pair, "kto": _labelled, "best": _best}
