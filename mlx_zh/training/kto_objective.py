"""The objective of KTO: raise good answers and lower bad ones, relative to a reference model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.logprobs import batch_logprobs, sequence_logprobs, sum_by_owner
from mlx_zh.core.losses import UNPAIRED, answer_loss, chosen_cross_entropy
from mlx_zh.core.packing import PackedBatch, pack_conversations, plan_rows
from mlx_zh.distributed.world import ALONE, World
from mlx_zh.recipe import Dpo
from mlx_zh.training.mismatched import MismatchedAnswers
from mlx_zh.training.objective import Row, Settings, Sums, plan_share

_SUMS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "count/chosen", "count/rejected")


@dataclass(frozen=True, slots=True)
class AnswerRow(Row):
    """A row of P answers."""

    good: mx.array  # (P,) bool
    lengths: mx.array  # (P,) scored tokens
    reference: mx.array  # (P,) summed log-probs
    kl: float = 0.0  # the KL term of the whole step


class KtoObjective:
    """Mean loss over the answers of a step; TRL calls the good ones chosen and the bad ones rejected.

    `reference` (N, 4) holds the reference log-probs of `answers`, as `Reference.logprobs` gives them.
    """

    sums: tuple[str, ...] = (*_SUMS, "kl")

    def __init__(
        self,
        answers: MismatchedAnswers,
        reference: npt.NDArray[np.float32],
        section: Dpo,
        settings: Settings,
        world: World = ALONE,
    ) -> None:
        self.size = len(answers)
        self.coupled = UNPAIRED[section.loss].kl
        self._world = world
        self._answers = answers
        self._reference = reference
        self._section = section
        self.settings = settings

    def rows(self, examples: npt.NDArray[np.int64], step: int | None) -> list[Row]:
        """This rank's rows, of at most `micro_tokens` tokens or one answer."""
        answers = [self._answers[int(i)] for i in examples]
        rows: list[Row] = []
        lengths = [len(answer.prompt) + len(answer.chosen) for answer in answers]
        for members in plan_share(self._world, lengths, self.settings.micro_tokens):
            batch = _pack([(answers[m].prompt, answers[m].chosen) for m in members])
            ids = tuple(int(examples[m]) for m in members)
            rows.append(
                AnswerRow(
                    batch=batch,
                    examples=ids,
                    noise=self.settings.noise(batch, step, ids),
                    count=len(answers),
                    training=step is not None,
                    good=mx.array([self._answers.label(i) for i in ids]),
                    lengths=mx.array([len(answers[m].chosen) for m in members], dtype=mx.float32),
                    reference=mx.array(self._reference[list(ids), 0]),
                )
            )
        return rows

    def prepared(self, model: nn.Module, rows: list[Row]) -> list[Row]:
        """The rows with the KL term of the whole step, if the loss has one.

        It is max(0, mean of log(pi / pi_ref)) over the step's mismatched answers on all ranks (arXiv:2402.01306,
        section 4.1): forward only, without noise, and no gradient flows through it.
        """
        if not self.coupled:
            return rows
        every = sorted(entry for rank in self._world.collect(self._log_ratios(model, rows)) for entry in rank)
        kl = max(math.fsum(ratio for _, ratio in every) / len(every), 0.0)
        return [replace(row, kl=kl) for row in rows if isinstance(row, AnswerRow)]

    def _log_ratios(self, model: nn.Module, rows: Sequence[Row]) -> list[tuple[int, float]]:
        """log(pi / pi_ref) of the mismatched answer of each of these rows' examples, with its number."""
        ids = [example for row in rows for example in row.examples]
        pairs = [self._answers[i] for i in ids]
        lengths = [len(pair.prompt) + len(pair.rejected) for pair in pairs]
        ratios: list[tuple[int, float]] = []
        for members in plan_rows(lengths, self.settings.micro_tokens):
            batch = _pack([(pairs[m].prompt, pairs[m].rejected) for m in members])
            policy = np.array(sequence_logprobs(model, batch, chunk=self.settings.logit_rows))
            part = [ids[m] for m in members]
            ratios += zip(part, (policy - self._reference[part, 1]).tolist(), strict=True)
        return ratios

    def share(self, model: nn.Module, row: Row) -> tuple[mx.array, Sums]:
        """The sum of the row's losses divided by the answers of the step, and sums for the metrics."""
        assert isinstance(row, AnswerRow)
        logprobs = batch_logprobs(
            model,
            row.batch,
            checkpoint=self.settings.levels(row.batch),
            chunk=self.settings.logit_rows,
            grad=row.training,
            noise=row.noise,
        )
        policy, section = sum_by_owner(logprobs, row.batch.owner, row.batch.num_sequences), self._section
        weights = {"desirable_weight": section.desirable_weight, "undesirable_weight": section.undesirable_weight}
        losses = answer_loss(policy, row.reference, row.good, kl=row.kl, beta=section.beta, **weights)
        if section.sft_weight:
            losses = losses + section.sft_weight * row.good * chosen_cross_entropy(policy, row.lengths)
        return losses.sum() / row.count, self._figures(row, mx.stop_gradient(policy))

    def _figures(self, row: AnswerRow, policy: mx.array) -> Sums:
        """Sums over the row's answers, for the metrics. Those of `kl` add up to the KL term itself."""
        rewards, bad = self._section.beta * (policy - row.reference), mx.logical_not(row.good)
        sums: Sums = {"kl": mx.array(row.kl * len(row.examples) / row.count)}
        for name, which in (("chosen", row.good), ("rejected", bad)):
            sums[f"rewards/{name}"] = (rewards * which).sum()
            sums[f"logps/{name}"] = (policy * which).sum()
            sums[f"count/{name}"] = which.sum().astype(mx.float32)
        return {name: sums[name] for name in self.sums}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """TRL's metrics of the step: means over its good (chosen) and its bad (rejected) answers, and `kl`.

        A step without answers of a kind has no figures of it, and no margin.
        """
        figures: dict[str, float] = {"kl": sums["kl"]}
        for name in ("chosen", "rejected"):
            count = sums[f"count/{name}"]
            if count:
                figures |= {f"{kind}/{name}": sums[f"{kind}/{name}"] / count for kind in ("rewards", "logps")}
            figures[f"count/{name}"] = int(count)
        if "rewards/chosen" in figures and "rewards/rejected" in figures:
            figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        return figures


def _pack(answers: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]) -> PackedBatch:
    """Pack prompts and responses into one row; the tokens of the responses are scored."""
    return pack_conversations(
        (np.concatenate([prompt, response]), np.arange(len(prompt) + len(response)) >= len(prompt))
        for prompt, response in answers
    )
