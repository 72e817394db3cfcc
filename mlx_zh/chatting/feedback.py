"""What a user says of a model's answers, written to a file of feedback: a row for each judgement, on request only.

Nothing here needs a terminal. `corpus.feedback` has the form of a row, and reads it as training data.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_zh.corpus import feedback
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.invalid_row import InvalidRow
from mlx_zh.errors import DataError
from mlx_zh.models.generate import Sampling
from mlx_zh.system.record_lines import append_record

_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """Which model wrote an answer, and how it was drawn."""

    model: str
    adapter: str  # the name of a stage (sft, dpo), none, or a folder
    fingerprint: str  # of model and adapter
    sampling: Sampling
    seed: int | None  # None: not known


@dataclass(frozen=True)
class Given:
    """An answer that a model gave; the origin of one from a saved conversation is not known."""

    text: str
    origin: Origin | None = None


def good(file: Path, prompt: Sequence[Message], answer: Given) -> None:
    """Record that an answer is good. Raises DataError, StorageError, as all of these functions do."""
    _record(file, prompt, [answer], "good")


def bad(file: Path, prompt: Sequence[Message], answer: Given) -> None:
    """Record that an answer is bad."""
    _record(file, prompt, [answer], "bad")


def compared(file: Path, prompt: Sequence[Message], answers: tuple[Given, Given], choice: str | int) -> None:
    """Record which of two answers is better: 0 or 1, its index; or that both are good, or neither."""
    _record(file, prompt, answers, choice)


def edited(file: Path, prompt: Sequence[Message], answer: Given, text: str) -> None:
    """Record what an answer should have been."""
    _record(file, prompt, [answer], "edited", edited=text)


def withdrawn(file: Path, prompt: Sequence[Message], answers: Sequence[Given]) -> None:
    """Take back what was said of an answer, or of two that were compared."""
    _record(file, prompt, answers, feedback.WITHDRAWN)


def _record(file: Path, prompt: Sequence[Message], answers: Sequence[Given], choice: str | int, **more: str) -> None:
    origin = answers[-1].origin
    row: dict[str, Any] = {
        "kind": feedback.KIND,
        "version": _VERSION,
        "prompt": [{"role": message.role, "content": message.content} for message in prompt],
        "answers": [answer.text for answer in answers],
        "choice": choice,
        **more,
        "model": origin and origin.model,
        "adapter": origin and origin.adapter,
        "fingerprint": origin and origin.fingerprint,
        "sampling": [_sampling(answer.origin) for answer in answers],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    try:
        feedback.judgement_of(row)
    except InvalidRow as problem:
        raise DataError(f"this cannot be recorded, because training could not use it: {problem}") from problem
    feedback.require_feedback(file)
    append_record(file, row)


def _sampling(origin: Origin | None) -> dict[str, Any] | None:
    if origin is None:
        return None
    drawn = origin.sampling
    return {
        "temperature": drawn.temperature,
        "top_p": drawn.top_p,
        "max_tokens": drawn.max_tokens,
        "seed": origin.seed,
    }
