"""The objective of DPO: prefer the chosen response to the rejected one, relative to a reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.logprobs import batch_logprobs
from mlx_zh.core.losses import LOSSES, chosen_cross_entropy, length_desensitized, preference_loss, rewards
from mlx_zh.corpus.rendered import RenderedPair
from mlx_zh.distributed.world import ALONE, World
from mlx_zh.recipe import Dpo
from mlx_zh.training.objective import Row, Settings, Sums, plan_share
from mlx_zh.training.pairs import pack, pair_sums, response_lengths, tree_tokens


@dataclass(frozen=True, slots=True)
class StepGradient:
    """A row's part in the loss of a whole step, for a loss that couples the pairs of the step."""

    share: mx.array  # a scalar: the row's share of the loss
    by_logprob: mx.array  # (P, 2): the gradient of the loss with respect to the row's log-probs
    totals: mx.array  # (P, 2), as `pair_sums` gives them
    shared: mx.array  # (P, 2), as `pair_sums` gives them


@dataclass(frozen=True, slots=True)
class PairRow(Row):
    """A row of P pairs."""

    pairs: tuple[RenderedPair, ...]
    lengths: mx.array  # (P, 2): scored tokens of chosen and rejected
    reference: mx.array | None  # (P, 4), as `Reference.logprobs` gives them
    indices: tuple[int, ...]  # of its pairs among the pairs of the step
    step_gradient: StepGradient | None = None


