"""Detects failures of preference tuning that raise no error, from the metrics of the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from mlx_zh.errors import TrainingError
from mlx_zh.language.notice import Notice
from mlx_zh.recipe import Dpo
from mlx_zh.training.metrics import MetricsLine

# The mean difference between two log-probs of the same token that were computed in differently packed rows.
_TOKEN_ERROR = {True: 1e-4, False: 3e-2}  # by whether the model computes in float32

_WINDOW = 5  # steps that are averaged
_FALLS = 3  # consecutive windows in which the chosen reward must have fallen
_NATS = 1.0  # log-prob that the chosen responses must have lost in these windows
_EARLY = 3  # first steps, in which perfect accuracy cannot come from learning


class DpoWatch:
    """Checks the first step, and looks for known failures in the steps after it.

    `starts_at_reference` says that policy and reference are the same at the first step, and that the policy has no
    noise. `float32` says whether the model computes in float32.
    """

    def __init__(self, section: Dpo, *, starts_at_reference: bool, float32: bool) -> None:
        self._section = section
        self._starts_at_reference = starts_at_reference
        self._token_error = _TOKEN_ERROR[float32]
        self._steps: list[MetricsLine] = []
        self._reported: set[str] = set()

    def recall(self, figures: MetricsLine) -> None:
        """Add a step of an earlier session of this run. Its warnings are not returned again."""
        self._steps.append(figures)
        self._remarks()

    def step(self, figures: MetricsLine) -> list[Notice]:
        """New warnings after a step with these metrics. Raises TrainingError when the first step cannot be right."""
        if figures["step"] == 1 and self._starts_at_reference:
            self._check_start(figures)
        self._steps.append(figures)
        return self._remarks()

    def _check_start(self, figures: MetricsLine) -> None:
        """Raises TrainingError unless every reward is 0, KTO's KL term too, and the sigmoid loss is ln 2.

        These values follow from policy = reference: -log sigmoid(0) = ln 2.
        """
        section, values = self._section, cast(dict[str, float], figures)
        responses = 2 * values["pairs"] if "pairs" in values else values["count/chosen"] + values["count/rejected"]
        allowed = section.beta * self._token_error * figures["scored_tokens"] / responses + 1e-6
        limits = {"rewards/chosen": allowed, "rewards/rejected": allowed, "kl": allowed / section.beta}
        wrong = [
            f"{name} is {values[name]:.4g}, not 0"
            for name, limit in limits.items()
            if name in values and not abs(values[name]) <= limit
        ]
        if section.loss == "sigmoid" and not section.sft_weight and not abs(figures["loss"] - math.log(2)) <= allowed:
            wrong.append(f"the loss is {figures['loss']:.4f}, not ln 2 = 0.6931")
        if wrong:
            raise TrainingError(
                "the first step of preference tuning starts from its own reference, but " + " and ".join(wrong) + ". "
                "Usual causes: dropout or NEFTune noise was on in one of the two passes; the reference log-probs are "
                "of another adapter, base model or precision; the pairs were rendered differently (chat template, "
                "date_string, system message). Nothing was saved. If the reference cache is at fault, delete its "
                "folder and run again."
            )

    def _remarks(self) -> list[Notice]:
        remarks = {"degeneration": self._degeneration(), "saturation": self._saturation()}
        new = {name: text for name, text in remarks.items() if text and name not in self._reported}
        self._reported |= new.keys()
        return list(new.values())

    def _degeneration(self) -> Notice | None:
        """A warning when the chosen reward is below 0 and falls from window to window while margins rise."""
        needed = _WINDOW * (_FALLS + 1)
        if self._section.reference == "none" or len(self._steps) < needed or len(self._steps) % _WINDOW:
            return None
        last = self._steps[-needed:]
        if not all("rewards/margins" in step for step in last):  # KTO: a step without answers of one kind
            return None
        chosen = _window_means([step["rewards/chosen"] for step in last])
        margins = _window_means([step["rewards/margins"] for step in last])
        falling = all(b < a for a, b in pairwise(chosen))
        rising = all(b > a for a, b in pairwise(margins))
        lost = (chosen[0] - chosen[-1]) / self._section.beta
        if not (falling and rising and chosen[-1] < 0 and lost >= _NATS):
            return None
        return Notice("dpo-chosen-falls", steps=needed, first=chosen[0], last=chosen[-1])

    def _saturation(self) -> Notice | None:
        """A warning when every pair of the first steps was ranked correctly."""
        first = self._steps[:_EARLY]
        section = self._section
        if section.unpaired or section.reference == "none" or len(first) < _EARLY or first[0]["step"] != 1:
            return None
        if sum(step["pairs"] for step in first) < 12 or any(step["rewards/accuracies"] < 1 for step in first):
            return None
        return Notice("dpo-perfect-at-once", steps=_EARLY, reference=section.reference)


def _window_means(values: Sequence[float]) -> list[float]:
    """The mean of each window of `_WINDOW` values."""
    return [sum(values[i : i + _WINDOW]) / _WINDOW for i in range(0, len(values), _WINDOW)]
