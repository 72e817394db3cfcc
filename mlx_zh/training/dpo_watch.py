"""What goes wrong in preference tuning without an error, told from the figures of the steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from mlx_zh.core.losses import LOSSES
from mlx_zh.errors import TrainingError
from mlx_zh.language.notice import Notice
from mlx_zh.recipe import Dpo

# A log-prob of one token computed twice, in rows that were packed differently, differs by about this much on average.
_TOKEN_ERROR = {True: 1e-4, False: 3e-2}  # by whether the model computes in float32

_WINDOW = 5  # steps averaged
_FALLS = 3  # windows in a row in which the chosen reward fell
_NATS = 1.0  # that the chosen responses must have lost over them
_EARLY = 3  # steps within which perfect accuracy is no learning


class DpoWatch:
    """Checks the first step and looks for known failures in the steps after it.

    `starts_at_reference`: policy and reference are the same at the first step, and no noise is added to the policy.
    """

    def __init__(self, section: Dpo, *, starts_at_reference: bool, float32: bool) -> None:
        self._section = section
        self._starts_at_reference = starts_at_reference
        self._token_error = _TOKEN_ERROR[float32]
        self._steps: list[dict[str, Any]] = []
        self._told: set[str] = set()

    def recall(self, figures: dict[str, Any]) -> None:
        """Take note of a step of an earlier session of this run."""
        self._steps.append(figures)
        self._remarks()

    def step(self, figures: dict[str, Any]) -> list[Notice]:
        """Warnings about the run up to this step. Raises TrainingError where the first step is impossible."""
        if figures["step"] == 1 and self._starts_at_reference:
            self._check_start(figures)
        self._steps.append(figures)
        return self._remarks()

    def _check_start(self, figures: dict[str, Any]) -> None:
        """Policy = reference, so every reward is 0 and the sigmoid loss is -log sigmoid(0) = ln 2."""
        section = self._section
        responses = 2 * figures["pairs"]
        allowed = section.beta * self._token_error * figures["scored_tokens"] / responses + 1e-6
        wrong = [
            f"{name} is {figures[name]:.4g}, not 0"
            for name in ("rewards/chosen", "rewards/rejected")
            if not abs(figures[name]) <= allowed
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
        found = {"degeneration": self._degeneration(), "saturation": self._saturation()}
        new = {name: text for name, text in found.items() if text and name not in self._told}
        self._told |= new.keys()
        return list(new.values())

    def _degeneration(self) -> Notice | None:
        """The chosen reward below 0 and falling window by window while margins rise."""
        needed = _WINDOW * (_FALLS + 1)
        if not LOSSES[self._section.loss].reference or len(self._steps) < needed or len(self._steps) % _WINDOW:
            return None
        last = self._steps[-needed:]
        chosen, margins = (
            [sum(s[f"rewards/{name}"] for s in last[i : i + _WINDOW]) / _WINDOW for i in range(0, needed, _WINDOW)]
            for name in ("chosen", "margins")
        )
        falling = all(b < a for a, b in pairwise(chosen))
        rising = all(b > a for a, b in pairwise(margins))
        lost = (chosen[0] - chosen[-1]) / self._section.beta
        if not (falling and rising and chosen[-1] < 0 and lost >= _NATS):
            return None
        return Notice("dpo-chosen-falls", steps=needed, first=chosen[0], last=chosen[-1])

    def _saturation(self) -> Notice | None:
        """Every pair ranked rightly before much could be learned."""
        first = self._steps[:_EARLY]
        if not LOSSES[self._section.loss].reference or len(first) < _EARLY or first[0]["step"] != 1:
            return None
        if sum(step["pairs"] for step in first) < 12 or any(step["rewards/accuracies"] < 1 for step in first):
            return None
        return Notice("dpo-perfect-at-once", steps=_EARLY, reference=self._section.reference)
