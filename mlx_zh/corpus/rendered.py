"""Rendered rows: tokens, which of them are trained, and why a row has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.encoding import Tokens
from mlx_zh.errors import TemplateError

# The reasons for dropping an example, as counted in `dropped`.
OVERFLOW = "longer than max_length"
FIRST_EXCHANGE_OVERFLOW = "first exchange longer than max_length"
NO_REPLY = "no assistant message"
NOT_TRAINED = "not to be trained"  # every reply that is left is context only
PROMPT_OVERFLOW = "prompt longer than max_length"
CHOSEN_OVERFLOW = "chosen response does not fit into max_length"
REJECTED_OVERFLOW = "rejected response does not fit into max_length"
ANSWER_OVERFLOW = "answer does not fit into max_length"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's tokens up to the end-of-turn token of the last reply."""

    tokens: np.ndarray  # (T,) int32
    trained: np.ndarray  # (T,) bool: the token is a target, so its loss is scored
    truncated: bool  # whether turns were cut from the end
    segments: np.ndarray | None = None  # (B, 2) int32: first token and parent (-1: none); None: one segment

    def paths(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each learned branch with all that stands before it, as tokens and the mask of what only it learns."""
        if self.segments is None:
            return [(self.tokens, self.trained)]
        starts, parents = self.segments[:, 0].tolist(), self.segments[:, 1].tolist()
        spans = [np.arange(start, stop) for start, stop in pairwise([*starts, len(self.tokens)])]
        paths = []
        for number, span in enumerate(spans):
            if not self.trained[span].any():
                continue
            before, parent = [span], parents[number]
            while parent >= 0:
                before.insert(0, spans[parent])
                parent = parents[parent]
            places = np.concatenate(before)
            paths.append((self.tokens[places], self.trained[places] & (places >= span[0])))
        return paths


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """A prompt and two responses, int32; each response ends with its end-of-turn token."""

    prompt: np.ndarray  # (P,)
    chosen: np.ndarray  # (C,)
    rejected: np.ndarray  # (R,)


@dataclass(frozen=True, slots=True)
class RenderedAnswer:
    """A prompt and a response, int32, which ends with its end-of-turn token; and whether it is good."""

    prompt: np.ndarray  # (P,)
    response: np.ndarray  # (R,)
    label: bool


def learned_of(
    messages: Sequence[Message], pieces: Sequence[Tokens], train_on: str, dropped: Counter[str], *, truncated: bool
) -> Rendered | None:
    """The conversation, with replies that are context only left out of the mask; None if nothing else is trained."""
    rendered = _assemble(pieces, train_on, truncated=truncated)
    replies = [message.trained for message in messages if message.role == "assistant"]
    if all(replies):
        return rendered
    ends = np.cumsum([len(piece) for piece in pieces])
    for number, is_trained in enumerate(replies):
        if not is_trained:
            rendered.trained[ends[2 * number] : ends[2 * number + 1]] = False
    if not rendered.trained.any():
        dropped[NOT_TRAINED] += 1
        return None
    return rendered


def _assemble(pieces: Sequence[Tokens], train_on: str, *, truncated: bool) -> Rendered:
    """Join the pieces, of which every second is a reply, and mark the trained tokens."""
    tokens = _joined(pieces)
    trained = np.zeros(len(tokens), dtype=bool)
    if train_on == "all":
        trained[1:] = True
    position = 0
    for i, piece in enumerate(pieces):
        end = position + len(piece)
        if i % 2 == 1 and (train_on == "assistant" or (train_on == "last" and i == len(pieces) - 1)):
            trained[position:end] = True
        position = end
    return Rendered(tokens, trained, truncated)


def pair_of(
    source: str,
    chosen: Sequence[Tokens],
    rejected: Sequence[Tokens],
    max_length: int | None,
    dropped: Counter[str],
) -> RenderedPair | None:
    """The pair from the pieces of prompt + chosen, and from those of prompt + rejected or of rejected alone."""
    prompt = _joined(chosen[:-1])
    if len(rejected) > 1 and not np.array_equal(prompt, _joined(rejected[:-1])):
        raise TemplateError(
            f"{source}: the prompt's tokens depend on the response that follows, so the two responses cannot be "
            "compared; use another chat template or model"
        )
    if max_length is not None:
        room = max_length - len(prompt)
        for too_long, reason in (
            (room <= 0, PROMPT_OVERFLOW),
            (len(chosen[-1]) > room, CHOSEN_OVERFLOW),
            (len(rejected[-1]) > room, REJECTED_OVERFLOW),
        ):
            if too_long:
                dropped[reason] += 1
                return None
    return RenderedPair(prompt, _joined(chosen[-1:]), _joined(rejected[-1:]))


def answer_of(
    pieces: Sequence[Tokens], label: bool, max_length: int | None, dropped: Counter[str]
) -> RenderedAnswer | None:
    """The labelled answer from the pieces of prompt + response; None, counted, if they are too long."""
    prompt, response = _joined(pieces[:-1]), _joined(pieces[-1:])
    if max_length is not None and len(prompt) + len(response) > max_length:
        dropped[PROMPT_OVERFLOW if len(prompt) >= max_length else ANSWER_OVERFLOW] += 1
        return None
    return RenderedAnswer(prompt, response, label)


def _joined(pieces: Sequence[Tokens]) -> np.ndarray:
    return np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])