class DpoObjective:
    """Mean preference loss over the pairs of a step.

    `reference` (N, 4) holds the reference log-probs of `pairs`, as `Reference.logprobs` gives them. It is None for
    losses without a reference.
    """

    sums: tuple[str, ...] = (
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "pairs"),
    )

    def __init__(
        self,
        pairs: Sequence[RenderedPair],
        reference: npt.NDArray[np.float32] | None,
        section: Dpo,
        settings: Settings,
        world: World = ALONE,
    ) -> None:
        self.size = len(pairs)
        self.coupled = LOSSES[section.loss].coupled
        self._world = world
        self._pairs = pairs
        self._reference = reference
        self._section = section
        self.settings = settings

    def rows(self, examples: npt.NDArray[np.int64], step: int | None) -> list[Row]:
        """This rank's rows, of at most `micro_tokens` tokens or one pair."""
        pairs = [self._pairs[int(i)] for i in examples]
        rows: list[Row] = []
        lengths = [tree_tokens(pair) for pair in pairs]
        for members in plan_share(self._world, lengths, self.settings.micro_tokens):
            row = tuple(pairs[m] for m in members)
            batch = pack(row)
            ids = tuple(int(examples[m]) for m in members)
            rows.append(
                PairRow(
                    batch=batch,
                    examples=ids,
                    noise=self.settings.noise(batch, step, ids),
                    count=len(pairs),
                    training=step is not None,
                    pairs=row,
                    lengths=response_lengths(row),
                    reference=None if self._reference is None else mx.array(self._reference[list(ids)]),
                    indices=tuple(members),
                )
            )
        return rows

    def prepared(self, model: nn.Module, rows: list[Row]) -> list[Row]:
        """The rows, which `share` can then take one by one.

        A loss that couples the pairs of a step first needs a forward pass over all of them. From it come the loss
        and its gradient with respect to each log-prob, and `share` applies the chain rule.
        """
        if not self.coupled:
            return rows
        pair_rows = [row for row in rows if isinstance(row, PairRow)]
        sums = []
        for row in pair_rows:
            sums.append(self._sums(model, row, training=False))
            mx.eval(sums[-1])
        policy, reference, lengths = self._whole_step(pair_rows, sums)

        def mean(policy: mx.array) -> mx.array:
            return self._losses(policy, reference, lengths).mean()

        value_and_grad: Any = mx.value_and_grad(mean)
        loss, gradient = value_and_grad(policy)
        ready: list[Row] = []
        for row, (totals, shared) in zip(pair_rows, sums, strict=True):
            share = loss * len(row.pairs) / row.count
            step_gradient = StepGradient(share, gradient[mx.array(row.indices)], totals, shared)
            ready.append(replace(row, step_gradient=step_gradient))
        return ready

    def _whole_step(
        self, rows: Sequence[PairRow], sums: Sequence[tuple[mx.array, mx.array]]
    ) -> tuple[mx.array, mx.array | None, mx.array]:
        """Policy log-probs, reference log-probs and lengths of all pairs of the step on all ranks, (P, 2) each."""
        own: list[tuple[int, list[float]]] = []
        for row, pair in zip(rows, sums, strict=True):
            policy, reference = self._weighted(*pair), self._reference_logprobs(row)
            columns = [policy, row.lengths, row.lengths if reference is None else reference]
            values: Any = mx.concatenate(columns, axis=1).tolist()  # (P, 6)
            own += zip(row.indices, values, strict=True)
        pairs = sorted((index, values) for rank in self._world.collect(own) for index, values in rank)
        table = mx.array([values for _, values in pairs])  # (P, 6)
        return table[:, :2], None if self._reference is None else table[:, 4:], table[:, 2:4]

    def share(self, model: nn.Module, row: Row) -> tuple[mx.array, Sums]:
        """The sum of the row's pair losses divided by the pairs of the step, and sums for the metrics."""
        assert isinstance(row, PairRow)
        if row.step_gradient is not None and not row.training:
            totals, shared = row.step_gradient.totals, row.step_gradient.shared
        else:
            totals, shared = self._sums(model, row, training=row.training)
        policy, reference = self._weighted(totals, shared), self._reference_logprobs(row)
        if row.step_gradient is None:
            share = self._losses(policy, reference, row.lengths).sum() / row.count
        else:
            # The second term is 0, but its gradient is that of the whole step's loss.
            zero = policy - mx.stop_gradient(policy)
            share = row.step_gradient.share + (row.step_gradient.by_logprob * zero).sum()
        if self._section.sft_weight:
            extra = chosen_cross_entropy(totals[:, 0], row.lengths[:, 0]).sum() / row.count
            share = share + self._section.sft_weight * extra
        return share, self._figures(policy, reference, row.lengths)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """TRL's metrics of the step, each a mean over the pairs, and the number of pairs."""
        return {name: value / sums["pairs"] for name, value in sums.items() if name != "pairs"} | {
            "pairs": int(sums["pairs"])
        }

    def _sums(self, model: nn.Module, row: PairRow, *, training: bool) -> tuple[mx.array, mx.array]:
        logprobs = batch_logprobs(
            model,
            row.batch,
            checkpoint=self.settings.levels(row.batch),
            chunk=self.settings.logit_rows,
            grad=training,
            noise=row.noise,
        )
        return pair_sums(logprobs, row.batch, row.pairs)

    def _reference_logprobs(self, row: PairRow) -> mx.array | None:
        """The reference log-probs of chosen and rejected, (P, 2), weighted like those of the policy."""
        return None if row.reference is None else self._weighted(row.reference[:, :2], row.reference[:, 2:])

    def _weighted(self, totals: mx.array, shared: mx.array) -> mx.array:
        alpha = self._section.ld_alpha
        return totals if alpha is None else length_desensitized(totals, shared, alpha)

    def _losses(self, policy: mx.array, reference: mx.array | None, lengths: mx.array) -> mx.array:
        section = self._section
        return preference_loss(
            policy[:, 0],
            policy[:, 1],
            None if reference is None else reference[:, 0],
            None if reference is None else reference[:, 1],
            loss=section.loss,
            beta=section.beta,
            label_smoothing=section.label_smoothing,
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
            f_divergence=section.f_divergence,
            f_alpha=section.f_alpha,
            simpo_gamma=section.simpo_gamma,
            discopop_tau=section.discopop_tau,
        )

    def _figures(self, policy: mx.array, reference: mx.array | None, lengths: mx.array) -> Sums:
        """Sums over the row's pairs, for the metrics."""
        implicit = rewards(policy, reference, loss=self._section.loss, beta=self._section.beta, lengths=lengths)
        implicit, policy = mx.stop_gradient(implicit), mx.stop_gradient(policy)
        chosen, rejected = implicit[:, 0], implicit[:, 1]
        return {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).astype(mx.float32).sum(),
            "logps/chosen": policy[:, 0].sum(),
            "logps/rejected": policy[:, 1].sum(),
            "pairs": mx.array(float(len(chosen))),
        }
