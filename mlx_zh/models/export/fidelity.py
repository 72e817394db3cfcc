"""How well a fused model stands for base + adapter: KL, top-1 agreement and perplexity on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.logprobs import CHUNK_BYTES, hidden_states, output_head
from mlx_zh.core.packing import PackedBatch, pack_conversations, plan_rows
from mlx_zh.language.notice import Notice
from mlx_zh.models.export.merge import SurvivalSummary

# Above these a fused model is no longer called equal to base + adapter.
KL_LIMIT = 0.05  # nats a token: about what quantizing an 8B model to 4 bits once costs
LOST_LIMIT = 0.25  # of the distance that tuning moved the model
FREE_KL = 0.002  # below this, distances are numerical noise
KEPT_LIMIT = 0.9  # of the adapter's change, averaged over the matrices

Example = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]  # tokens (T,), and which of them are scored (T,)


@dataclass(frozen=True)
class Predictions:
    """A model's last hidden states before every scored token, and the head that makes them logits.

    (S, D) instead of (S, V): a model of 128k tokens would need half a megabyte a token, and the model itself need
    not stay in memory.
    """

    hidden: mx.array
    head: Any

    def logits(self, start: int, stop: int) -> mx.array:
        """Rows of logits (stop - start, V), float32."""
        project = getattr(self.head, "as_linear", self.head)
        return project(self.hidden[start:stop]).astype(mx.float32)


@dataclass(frozen=True)
class HeldOut:
    """Texts that no training has seen, packed into rows."""

    rows: tuple[PackedBatch, ...]

    @property
    def targets(self) -> mx.array:
        """(S,) scored tokens."""
        return mx.concatenate([row.targets for row in self.rows])

    def predictions(self, model: nn.Module) -> Predictions:
        """What `model` predicts with for every scored token."""
        parts = []
        for row in self.rows:
            hidden = hidden_states(model, row)[row.scored]
            mx.eval(hidden)
            parts.append(hidden)
        return Predictions(mx.concatenate(parts), output_head(model))


def held_out(examples: Sequence[Example], *, max_tokens: int, row_tokens: int) -> HeldOut:
    """The first examples of up to `max_tokens` tokens together (one at least), in rows of about `row_tokens`."""
    chosen: list[Example] = []
    total = 0
    for example in examples:
        total += len(example[0])
        if chosen and total > max_tokens:
            break
        chosen.append(example)
    plan = plan_rows([len(tokens) for tokens, _ in chosen], row_tokens)
    return HeldOut(tuple(pack_conversations(chosen[i] for i in members) for members in plan))


@dataclass(frozen=True)
class Distance:
    """How far one model's predictions are from another's."""

    kl: float  # mean KL(reference || other), nats a token
    top1: float  # part of the tokens where both find the same one likeliest
    perplexity: float  # of the other on the text


def distance(reference: Predictions, other: Predictions, targets: mx.array) -> Distance:
    """Compare two models token by token, a few rows of logits at a time."""
    count = targets.size
    kl = agreed = likelihood = 0.0
    rows = max(8, CHUNK_BYTES // (8 * reference.logits(0, 1).shape[-1]))
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        p, q = (_log_softmax(side.logits(start, stop)) for side in (reference, other))
        at_target = mx.take_along_axis(q, targets[start:stop, None], axis=-1)
        divergence = mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0)  # a KL below 0 is rounding
        kl += float(divergence.sum())
        agreed += float((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
        likelihood += float(at_target.sum())
    return Distance(kl / count, agreed / count, float(np.exp(-likelihood / count)))


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Fidelity:
    """A fused model against base + adapter."""

    tokens: int  # scored
    kl: float
    top1: float
    perplexity: float  # of base + adapter
    fused_perplexity: float
    moved: float  # KL(base + adapter || base): how far tuning went, the yardstick for `kl`


def shortcomings(fidelity: Fidelity | None, left: SurvivalSummary | None) -> list[Notice]:
    """What is above the limits, in words; nothing where the fused model can stand for base + adapter.

    What is left of the change counts only where predictions were not compared: they are what matters, and fine
    rounding on the base's own grid can lose a part of the change that no prediction depends on.
    """
    found = []
    if fidelity is not None and fidelity.kl > KL_LIMIT:
        found.append(Notice("fused-far-from-tuned", kl=fidelity.kl, limit=KL_LIMIT))
    elif fidelity is not None and fidelity.kl > max(FREE_KL, LOST_LIMIT * fidelity.moved):
        found.append(Notice("fused-rounding-large", kl=fidelity.kl, moved=fidelity.moved, limit=LOST_LIMIT))
    if fidelity is None and left is not None and abs(1 - left.kept_mean) > 1 - KEPT_LIMIT:
        found.append(Notice("fused-change-lost", kept=left.kept_mean, limit=KEPT_LIMIT))
    return found
