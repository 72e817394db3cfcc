"""Measure how close a fused model is to base + adapter: KL, top-1 agreement and perplexity on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.logprobs import hidden_states, output_head
from mlx_zh.core.packing import PackedBatch, pack_conversations, plan_rows
from mlx_zh.core.sums import log_sum_exp, sum_last
from mlx_zh.language.notice import Notice
from mlx_zh.models.export.merge import SurvivalSummary
from mlx_zh.system import device
from mlx_zh.system.accelerator import repeated

# A fused model beyond these limits gets a warning that it is not equal to base + adapter.
KL_LIMIT = 0.05  # nats a token: about the loss from quantizing an 8B model to 4 bits
LOST_LIMIT = 0.25  # a KL of this share of the KL between tuned and base model
FREE_KL = 0.002  # nats a token: smaller values are numerical noise
KEPT_LIMIT = 0.9  # the share of the adapter's change that must be left, mean of the matrices

Example = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]  # tokens (T,), and which of them are scored (T,)


@dataclass(frozen=True)
class Predictions:
    """A model's last hidden states before every scored token, and its output head.

    Hidden states (S, D) are stored, because logits (S, V) would take half a megabyte a token with a vocabulary of
    128k. The rest of the model need not stay in memory.
    """

    hidden: mx.array  # (S, D)
    head: Any

    def logits(self, start: int, stop: int) -> mx.array:
        """The logits of the scored tokens from `start` to `stop`: (stop - start, V), float32."""
        project = getattr(self.head, "as_linear", self.head)
        return project(self.hidden[start:stop]).astype(mx.float32)


class Logits(Protocol):
    """A model's logits before every scored token of a text."""

    def logits(self, start: int, stop: int) -> mx.array:
        """Those of the scored tokens from `start` to `stop`: (stop - start, V), float32."""


@dataclass(frozen=True)
class HeldOut:
    """Texts that were not trained on, packed into rows."""

    rows: tuple[PackedBatch, ...]

    @property
    def targets(self) -> mx.array:
        """The scored tokens (S,)."""
        return mx.concatenate([row.targets for row in self.rows])

    def predictions(self, model: nn.Module) -> Predictions:
        """The predictions of `model` for every scored token. Raises AcceleratorError."""

        def hidden(row: PackedBatch) -> mx.array:
            states = hidden_states(model, row, grad=False, only_scored=True)  # (S of this row, D)
            mx.eval(states)
            return states

        parts = [repeated(partial(hidden, row)) for row in self.rows]
        return Predictions(mx.concatenate(parts), output_head(model))


def held_out(examples: Sequence[Example], *, max_tokens: int, row_tokens: int) -> HeldOut:
    """The first examples with together at most `max_tokens` tokens (at least one), in rows of about `row_tokens`."""
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
    """How far the predictions of a compared model are from those of a reference model."""

    kl: float  # mean KL(reference || compared), nats a token
    top1: float  # share of the tokens where both models have the same most likely token
    perplexity: float  # of the compared model on the text


def distance(reference: Logits, compared: Logits, targets: mx.array) -> Distance:
    """Compare two models on the scored tokens `targets` (S,), a few rows of logits at a time."""
    count = targets.size
    kl = agreed = likelihood = 0.0
    rows = max(8, device.logit_bytes() // (8 * reference.logits(0, 1).shape[-1]))
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        p, q = (_log_softmax(model.logits(start, stop)) for model in (reference, compared))  # (rows, V) each
        at_target = mx.take_along_axis(q, targets[start:stop, None], axis=-1)
        divergence = mx.maximum(sum_last(mx.exp(p) * (p - q)), 0)  # a KL below 0 is a rounding error
        kl += float(divergence.sum())
        agreed += float((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
        likelihood += float(at_target.sum())
    return Distance(kl / count, agreed / count, float(np.exp(-likelihood / count)))


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - log_sum_exp(logits)[..., None]


@dataclass(frozen=True)
class Fidelity:
    """A fused model compared with base + adapter."""

    tokens: int  # scored tokens
    kl: float  # mean KL(base + adapter || fused), nats a token
    top1: float  # share of the tokens with the same most likely token
    perplexity: float  # of base + adapter
    fused_perplexity: float
    moved: float  # mean KL(base + adapter || base): how far tuning changed the model, to compare `kl` with


def shortcomings(
    fidelity: Fidelity | None, left: SurvivalSummary | None, llama_cpp: Distance | None = None
) -> list[Notice]:
    """Warnings for values beyond the limits; none if the fused model can replace base + adapter.

    What is left of the adapter's change (`left`) counts only if predictions were not compared. Predictions matter
    more, because rounding can lose a part of the change on which no prediction depends.
    """
    warnings = []
    if fidelity is not None and fidelity.kl > KL_LIMIT:
        warnings.append(Notice("fused-far-from-tuned", kl=fidelity.kl, limit=KL_LIMIT))
    elif fidelity is not None and fidelity.kl > max(FREE_KL, LOST_LIMIT * fidelity.moved):
        warnings.append(Notice("fused-rounding-large", kl=fidelity.kl, moved=fidelity.moved, limit=LOST_LIMIT))
    if fidelity is None and left is not None and abs(1 - left.kept_mean) > 1 - KEPT_LIMIT:
        warnings.append(Notice("fused-change-lost", kept=left.kept_mean, limit=KEPT_LIMIT))
    if llama_cpp is not None and llama_cpp.kl > KL_LIMIT:
        warnings.append(Notice("far-from-tuned-in-llama-cpp", kl=llama_cpp.kl, limit=KL_LIMIT))
    return warnings
